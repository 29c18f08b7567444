"""Measures alternatives against each other: interleaved in one process, in several rounds, with ratios and ranges.

Two runs one after the other compare the state of the machine as much as the alternatives. Here all alternatives run in
each round, in an order that changes from round to round, and ratios are taken within a round. Besides wall-clock
seconds it counts CPU seconds of this process and its children, which depend less on other load.

Memory on a CPU: torch has no counter, and its hooks do not see the buffers of its matrix products. So this uses the
kernel's numbers: the peak resident memory of the process (VmHWM, which can be reset) minus the memory before. On CUDA
it uses torch's counter. Each alternative is measured in a fresh process.

A line on standard error reports each round as it ends. SIGINT or SIGTERM ends a bench with a table of the rounds that
were complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.cli import Stopped
from upge.errors import ConfigError

FEWEST_ROUNDS = 5
_SIGNALS = (KeyboardInterrupt, Stopped)
"""What a signal raises in a bench."""
T = TypeVar("T")


class Interrupted(Exception):
    """A signal ended a bench.

    Attributes:
        table: the Markdown of what was measured.
        signal: what the signal raised.
    """

    def __init__(self, table: str, signal: BaseException) -> None:
        super().__init__(table)
        self.table, self.signal = table, signal


@dataclass
class Ending:
    """How a bench ended.

    Attributes:
        signal: what a signal raised; None if the bench ran to its end.
    """

    signal: BaseException | None = None

    def finished(self, markdown: str) -> str:
        """The Markdown of a bench that ran to its end.

        Raises:
            Interrupted: a signal ended it; the exception holds the Markdown.
        """
        if self.signal is not None:
            note = "Interrupted: the last case may have fewer rounds, and the cases after it were not measured."
            raise Interrupted(f"{markdown}\n\n{note}", self.signal)
        return markdown


@contextlib.contextmanager
def until_signal() -> Iterator[Ending]:
    """Leave the block at SIGINT or SIGTERM and note the signal."""
    ending = Ending()
    try:
        yield ending
    except _SIGNALS as signal:
        ending.signal = signal


@dataclass(frozen=True)
class Spread:
    """The median of a number over the rounds, its minimum and its maximum."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of these values."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def ratio(cls, above: Iterable[float], below: Iterable[float]) -> Spread:
        """The spread of the ratios within each round."""
        return cls.of(a / b for a, b in zip(above, below, strict=True))

    def __format__(self, form: str) -> str:
        """'median (low to high)', each in the format `form`, such as '.2f'; three digits by default."""
        median, low, high = (
            format(value, form or (".0f" if value >= 100 else ".3g")) for value in (self.median, self.low, self.high)
        )
        return f"{median} ({low} to {high})"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Timing:
    """The measurements of several alternatives.

    Attributes:
        seconds: name → wall-clock seconds of each round.
        cpu: name → CPU seconds of each round, over all processes.
        results: name → what the call returned in each round.
        signal: what a signal raised before the last round was complete; None if all rounds are.
    """

    seconds: Mapping[str, tuple[float, ...]]
    cpu: Mapping[str, tuple[float, ...]]
    results: Mapping[str, tuple[Any, ...]]
    signal: BaseException | None = None

    def check(self) -> None:
        """Raise again what a signal raised. Call this when the rounds that are complete have been evaluated."""
        if self.signal is not None:
            raise self.signal

    def rate(self, name: str, count: int) -> Spread:
        """Units per second, if every round has `count` units."""
        return Spread.of(count / seconds for seconds in self.seconds[name])

    def cost(self, name: str, count: int) -> Spread:
        """CPU milliseconds per unit."""
        return Spread.of(1000.0 * seconds / count for seconds in self.cpu[name])

    def speedup(self, name: str, base: str) -> Spread:
        """How many times as fast as `base`: the ratio of seconds within each round."""
        return Spread.ratio(self.seconds[base], self.seconds[name])

    def thrift(self, name: str, base: str) -> Spread:
        """How many times as much CPU `base` takes, within each round; steadier than `speedup` on a busy machine."""
        return Spread.ratio(self.cpu[base], self.cpu[name])

    def against(self, name: str, base: str) -> list[object]:
        """Two cells of a table, speedup and thrift; 1 for `base` itself."""
        return [1, 1] if name == base else [self.speedup(name, base), self.thrift(name, base)]


def cpu_seconds() -> float:
    """CPU seconds of this process, its live descendants and the children they have waited for (Linux only)."""
    children: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append((int(entry.name), sum(map(int, fields[11:15]))))
    own = os.times()
    total, waiting = own.children_user + own.children_system, [os.getpid()]
    while waiting:
        for pid, ticks in children.get(waiting.pop(), []):
            total += ticks / os.sysconf("SC_CLK_TCK")
            waiting.append(pid)
    return time.process_time() + total


def interleaved(
    things: Mapping[str, Callable[[int], Any]],
    rounds: int = FEWEST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = cpu_seconds,
    label: str = "",
) -> Timing:
    """Call everything once per round with the round's number, from 0; the order rotates from round to round.

    A signal ends it; if a round is complete by then, the result has the complete rounds and the signal, for
    `Timing.check`. `label` begins the line of each round.

    Raises:
        ConfigError: fewer than five rounds, which are too few for a median.
    """
    if rounds < FEWEST_ROUNDS:
        raise ConfigError(f"rounds: found {rounds}; give at least {FEWEST_ROUNDS}")

    def one_round(number: int) -> dict[str, tuple[float, float, Any]]:
        measured = {}
        for name in rotated(things, number):
            cpu_begin, begin = cpu_clock(), clock()
            result = things[name](number)
            measured[name] = (clock() - begin, cpu_clock() - cpu_begin, result)
        return measured

    def line(measured: dict[str, tuple[float, float, Any]]) -> str:
        return ", ".join(f"{name} {measured[name][0]:.3g} s" for name in things)

    complete, stop = in_rounds(one_round, rounds, line, label)
    columns = [{name: tuple(measured[name][i] for measured in complete) for name in things} for i in range(3)]
    return Timing(*columns, stop)


def in_rounds(
    one_round: Callable[[int], T], count: int, line: Callable[[T], str], label: str = ""
) -> tuple[list[T], BaseException | None]:
    """Call `one_round` with 0, 1, ... and print a line after each call.

    Returns:
        The results of the complete rounds, and what a signal raised, or None. With no complete round it is raised.
    """
    results: list[T] = []
    for number in range(count):
        try:
            results.append(one_round(number))
        except _SIGNALS as signal:
            if not results:
                raise
            return results, signal
        begin = f"{label}: round" if label else "round"
        print(f"{begin} {number + 1} of {count}: {line(results[-1])}", file=sys.stderr, flush=True)
    return results, None


def rotated(things: Iterable[Any], number: int) -> list[Any]:
    """The things in an order that changes from round to round; `-number` restores the order of round `number`."""
    every = list(things)
    first = number % len(every)
    return every[first:] + every[:first]


def verdict(reached: bool) -> str:
    """Whether a goal was reached, as a table or a note says it."""
    return "reached" if reached else "**missed**"


def peak(call: Callable[[], object]) -> int:
    """The peak memory of this process during `call` minus the memory before, in bytes; Linux only.

    Call this early in a process, because memory that was freed but not returned to the kernel hides new allocations.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def kilobytes(name: str) -> int:
        return int(re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
    """(result, signal) of a module's function in a new process.

    The result is None if the process was killed, as when memory runs out. A signal is passed on, so that the function
    can return what it has measured so far, and is returned as the second value, which is None without a signal.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    stop: BaseException | None = None
    try:
        result = _received(receiver)
    except _SIGNALS as raised:
        stop = raised
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        result = _received(receiver)
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result, stop


def _received(receiver: Connection) -> Any:
    """What the other end sends; None if it ends without."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # In a session of its own, so that a terminal's interrupt reaches it only once, through the parent.
    os.setsid()
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)
