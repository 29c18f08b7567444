"""Rows of a check-up: how a check becomes rows with verdicts, on all ranks, whatever fails."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments.doctor.settings import RESPONSE_TOKENS, DoctorConfig
from experiments.run.faults import load
from experiments.run.model_shape import ModelShape
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.faults import Fault

#: Seconds that the other ranks wait after the time limit, so that rank 0 can write what there is.
_GRACE = 10.0
_T = TypeVar("_T")


class Verdict(StrEnum):
    """The result of a check. NOT_HERE: what it checks does not exist on this machine."""

    OK = "ok"
    PROBLEM = "problem"
    NOT_HERE = "not here"


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        name: what was checked.
        measured: the result in words.
        advice: for a problem, what to do about it.
        details: the result as numbers and texts, for doctor.json.
    """

    name: str
    verdict: Verdict
    measured: str
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What the checks run on.

    Attributes:
        run: the settings of a run; `run.model` is a model with weights once the check `model` has passed.
        shape: the sizes of the model; None if it cannot be read.
        scratch: a temporary folder that the ranks of a machine share.
        at_end: closes, after the last check, what must stay open until then, such as vLLM, which destroys the process
            group when it closes.
    """

    config: DoctorConfig
    run: RunConfig
    world: World
    shape: ModelShape | None
    scratch: Path
    at_end: ExitStack

    @property
    def response_tokens(self) -> int:
        """Tokens of a sampled response."""
        return self.config.response_tokens or RESPONSE_TOKENS[self.world.device.type]

    @property
    def fault(self) -> Fault:
        """The fault to put into the checked stack; it changes nothing if `fault` is not given."""
        return load(self.run.fault, self.run.group_size)

    def gather(self, value: _T) -> list[_T]:
        """`value` of every rank, in order of rank, on every rank. Checks use it in place of `world.gather`.

        Raises:
            OtherRanksFailed: a rank has left the check with an error, which it gathers in place of a value.
        """
        values = self.world.gather(value)
        if any(isinstance(one, Failure) for one in values):
            raise OtherRanksFailed(values)
        return values


class Failure(NamedTuple):
    """What a rank gathers in place of a value if its check raised an error."""

    row: Row


class OtherRanksFailed(Exception):
    """The check cannot go on, because other ranks have left it.

    Attributes:
        values: what every rank gathered, among them `Failure`s.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__("another rank failed")
        self.values = values


Check = Callable[[Context], Iterator[Row]]


def judged(name: str, is_good: bool, measured: str, advice: str, **details: Any) -> Row:
    """A row that is a problem unless `is_good`; the advice is kept for a problem only."""
    verdict = Verdict.OK if is_good else Verdict.PROBLEM
    return Row(name, verdict, measured, "" if is_good else advice, details)


def failed(name: str, error: Exception) -> Row:
    """The row of a check that raised an error."""
    text = str(error).strip() or "no message"
    advice = "the message says what failed; if it does not help, report it together with doctor.json"
    details = {"error": type(error).__name__, "message": text}
    return Row(name, Verdict.PROBLEM, f"{type(error).__name__}: {text.splitlines()[0][:300]}", advice, details)


def run_check(name: str, check: Check, context: Context, on_timeout: Callable[[list[Row]], None]) -> list[Row]:
    """The rows of a check, the same on every rank; all ranks call it.

    An error becomes a row. The checks' own rows are those of rank 0, which combine all ranks. If an error occurred on
    some ranks only, the row names them.

    Args:
        name: of the check, for the row of an error.
        check: yields rows; all ranks run it.
        context: of the check-up.
        on_timeout: called with the rows so far, on rank 0, if the check does not end within the time limit. The
            process ends afterwards, because a rank that waits for another cannot be interrupted.
    """
    world, rows, failure = context.world, [], None
    with _time_limit(name, context, rows, on_timeout):
        try:
            for row in check(context):
                rows.append(row)
            values = world.gather(None)
        except OtherRanksFailed as others:
            values = others.values
        except Exception as error:  # whatever a library raises is what this command is to report
            failure = Failure(failed(name, error))
            if world.size > 1:
                print(f"rank {world.rank}: {name}: {failure.row.measured}", file=sys.stderr, flush=True)
            values = world.gather(failure)
        rows = world.broadcast(rows)
    return [*rows, *_failures(name, values)]


def _failures(name: str, values: Sequence[Any]) -> Iterator[Row]:
    """A row for each error among what the ranks gathered, with the ranks that raised it unless all did."""
    failures = {rank: value.row for rank, value in enumerate(values) if isinstance(value, Failure)}
    where: dict[str, list[int]] = {}
    for rank, row in failures.items():
        where.setdefault(row.measured, []).append(rank)
    for ranks in where.values():
        of = "" if len(ranks) == len(values) else f" (rank {', '.join(map(str, ranks))})"
        yield replace(failures[ranks[0]], name=f"{name}{of}")


@contextmanager
def _time_limit(
    name: str, context: Context, rows: list[Row], on_timeout: Callable[[list[Row]], None]
) -> Iterator[None]:
    """End the process if the block does not end in time."""

    def end() -> None:
        if context.world.is_main:
            seconds = context.config.time_limit
            advice = (
                "if a rank printed an error above, fix that; otherwise start with NCCL_DEBUG=INFO and see where ranks "
                "wait for each other, or raise time_limit"
            )
            row = Row(name, Verdict.PROBLEM, f"it did not end within {seconds:g} s", advice, {"seconds": seconds})
            on_timeout([*rows, row])
        else:
            time.sleep(_GRACE)
        os._exit(1)

    timer = threading.Timer(context.config.time_limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def size_of(count: float) -> str:
    """Bytes in readable units."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
