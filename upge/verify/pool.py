"""Verifies responses in worker processes, each with a hard time limit, while the caller continues."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future

from upge.errors import ConfigError
from upge.verify.base import (
    BUILT_IN,
    LONGEST_TIME,
    MOST_MEMORY,
    MOST_WORKERS,
    WORKERS_PER_CORE,
    AnswerVerifier,
    Item,
    Verdict,
    checked,
    load,
    shortened,
)
from upge.verify.dispatch import Dispatcher
from upge.verify.processes import Settings, Task


class VerifierPool:
    """One or more verifiers in persistent worker processes.

    Use it as a context manager, or call `close`. The constructor starts the processes and does not wait for them.
    `submit` and `score` may be called from any thread of the process that made the pool. The processes end with the
    program.

    Args:
        verifiers: names of the verifiers, see `upge.verify.load`. An item names its verifier; the first is the default.
        workers: number of worker processes, at most `WORKERS_PER_CORE` for each core of the machine.
        time_limit: seconds that a worker may spend on an item; time in the queue does not count. A worker that exceeds
            the limit is killed and replaced, and one that dies is replaced. Only its own item is lost.
        memory_limit: memory that a worker may use beyond what it starts with [GiB]; None for no limit.
        environment: names of environment variables that the processes see in addition to those of docs/verification.md.
        network: whether the processes may use the network. Without it they cannot where the system allows that.

    Raises:
        ConfigError: a verifier cannot be loaded, a limit or the number of workers is out of range, or a variable of
            `environment` is not set.
    """

    def __init__(
        self,
        verifiers: str | Sequence[str] = "math",
        workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: float | None = 4.0,
        environment: Sequence[str] = (),
        network: bool = False,
    ) -> None:
        check_limits(workers, time_limit, memory_limit, environment)
        names = tuple(dict.fromkeys([verifiers] if isinstance(verifiers, str) else verifiers))
        if not names:
            raise ConfigError("verify.verifier: found an empty list; name at least one verifier, such as math")
        self._verifiers = {name: load(name) for name in names}
        self._first = names[0]
        settings = Settings(names, workers, float(time_limit), memory_limit, tuple(environment), network)
        self._dispatcher = Dispatcher(settings)
        self._end = weakref.finalize(self, self._dispatcher.close)

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The names that an item may give; the first is the default."""
        return tuple(self._verifiers)

    def submit(self, item: Item) -> Future[Verdict]:
        """Starts the verification of an item and returns a future of its verdict.

        A verdict that needs no worker is available at once. Equal items that are pending at the same time are verified
        once. `Future.cancel` works until the verdict is available, and frees the worker. The future's callbacks run in
        the pool's thread; they may submit more items, but must not wait for them.

        Returns:
            The future. Its `result` raises RuntimeError if the pool's processes cannot be started, and CancelledError
            if the pool is closed first.

        Raises:
            RuntimeError: the pool is closed, belongs to another process, or cannot start its workers.
            TypeError: `item` is not (text, text, text or None, text or None).
            ValueError: `item` names a verifier that the pool does not have.
        """
        return self._begin(self._prepared(item))

    def score(self, items: Iterable[Item]) -> list[Verdict]:
        """Verifies items and returns one verdict for each, in order. Equal items are verified once.

        Raises:
            RuntimeError, TypeError, ValueError: as for `submit`.
        """
        asked = [self._prepared(item) for item in items]
        self._dispatcher.require_open()
        futures: dict[Task | Verdict, Future[Verdict]] = {}
        try:
            for task in asked:
                if task not in futures:
                    futures[task] = self._begin(task)
            return [futures[task].result() for task in asked]
        except CancelledError as error:
            raise RuntimeError("this VerifierPool was closed before all verdicts were there") from error
        except BaseException:
            for future in futures.values():  # frees the workers
                future.cancel()
            raise

    def close(self) -> None:
        """Ends all processes of the pool and cancels pending futures. Further calls do nothing."""
        self._end()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, task: Task | Verdict) -> Future[Verdict]:
        if isinstance(task, Task):
            return self._dispatcher.submit(task)
        self._dispatcher.require_open()
        known: Future[Verdict] = Future()
        known.set_result(task)
        return known

    def _prepared(self, item: Item) -> Task | Verdict:
        """The verdict on an item if it needs no worker, else the task for a worker."""
        response, answer, prompt, name = checked(item)
        name = name or self._first
        verifier = self._verifiers.get(name)
        if verifier is None:
            known = ", ".join(self._verifiers)
            raise ValueError(
                f"an item names the verifier {name!r}, but this pool has only {known}; name it when the pool is made"
            )
        # Only built-in verifiers run in the caller's process: they are fast for every response.
        if name not in BUILT_IN or not isinstance(verifier, AnswerVerifier):
            return Task(name, response, answer, prompt)
        given = verifier.extract(response)
        if not given:
            return Verdict(0.0, extracted=given)
        reward = verifier.glance(given, answer, prompt)
        if reward is None:
            return Task(name, given, answer, prompt, is_extracted=True)
        return Verdict(reward, extracted=shortened(given))


def check_limits(workers: int, time_limit: float, memory_limit: float | None, environment: Sequence[str]) -> None:
    """Checks the settings of a `VerifierPool` on this machine.

    Raises:
        ConfigError: as for the pool.
    """
    _require_positive("workers", workers, MOST_WORKERS, whole=True)
    _require_positive("time_limit", time_limit, LONGEST_TIME)
    if memory_limit is not None:
        _require_positive("memory_limit", memory_limit, MOST_MEMORY)
    cores = os.cpu_count() or 1
    if workers > WORKERS_PER_CORE * cores:
        raise ConfigError(
            f"verify.workers: found {workers}, but this machine has {cores} cores; give at most "
            f"{WORKERS_PER_CORE * cores}, {WORKERS_PER_CORE} for each"
        )
    for name in environment:
        if not isinstance(name, str) or name not in os.environ:
            raise ConfigError(
                f"verify.environment: found {name!r}, which is not the name of an environment variable that is set; "
                "set it, or leave it out"
            )


def _require_positive(key: str, value: float, most: float, *, whole: bool = False) -> None:
    """Raises ConfigError unless `value` is a positive number up to `most`."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value <= most:
        kind = "integer" if whole else "number"
        raise ConfigError(f"verify.{key}: found {value!r}; give a positive {kind} of at most {most:g}")
