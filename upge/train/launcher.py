"""The launcher that started this rank, such as torchrun."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from upge.train.stopping import Ending

#: Environment variables that torchrun and deepspeed set. A rank that was started by hand has no launcher.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_PR_SET_PDEATHSIG = 1


def has_launcher() -> bool:
    """Whether torchrun or deepspeed started this process."""
    return any(name in os.environ for name in _LAUNCHERS)


def end_with_launcher() -> None:
    """Make the kernel kill this process when the launcher ends, even if SIGKILL ends the launcher (Linux only)."""
    if sys.platform == "linux" and has_launcher():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def announce(ending: Ending, prints: bool) -> None:
    """Tell a launcher why a rank ends; with `prints` the rank also prints it, with the exit code, as its last line."""
    if not ending.code or not has_launcher():
        return
    text = f"exit code {ending.code}: {ending.reason}"
    if prints:
        print(text, file=sys.stderr, flush=True)
    # torchrun prints this in its summary.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError):
            message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
