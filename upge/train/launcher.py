"""The launcher that started this rank, such as torchrun."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Variables that torchrun and deepspeed set. A rank that was started by hand has no launcher to end with.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_PR_SET_PDEATHSIG = 1


def has_launcher() -> bool:
    """Whether torchrun or deepspeed started this process."""
    return any(name in os.environ for name in _LAUNCHERS)


def end_with_launcher() -> None:
    """Makes the kernel kill this process when the launcher ends, even by SIGKILL (Linux only)."""
    if sys.platform == "linux" and has_launcher():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
