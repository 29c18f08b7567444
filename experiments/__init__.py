"""The commands: `python -m experiments.NAME ...`, or `upge NAME ...`."""

import os
import signal
import sys
from types import FrameType

from experiments import packages


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """End this process at once, in the way that `cli.run_command` does later."""
    os.write(2, b"stopped by signal 2\n")
    os._exit(128 + number)


# `python -m experiments.NAME` imports this package while Python still looks for the command's module. The commands
# import large packages at the top of their files, so neither a missing one nor Ctrl-C can be handled there.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "upge":
    packages.explain_missing()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
