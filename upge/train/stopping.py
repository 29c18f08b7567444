"""How a run ends, and the signals that ask it to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

#: Exit codes of a run that has begun. FAILED stands for failures such as that of an inference engine.
DONE, FAILED, BAD_INPUT, NOT_FINITE = 0, 1, 2, 3


class Ending(NamedTuple):
    """How a run ended: the exit code (0, 1, 2, 3, or 128 + the signal that stopped it), and why, in one line."""

    code: int
    reason: str


def stop_signals() -> list[int]:
    """The signals that ask a program to stop. SIGHUP is not among them if it is ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class StopSignals:
    """Notes the first signal that asks this rank to stop.

    Attributes:
        number: the signal's number; 0 if there was none.
    """

    def __init__(self) -> None:
        self.number = 0

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.number != 0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal, also one of another rank. A second signal of the same kind ends the process at once."""
        self.number = self.number or number
        if frame is not None:
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals in the block and restore their earlier handlers after it."""
        before = {number: signal.signal(number, self.note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)
