"""Verifies responses in worker processes, each with a hard time limit, while the caller continues."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

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
    as_json,
    checked,
    load,
    shortened,
)
from upge.verify.declared import ARGUMENTS, Declared
from upge.verify.dispatch import Dispatcher
from upge.verify.joined import Groups, Verdicts, joined
from upge.verify.processes import Settings, Task
from upge.verify.reward import Reward, names, terms

_MORE = frozenset(ARGUMENTS) - {"response", "answer", "prompt"}
"""Arguments that a worker gets only if the verifier takes them by name."""


@dataclass(frozen=True, eq=False)
class _Compared:
    """An item of a verifier that compares the responses to a prompt."""

    name: str
    item: Item


Part = Task | Verdict | _Compared
"""What is left to do for one verifier of an item: a worker's task, nothing, or waiting for other responses."""


class VerifierPool:
    """One or more verifiers in persistent worker processes.

    Use it as a context manager, or call `close`. The constructor starts the processes but does not wait for them.
    `submit` and `score` may be called from any thread of the process that made the pool. The processes end with the
    program.

    Args:
        verifiers: names of the verifiers, see `upge.verify.load`, or sums of them such as "math + 0.2*my.style". An
            item names its verifier; the first is the default.
        workers: number of worker processes, at most `WORKERS_PER_CORE` per core of the machine.
        time_limit: seconds that a worker may spend on an item; time in the queue does not count. A worker that exceeds
            the limit or dies is replaced, and only its own item is lost.
        memory_limit: memory that a worker may use beyond what it starts with [GiB]; None for no limit.
        environment: names of environment variables that the processes see in addition to those of docs/verification.md.
        network: whether the processes may use the network; False blocks it, on systems where that is possible.

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
        rewards = tuple(dict.fromkeys([verifiers] if isinstance(verifiers, str) else verifiers))
        if not rewards:
            raise ConfigError("verify.verifier: found an empty list; name at least one verifier, such as math")
        self._verifiers = {name: load(name) for name in names(rewards)}
        self._declared = {name: Declared.by(verifier) for name, verifier in self._verifiers.items()}
        self._rewards = {text: Reward(terms(text), self._declared) for text in rewards}
        self._first = rewards[0]
        ranges = {name: (declared.minimum, declared.maximum) for name, declared in self._declared.items()}
        settings = Settings(
            tuple(ranges), workers, float(time_limit), memory_limit, tuple(environment), network, ranges
        )
        self._dispatcher = Dispatcher(settings)
        self._groups = Groups(self._begin_group)
        self._end = weakref.finalize(self, self._dispatcher.close)

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The names that an item may give; the first is the default."""
        return tuple(self._rewards)

    def reward(self, name: str | None = None) -> Reward:
        """The reward that an item with this verifier gets, with its range.

        Raises:
            ValueError: the pool has no such verifier.
        """
        reward = self._rewards.get(name or self._first)
        if reward is None:
            known = ", ".join(self._rewards)
            raise ValueError(
                f"an item names the verifier {name!r}, but this pool has only {known}; name it when the pool is made"
            )
        return reward

    @property
    def rewards(self) -> dict[str, Reward]:
        """The reward of each verifier that an item may give."""
        return dict(self._rewards)

    def submit(self, item: Item) -> Future[Verdict]:
        """Start the verification of an item and return a future of its verdict.

        A verdict that needs no worker is available at once. Equal items that are pending at the same time are verified
        only once. `Future.cancel` works until the verdict is available, and frees the worker. The future's callbacks
        run in the pool's thread; they may submit more items, but must not wait for them.

        A verifier that compares the responses to a prompt starts when all members of the item's group are submitted.

        Returns:
            The future. Its `result` raises RuntimeError if the pool's processes cannot be started, and CancelledError
            if the pool is closed first.

        Raises:
            RuntimeError: the pool is closed, belongs to another process, or cannot start its workers.
            TypeError: a field of `item` has another type.
            ValueError: `item` names a verifier that the pool does not have.
        """
        return self._begin(*self._prepared(checked(item)))

    def score(self, items: Iterable[Item]) -> list[Verdict]:
        """Verify items and return one verdict for each, in order. Equal items are verified only once.

        All members of a group must be among the items.

        Raises:
            RuntimeError, TypeError, ValueError: as for `submit`.
        """
        asked = [self._prepared(checked(item)) for item in items]
        self._dispatcher.require_open()
        futures: dict[object, Future[Verdict]] = {}
        try:
            for one in asked:
                if one not in futures:
                    futures[one] = self._begin(*one)
            return [futures[one].result() for one in asked]
        except CancelledError as error:
            raise RuntimeError("this VerifierPool was closed before all verdicts were there") from error
        except BaseException:
            for future in futures.values():  # frees the workers
                future.cancel()
            raise

    def close(self) -> None:
        """End all processes of the pool and cancel pending futures. Further calls do nothing."""
        self._end()
        self._groups.cancel()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, reward: Reward, parts: Sequence[Part]) -> Future[Verdict]:
        futures = [self._future(part) for part in parts]
        return futures[0] if reward.is_plain else joined(futures, reward.of)

    def _future(self, part: Part) -> Future[Verdict]:
        if isinstance(part, Task):
            return self._dispatcher.submit(part)
        self._dispatcher.require_open()
        if isinstance(part, _Compared):
            return self._groups.add(part.name, part.item)
        known: Future[Verdict] = Future()
        known.set_result(part)
        return known

    def _prepared(self, item: Item) -> tuple[Reward, tuple[Part, ...]]:
        """The item's reward, and for each of its verifiers a verdict or what is left to do."""
        reward = self.reward(item.verifier)
        return reward, tuple(self._part(term.name, item) for term in reward.terms)

    def _part(self, name: str, item: Item) -> Part:
        verifier, declared = self._verifiers[name], self._declared[name]
        if declared.compares:
            return _Compared(name, item)
        # Only built-in verifiers run in the caller's process: they are fast for every response.
        if name not in BUILT_IN or not isinstance(verifier, AnswerVerifier):
            wanted = _MORE & declared.asks
            more = as_json({key: getattr(item, key) for key in sorted(wanted)}) if wanted else ""
            return Task(name, item.response, item.answer, item.prompt, more=more)
        given = verifier.extract(item.response)
        if not given:
            return Verdict(0.0, extracted=given)
        reward = verifier.glance(given, item.answer, item.prompt)
        if reward is None:
            return Task(name, given, item.answer, item.prompt, is_extracted=True)
        return Verdict(reward, extracted=shortened(given))

    def _begin_group(self, name: str, items: Sequence[Item]) -> Future[Verdicts]:
        """Start the verification of a group of responses to one prompt."""
        asks, first = self._declared[name].asks, items[0]
        values: dict[str, Any] = {"responses": [item.response for item in items]}
        if "row" in asks:
            values["row"] = first.row
        for key in ("tokens", "is_truncated"):
            if key in asks:
                values[key] = [getattr(item, key) for item in items]
        return self._dispatcher.submit(
            Task(name, "", first.answer, first.prompt, more=as_json(values), responses=len(items))
        )


def check_limits(workers: int, time_limit: float, memory_limit: float | None, environment: Sequence[str]) -> None:
    """Check the settings of a `VerifierPool` on this machine.

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
    """Raise ConfigError unless `value` is a positive number up to `most`."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value <= most:
        kind = "integer" if whole else "number"
        raise ConfigError(f"verify.{key}: found {value!r}; give a positive {kind} of at most {most:g}")
