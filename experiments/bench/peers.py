"""The libraries that benches compare with ("peers"), and their separate environment.

`make peers` installs them into .venv-peers, which also sees the packages of .venv (requirements/peers.sh). A bench with
`WITH_PEERS = True` runs in that environment if it exists, so that everything is measured in one process with the same
torch.
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
"""Name → (distribution, measured module); a file is loaded by itself, without its package."""


def enter(environment: Path = ROOT / ".venv-peers") -> None:
    """Restarts this program in the peers' environment, if that exists and the program does not run there yet.

    Call it at the start of a program, because it replaces the process.
    """
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), *sys.orig_argv[1:]])


@cache
def load(name: str) -> ModuleType:
    """Loads the module of a peer.

    Raises:
        ImportError: the peer, or something that it needs, is not installed.
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
    reasons = []
    for name in PEERS:
        try:
            load(name)
        except ImportError as error:
            reasons.append(f"{name} ({error})")
    return tuple(reasons)


def present(name: str) -> bool:
    """Whether a peer can be loaded."""
    return not any(entry.startswith(f"{name} (") for entry in missing())


def summary() -> str:
    """Sentences on the installed peers, with versions, and on the missing ones."""
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
