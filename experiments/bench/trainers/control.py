"""The child's side: it trains the requested number of steps, and waits in between, inside the trainer's own loop."""

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

from experiments.bench.trainers.link import Connection
from upge.errors import UserError


class Stop(BaseException):
    """The parent ends the training. It is not an Exception, so that no trainer handles it."""


class StepControl:
    """Controls a trainer by the parent's commands; the trainer calls `begin` before its first step and `stepped` after
    each step.

    Args:
        connection: the connection to the parent.
        evaluate: returns the accuracies of the current weights; its time does not count.
        compare: takes a command and returns a context manager for one step that takes the gradient without an update.
            The step puts its results into the dict that the context manager yields.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        connection: Connection,
        evaluate: Callable[[], Mapping[str, float]],
        compare: Callable[[Mapping[str, Any]], AbstractContextManager[dict[str, Any]]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._connection, self._evaluate, self._compare, self._clock = connection, evaluate, compare, clock
        self._left, self._began = 0, 0.0
        self._sums: dict[str, float] = {}
        self._comparison: AbstractContextManager[dict[str, Any]] | None = None
        self._compared: dict[str, Any] = {}

    def begin(self) -> None:
        """Reports that everything is loaded, and waits for the first command."""
        self._connection.send({"ready": True})
        self._wait()

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a finished step to the running sums, and waits after the last requested step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._left -= 1
        if self._left > 0:
            return
        seconds = self._clock() - self._began
        if self._comparison is not None:
            comparison, self._comparison = self._comparison, None
            comparison.__exit__(None, None, None)
        self._connection.send({"seconds": seconds, "rss": peak_memory(), **self._sums, **self._compared})
        self._compared = {}
        self._wait()

    def _wait(self) -> None:
        while True:
            command = self._connection.receive() or {"do": "stop"}
            if command["do"] == "stop":
                raise Stop
            if command["do"] == "evaluate":
                self._connection.send(self._evaluate())
                continue
            if command["do"] == "compare":
                self._comparison = self._compare(command)
                self._compared = self._comparison.__enter__()
            self._left, self._sums = int(command.get("count", 1)), {}
            self._began = self._clock()
            return


def peak_memory() -> float:
    """The peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(train: Callable[[dict[str, Any], Connection], None]) -> None:
    """The program of a child: trains the job in its arguments until it is stopped, then exits at once.

    It skips the libraries' own clean-up, which sometimes aborts a process that has finished.
    """
    connection, job, code = Connection(int(sys.argv[1]), int(sys.argv[2])), json.loads(sys.argv[3]), 0
    try:
        train(job, connection)
    except Stop:
        pass
    except BaseException as error:
        traceback.print_exc()
        message, is_users = (str(error).strip().splitlines() or [""])[0], isinstance(error, UserError)
        try:
            text = message if is_users else f"{type(error).__name__}: {message}"
            connection.send({"error": text, "users": is_users})
        except BrokenPipeError:
            pass  # the parent has exited
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
