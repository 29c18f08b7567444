"""Scores responses in worker processes, each under a hard time limit, while the caller goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future

from upge.errors import ConfigError
from upge.verify.base import AnswerVerifier, Item, Verdict, checked, shortened
from upge.verify.dispatch import Dispatcher
from upge.verify.loading import BUILT_IN, load
from upge.verify.processes import Task


class VerifierPool:
    """One or several verifiers in `workers` persistent processes; use it as a context manager, or call `close`.

    An item names its verifier, or takes the first. The processes start when the pool is made, beside whatever the
    caller does next. An item's `time_limit` [s] starts when a worker takes it up: waiting in the queue does not count.
    A worker that exceeds it is killed and replaced, one that dies is replaced, and only its own item is lost. A worker
    may use `memory_limit` GiB beyond what it starts with (None: no limit). `submit` and `score` may be called from any
    thread of the process that made the pool. Nothing keeps a program from ending: the processes end with it.

    Raises:
        ConfigError: a verifier cannot be loaded, or a limit or the number of workers is not positive.
    """

    def __init__(
        self,
        verifiers: str | Sequence[str] = "math",
        workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: float | None = 4.0,
    ) -> None:
        _require_positive("workers", workers, whole=True)
        _require_positive("time_limit", time_limit)
        if memory_limit is not None:
            _require_positive("memory_limit", memory_limit)
        names = tuple(dict.fromkeys([verifiers] if isinstance(verifiers, str) else verifiers))
        if not names:
            raise ConfigError("verify.verifier: found an empty list; name at least one verifier, such as math")
        self._verifiers = {name: load(name) for name in names}
        self._first = names[0]
        self._dispatcher = Dispatcher(names, workers, float(time_limit), memory_limit)
        self._end = weakref.finalize(self, self._dispatcher.close)

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The names that an item may give; the first is the default."""
        return tuple(self._verifiers)

    def submit(self, item: Item) -> Future[Verdict]:
        """Has an item verified beside whatever the caller does next; the future's result is its verdict.

        What is known without any work is there at once. An item that equals one that is still being verified shares its
        work. `Future.cancel` works until the verdict is there, and frees the worker. The future raises RuntimeError
        where the pool's own processes cannot be started, CancelledError where the pool was closed first. Its callbacks
        run in the pool's thread: they may submit more, but must not wait for it.

        Raises:
            RuntimeError: the pool is closed, belongs to another process, or its workers cannot be started at all.
            TypeError: an item is not (text, text, text or None, text or None).
            ValueError: it names a verifier that is not one of the pool's.
        """
        return self._begin(self._prepared(item))

    def score(self, items: Iterable[Item]) -> list[Verdict]:
        """One verdict for each item, in order; identical items are verified once.

        Raises:
            RuntimeError, TypeError, ValueError: as in `submit`.
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
            for future in futures.values():  # what nobody waits for any longer must not keep a worker
                future.cancel()
            raise

    def close(self) -> None:
        """Ends all processes of the pool and cancels what is pending; further calls do nothing."""
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
        """The verdict, where it is known without work; else what a worker has to do for it."""
        response, answer, prompt, name = checked(item)
        name = name or self._first
        verifier = self._verifiers.get(name)
        if verifier is None:
            known = ", ".join(self._verifiers)
            raise ValueError(
                f"an item names the verifier {name!r}, but this pool has only {known}; name it when the pool is made"
            )
        # Only what this package wrote runs in the caller's process: it takes no time, whatever the response is.
        if name not in BUILT_IN or not isinstance(verifier, AnswerVerifier):
            return Task(name, response, answer, prompt)
        given = verifier.extract(response)
        if not given:
            return Verdict(0.0, extracted=given)
        reward = verifier.glance(given, answer, prompt)
        if reward is None:
            return Task(name, given, answer, prompt, is_extracted=True)
        return Verdict(reward, extracted=shortened(given))


def _require_positive(key: str, value: float, *, whole: bool = False) -> None:
    """Refuses a setting with which a pool could not work."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < float("inf"):
        raise ConfigError(f"verify.{key}: found {value!r}; give a positive {'integer' if whole else 'number'}")
