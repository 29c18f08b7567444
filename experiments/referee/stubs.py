"""Imports a framework's module from a folder without the packages that it needs for anything but its losses.

A worker process of its own calls `install`. Every import that fails then yields a stub in place of the missing package
or name: something that can be called, subclassed and used as a decorator or an annotation, and that does nothing.
The loss functions themselves use torch alone. What was replaced is recorded and shown.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

#: Packages that are not imported even if they are installed, because importing them takes long or needs a GPU.
HEAVY = ("vllm", "deepspeed", "ray", "wandb", "peft", "sglang", "flash_attn", "megatron", "liger_kernel", "datasets")
#: Packages for other accelerators. Frameworks ask for them in order to take another path, so they stay missing.
ABSENT = ("torch_npu", "torch_xla", "torch_musa")


class StubType(type):
    """The class of stubs, which are classes themselves so that frameworks can inherit from them."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return make_stub(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__dict__.get("_is_stub"):
            # A decorator without or with arguments returns the function.
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else make_stub(cls.__name__)
        return super().__call__(*args, **kwargs)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __bool__(cls) -> bool:
        return not cls.__dict__.get("_is_stub")

    def __fspath__(cls) -> str:
        return cls.__name__

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *error: object) -> None:
        return None


def make_stub(name: str) -> Any:
    """A new stub; it is false."""
    return StubType(name, (), {"_is_stub": True})


class StubModule(ModuleType):
    """A package that is not there."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return make_stub(name)


def install(own: Sequence[str], real: Callable[..., Any] = builtins.__import__) -> list[str]:
    """Replace the process's import; return the list to which the names of stubs are added.

    Args:
        own: the framework's packages, whose own modules must be there.
    """
    replaced: list[str] = []

    def stub(name: str, fromlist: Any) -> ModuleType:
        # Not in sys.modules, where the libraries that are there would find it.
        if name not in replaced:
            replaced.append(name)
        return StubModule(name if fromlist else name.partition(".")[0])

    def fill(module: ModuleType, names: Sequence[str]) -> None:
        for name in names:
            path = f"{module.__name__}.{name}"
            try:
                present = name == "*" or hasattr(module, name) or path in sys.modules
            except Exception:  # a lazy module whose own import fails
                present = False
            if not present:
                setattr(module, name, make_stub(name))
                replaced.append(path)

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        asked_by = str((globals or {}).get("__name__", ""))
        if asked_by.partition(".")[0] not in own:
            return real(name, globals, locals, fromlist, level)
        top = name.partition(".")[0]
        if level == 0 and top in HEAVY and top not in own:
            return stub(name, fromlist)
        try:
            module = real(name, globals, locals, fromlist, level)
        except ModuleNotFoundError:
            if level or top in (*own, *ABSENT):
                raise
            return stub(name, fromlist)
        if fromlist and not level and top not in own:
            fill(module, fromlist)
        return module

    builtins.__import__ = importing
    return replaced
