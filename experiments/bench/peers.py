"""The other libraries that benches measure against, and the environment of their own in which they live.

`make peers` installs them into .venv-peers, which sees .venv's packages below its own (requirements/peers.sh). A bench
that compares with peers says `WITH_PEERS = True`; its program then goes on in that environment, where there is one, so
that all takes turns in a single process with the same torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PEERS = {
    "TRL": ("trl", "trl.trainer.utils"),
    "Liger": ("liger-kernel", "liger_kernel.chunked_loss"),
    "cut-cross-entropy": ("cut-cross-entropy", "cut_cross_entropy"),
    "verl": ("verl", "verl/utils/experimental/torch_functional.py"),
}
"""Name → (distribution, the module that is measured; a file is loaded alone, without its package)."""


def enter(environment: Path = ROOT / ".venv-peers") -> None:
    """Starts this program again in the peers' environment, unless there is none or it runs there already.

    Only for a program's beginning: the process is replaced.
    """
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), *sys.orig_argv[1:]])


@cache
def load(name: str) -> ModuleType:
    """The module of a peer.

    Raises:
        ImportError: it is not installed, or something that it needs is not.
    """
    distribution, module = PEERS[name]
    if not module.endswith(".py"):
        return importlib.import_module(module)
    place = next((Path(p) / module for p in sys.path if (Path(p) / module).is_file()), None)
    if place is None:
        raise ImportError(f"{distribution} is not installed")
    spec = importlib.util.spec_from_file_location(f"peer_{place.stem}", place)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def missing() -> tuple[str, ...]:
    """The peers that cannot be loaded, each with the reason."""
    found = []
    for name in PEERS:
        try:
            load(name)
        except ImportError as error:
            found.append(f"{name} ({error})")
    return tuple(found)


def present(name: str) -> bool:
    """Whether a peer can be loaded."""
    return not any(told.startswith(f"{name} (") for told in missing())


def told() -> str:
    """A sentence on which peers there are, with versions, and which are missing."""
    there = [f"{name} {_version(distribution)}" for name, (distribution, _) in PEERS.items() if present(name)]
    parts = [f"Peers: {', '.join(there)}."] if there else []
    if missing():
        names = ", ".join(entry.partition(" (")[0] for entry in missing())
        parts.append(f"Not compared, because not installed: {names}; `make peers` installs them.")
    return " ".join(parts)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
