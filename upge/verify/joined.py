"""Futures of verdicts that depend on others: sums of verifiers, and groups whose responses one verifier compares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from upge.verify.base import Item, Member, Verdict

Verdicts = tuple[Verdict, ...]


def joined(parts: Sequence[Future[Verdict]], result: Callable[[Sequence[Verdict]], Verdict]) -> Future[Verdict]:
    """A future of `result`, applied to the verdicts of all parts. Cancelling it cancels the parts."""
    total: Future[Verdict] = Future()
    lock, missing = threading.Lock(), [len(parts)]

    def done(_: Future[Verdict]) -> None:
        with lock:
            missing[0] -= 1
            is_last = missing[0] == 0
        if is_last:
            _settle(total, any(part.cancelled() for part in parts), lambda: result([part.result() for part in parts]))

    total.add_done_callback(lambda _: [part.cancel() for part in parts] if total.cancelled() else None)
    for part in parts:
        part.add_done_callback(done)
    return total


class Groups:
    """Collects the responses to a prompt until the group is complete, for verifiers that compare them.

    Args:
        begin: starts the verification of a complete group, in the order of its members.
    """

    def __init__(self, begin: Callable[[str, Sequence[Item]], Future[Verdicts]]) -> None:
        self._begin, self._lock = begin, threading.Lock()
        self._waiting: dict[tuple[str, object], dict[int, tuple[Item, Future[Verdict]]]] = {}

    def add(self, name: str, item: Item) -> Future[Verdict]:
        """A future of the verdict on one member. Cancelling all futures of a group cancels its verification."""
        future: Future[Verdict] = Future()
        member = item.member or Member(object(), 1, 0)
        key = name, member.group
        future.add_done_callback(lambda _: self._forget(key) if future.cancelled() else None)
        with self._lock:
            waiting = self._waiting.setdefault(key, {})
            waiting[member.place] = (item, future)
            if len(waiting) < member.size:
                return future
            del self._waiting[key]
        items, futures = zip(*(waiting[place] for place in sorted(waiting)), strict=True)
        whole = self._begin(name, items)

        def give_up(_: Future[Verdict]) -> None:
            if all(one.cancelled() for one in futures):
                whole.cancel()

        def done(_: Future[Verdicts]) -> None:
            for place, one in enumerate(futures):
                _settle(one, whole.cancelled(), lambda place=place: whole.result()[place])

        for one in futures:
            one.add_done_callback(give_up)
        whole.add_done_callback(done)
        return future

    def _forget(self, key: tuple[str, object]) -> None:
        """Drop a group that will never be complete, because one of its members was cancelled."""
        with self._lock:
            self._waiting.pop(key, None)

    def cancel(self) -> None:
        """Cancel the futures of incomplete groups."""
        with self._lock:
            waiting = [future for members in self._waiting.values() for _, future in members.values()]
            self._waiting.clear()
        for future in waiting:
            _settle(future, True, lambda: Verdict(0.0))


def _settle(future: Future[Verdict], is_cancelled: bool, result: Callable[[], Verdict]) -> None:
    """Set the outcome of a future that may be cancelled at any time."""
    if is_cancelled:
        future.cancel()
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(result())
    except BaseException as error:
        future.set_exception(error)
