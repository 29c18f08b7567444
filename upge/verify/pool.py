"""Scores many responses at once in worker processes, each item under a hard time limit."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait

from upge.errors import ConfigError
from upge.verify.boxed import last_boxed
from upge.verify.loading import load
from upge.verify.math import MathVerifier
from upge.verify.processes import START_LIMIT, Item, Team, Worker

START_ATTEMPTS = 3
"""Times in a row that each worker may die without having started on an item."""


@dataclass(frozen=True)
class Verdict:
    """What came of one item: the reward in [0, 1]; status "ok", "timeout" or "error" (reward 0); the reason, if any."""

    reward: float
    status: str = "ok"
    detail: str = ""


class VerifierPool:
    """A verifier in `workers` persistent processes; use it as a context manager, or call `close`.

    The processes start when the pool is made, beside whatever the caller does next; the first `score` waits for them.
    An item's `time_limit` [s] starts when a worker takes it up: waiting in the queue does not count. A worker that
    exceeds it is killed and replaced, one that dies is replaced, and only its own item is lost. A worker may use
    `memory_limit` GiB beyond what it starts with (None: no limit). `score` may be called from any thread.

    Raises:
        ConfigError: the verifier cannot be loaded, or a limit or the number of workers is not positive.
    """

    def __init__(
        self, verifier_name: str, workers: int = 2, time_limit: float = 5.0, memory_limit: float | None = 4.0
    ) -> None:
        _require_positive("workers", workers, whole=True)
        _require_positive("time_limit", time_limit)
        if memory_limit is not None:
            _require_positive("memory_limit", memory_limit)
        self._verifier = load(verifier_name)
        self._name, self._time_limit = verifier_name, float(time_limit)
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._team = Team(verifier_name, workers, memory_limit)
        self._end = weakref.finalize(self, self._team.stop, os.getpid())

    def score(self, items: Iterable[Item]) -> list[Verdict]:
        """One verdict for each (response, answer, prompt), in order; identical items are verified once.

        Raises:
            RuntimeError: the pool is closed, or its workers cannot be started at all.
            TypeError: an item is not (text, text, text or None).
        """
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("this VerifierPool is closed; make a new one")
            asked = [self._decisive(_checked(item)) for item in items]
            verdicts = {item: Verdict(item) if isinstance(item, float) else None for item in asked}
            queue = deque(item for item, verdict in verdicts.items() if verdict is None)
            try:
                self._run(queue, verdicts)
            except BaseException:
                for worker in list(self._team.workers):  # an answer to this call's item must not meet the next call
                    if worker.item is not None:
                        self._team.replace(worker)
                raise
            return [verdicts[item] for item in asked]

    def close(self) -> None:
        """Ends all processes of the pool; further calls do nothing."""
        with self._lock:
            self._end()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decisive(self, item: Item) -> Item | float:
        """The reward, where the math verifier knows it without parsing; else the part of the item that decides it."""
        if not isinstance(self._verifier, MathVerifier):
            return item
        reward = self._verifier.quick(item[0], item[1])
        return (rf"\boxed{{{last_boxed(item[0])}}}", item[1], None) if reward is None else reward

    def _run(self, queue: deque[Item], verdicts: dict) -> None:
        """Works the queue off into `verdicts`."""
        while queue or any(worker.item is not None for worker in self._team.workers):
            for worker in list(self._team.workers):
                if queue and worker.idle:
                    if worker.take_up(queue[0]):
                        queue.popleft()
                    else:
                        self._team.replace(worker)
            workers = list(self._team.workers)
            first = min(worker.deadline for worker in workers)
            patience = None if first == float("inf") else max(0.0, first - time.monotonic())
            spoke = wait([worker.connection for worker in workers], patience)
            for worker in workers:
                if worker.connection in spoke:
                    self._receive(worker, queue, verdicts)
                elif time.monotonic() >= worker.deadline:
                    self._expire(worker, verdicts)

    def _receive(self, worker: Worker, queue: deque[Item], verdicts: dict) -> None:
        """Takes one message of a worker, or notes that it has died."""
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker, queue, verdicts)
            return
        if kind == "ready":
            worker.pid, worker.deadline = content[0], float("inf")
        elif kind == "started":
            worker.started, worker.deadline = True, time.monotonic() + self._time_limit
            self._failed_starts = 0
        elif kind == "done":
            reward, status, detail, seconds = content
            # This thread may have come late to the message; whether the item was late is for the worker to say.
            late = seconds > self._time_limit
            verdicts[worker.item] = self._timeout() if late else Verdict(reward, status, detail)
            worker.item, worker.deadline = None, float("inf")
        else:
            self._team.replace(worker)
            raise RuntimeError(f"a verification process could not load '{self._name}': {content[0]}")

    def _bury(self, worker: Worker, queue: deque[Item], verdicts: dict) -> None:
        """Replaces a worker that has died; an item that it had started is an error, one not yet started waits again."""
        ending = self._team.replace(worker)
        if worker.item is not None and worker.started:
            verdicts[worker.item] = Verdict(0.0, "error", f"the worker process {ending}")
            return
        if worker.item is not None:
            queue.appendleft(worker.item)
        self._failed_starts += 1
        if self._failed_starts >= START_ATTEMPTS * len(self._team.workers):
            raise RuntimeError(f"verification processes for '{self._name}' end before they start: see stderr")

    def _expire(self, worker: Worker, verdicts: dict) -> None:
        """Replaces a worker whose time is over."""
        self._team.replace(worker)
        if worker.item is None:
            raise RuntimeError(f"a verification process for '{self._name}' was not ready after {START_LIMIT:g} s")
        verdicts[worker.item] = self._timeout()

    def _timeout(self) -> Verdict:
        return Verdict(0.0, "timeout", f"not done after {self._time_limit:g} s")


def _require_positive(key: str, value: float, *, whole: bool = False) -> None:
    """Refuses a setting with which a pool could not work."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < float("inf"):
        raise ConfigError(f"verify.{key}: found {value!r}; give a positive {'integer' if whole else 'number'}")


def _checked(item: Item) -> Item:
    """`item` as a tuple, if its parts are texts."""
    parts = tuple(item)
    if len(parts) == 3 and isinstance(parts[0], str) and isinstance(parts[1], str):
        if parts[2] is None or isinstance(parts[2], str):
            return parts
    raise TypeError(f"an item must be (response, answer, prompt or None), all text; found {repr(parts)[:200]}")
