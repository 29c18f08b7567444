"""A child's side: it trains so many steps as it is told, and waits in between, inside its trainer's own loop."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from experiments.bench.trainers.link import Line
from upge.errors import UserError


class Stop(BaseException):
    """The parent has heard enough. No Exception, so that no trainer takes it for one of its own."""


class Turns:
    """Between the parent's words and a trainer that calls `begin` before its first step and `stepped` after each.

    Args:
        line: to the parent.
        evaluate: the figures of the present weights; the clock stands still meanwhile.
        compare: makes of a word the surroundings of one step that takes the gradient instead of an update; what the
            step finds out is put into the dict that they give.
    """

    def __init__(
        self,
        line: Line,
        evaluate: Callable[[], Mapping[str, float]],
        compare: Callable[[Mapping[str, Any]], AbstractContextManager[dict[str, Any]]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._line, self._evaluate, self._compare, self._clock = line, evaluate, compare, clock
        self._left, self._began = 0, 0.0
        self._sums: dict[str, float] = {}
        self._comparison: AbstractContextManager[dict[str, Any]] | None = None
        self._found: dict[str, Any] = {}

    def begin(self) -> None:
        """All is loaded: says so, and waits for the first word."""
        self._line.tell({"ready": True})
        self._wait()

    def stepped(self, figures: Mapping[str, float]) -> None:
        """A step is done; its figures are added to those since the last answer. Waits if it was the last one asked."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._left -= 1
        if self._left > 0:
            return
        seconds = self._clock() - self._began
        if self._comparison is not None:
            comparison, self._comparison = self._comparison, None
            comparison.__exit__(None, None, None)
        self._line.tell({"seconds": seconds, "rss": peak_memory(), **self._sums, **self._found})
        self._found = {}
        self._wait()

    def _wait(self) -> None:
        while True:
            word = self._line.hear() or {"do": "stop"}
            if word["do"] == "stop":
                raise Stop
            if word["do"] == "evaluate":
                self._line.tell(self._evaluate())
                continue
            if word["do"] == "compare":
                self._comparison = self._compare(word)
                self._found = self._comparison.__enter__()
            self._left, self._sums = int(word.get("count", 1)), {}
            self._began = self._clock()
            return


def peak_memory() -> float:
    """GiB that this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(train: Callable[[dict[str, Any], Line], None]) -> None:
    """A child's program: trains as the job in its arguments says until it is told to stop, then ends at once, since the
    libraries' own clean-up sometimes aborts a process that has done all its work."""
    line, job, code = Line(int(sys.argv[1]), int(sys.argv[2])), json.loads(sys.argv[3]), 0
    try:
        train(job, line)
    except Stop:
        pass
    except BaseException as error:
        traceback.print_exc()
        told, users = (str(error).strip().splitlines() or [""])[0], isinstance(error, UserError)
        try:
            line.tell({"error": told if users else f"{type(error).__name__}: {told}", "users": users})
        except BrokenPipeError:
            pass  # the parent is gone
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
