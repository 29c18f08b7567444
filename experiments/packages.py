"""Optional packages: which extra installs each, and the message that names a missing one."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import TracebackType

#: Import name of an optional package → the arguments of `pip install`.
INSTALL = {
    **dict.fromkeys(("accelerate", "deepspeed", "peft", "safetensors", "tqdm", "transformers"), "'upge[train]'"),
    **dict.fromkeys(("huggingface_hub", "psutil", "tokenizers"), "'upge[train]'"),
    **dict.fromkeys(("math_verify", "latex2sympy2_extended"), "'upge[verify]'"),
    **dict.fromkeys(("jinja2", "matplotlib", "numpy", "rich", "scipy"), "'upge[report]'"),
    "sympy": "'upge[theory]'",
    **dict.fromkeys(("datasets", "pyarrow", "reasoning_gym"), "'upge[data]'"),
    **dict.fromkeys(("gguf", "filelock"), "'upge[gguf]'"),
    "vllm": "'upge[vllm]'",
    **dict.fromkeys(("omegaconf", "yaml"), "upge"),
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    **{name: name for name in ("tensorboard", "trackio", "wandb")},
}


def explanation(error: BaseException | None) -> str | None:
    """What to install, if the error or one that it was raised from is a missing optional package; else None."""
    while error is not None:
        # With a dot it is a module that another version of an installed package has; then the traceback helps more.
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package in INSTALL:
            return f"the package {package.replace('_', '-')} is not installed; run `pip install {_arguments(package)}`"
        error = error.__cause__
    return None


def _arguments(package: str) -> str:
    """What to give to pip: the package's extra, or all of them where another one is missing too.

    Someone who has installed upge without extras would otherwise be told one extra after another.
    """
    wanted = {INSTALL[name] for name in INSTALL if _is_of_all(name) and not is_installed(name)}
    return "'upge[all]'" if _is_of_all(package) and len(wanted | {INSTALL[package]}) > 1 else INSTALL[package]


def _is_of_all(package: str) -> bool:
    """Whether the extra `all` has the package."""
    return INSTALL[package].startswith("'upge[") and package != "vllm"


def is_installed(package: str) -> bool:
    """Whether an import of this top-level package would find it. It is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, or None in its place
        return sys.modules.get(package) is not None


def explain_missing() -> None:
    """Let this process end with a message and exit code 2 when an optional package is missing."""
    # torch warns of a missing numpy on its own, before a command says what to install.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = explanation(error)
        if message is None:
            before(kind, error, traceback)
            return
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = hook
