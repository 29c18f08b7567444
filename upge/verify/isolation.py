"""Limits on the processes of a `VerifierPool`: environment, network, memory, files, and their descendants.

These limits confine bugs and prevent obvious abuse of a verifier that executes a response. They are not a sandbox: such
code has all of the user's permissions on files and processes (docs/verification.md). Linux supports all of them; on
other systems, those that are missing are skipped.

The functions use only the standard library and import nothing from `upge`, because the server calls them before it
imports anything else. `python -IS isolation.py` exits with 0 if processes can be cut off from the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

INHERITED = frozenset(
    "PATH HOME USER LOGNAME SHELL TERM TZ TMPDIR TEMP TMP LANG LANGUAGE VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH "
    "DYLD_LIBRARY_PATH XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE".split()
)
"""Environment variables that verifiers see, in addition to those that match `INHERITED_PATTERN`."""
INHERITED_PATTERN = re.compile(r"(?:PYTHON|LC_)[A-Z0-9]+")
FIXED = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment variables that are set for verifiers. The fixed hash seed makes the order in which sympy tries methods,
and so the result of borderline cases, the same in every process."""
FILE_BYTES = 2**30
"""The maximum size in bytes of a file that a worker writes."""
OPEN_FILES = 1024
"""The maximum number of files that a worker has open."""

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of unshare


def environment(names: Iterable[str] = ()) -> dict[str, str]:
    """The environment of verifiers: the variables that they may inherit, `FIXED`, and those in `names`."""
    chosen = {name for name in os.environ if name in INHERITED or INHERITED_PATTERN.fullmatch(name)}
    inherited = {name: os.environ[name] for name in chosen}
    return inherited | FIXED | {name: os.environ[name] for name in names if name in os.environ}


def leave_network() -> bool:
    """Move this process and all that it starts to a network without devices. It must have a single thread.

    Returns:
        Whether that worked. It needs Linux and either a privileged user or user namespaces.
    """
    if sys.platform != "linux":
        return False
    libc, uid, gid = ctypes.CDLL(None), os.geteuid(), os.getegid()
    if libc.unshare(_NEW_NETWORK) == 0:
        return True
    if libc.unshare(_NEW_USER | _NEW_NETWORK) != 0:
        return False
    # Without these, the process keeps its permissions but believes that it is the user "nobody".
    for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items():
        with contextlib.suppress(OSError):
            Path(f"/proc/self/{name}").write_text(text)
    return True


def can_leave_network() -> bool:
    """Whether `leave_network` works on this machine; a separate process tries it."""
    return subprocess.run([sys.executable, "-IS", __file__], stdin=subprocess.DEVNULL).returncode == 0


def adopt_orphans() -> None:
    """Make this process adopt all its descendants whose own parents end, in any session."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent, which has the id `parent`, ends."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def children() -> set[int]:
    """The ids of this process's children, including ended ones; empty if the kernel does not list them.

    The process must have a single thread.
    """
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:
        return set()


def kill(pid: int) -> int | None:
    """Kill a child and its process group. Return its wait status, or None if this user may not kill it.

    The id cannot have been reused, because only this function reaps children.
    """
    with contextlib.suppress(OSError):  # the child leads no group
        os.killpg(pid, signal.SIGKILL)
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:  # a program of another user, as with sudo
        return None
    return os.waitpid(pid, 0)[1]


def limit_resources(gibibytes: float | None) -> None:
    """Limit this process and those that it starts.

    Args:
        gibibytes: the address space allowed beyond the current size [GiB], so that a memory bomb fails in this process;
            None for no limit.
    """
    try:
        import resource
    except ImportError:
        return
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    if gibibytes is not None:
        with contextlib.suppress(OSError):  # only Linux reports the current size
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _lower(resource.RLIMIT_AS, used + int(gibibytes * 2**30))


def limit_cpu(seconds: int) -> None:
    """Limit the total CPU time of this process, and of each process that it starts, to `seconds`.

    This ends processes that a verifier leaves behind; the worker itself is limited by wall-clock time.
    """
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or seconds < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


def _lower(kind: int, limit: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(kind, (limit, limit))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(not leave_network())
