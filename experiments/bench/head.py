"""The output head: log-probs, entropies and both gradients, against the peers and against a lower bound.

Time is measured relative to the floor, three matrix products of the same shapes and dtype. Memory is measured in fresh
processes, as the peak of a head beyond its inputs and the two gradients. Before anything is measured, each head's
results are compared with a float64 solution. On a CUDA device the bench synchronizes after each head, but it was never
run on one; for comparison, an H200 reaches about 790 TFLOP/s and 4.3 TB/s in bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.bench import peers
from experiments.bench.heads import FLOOR, HEADS, NAIVE, ONE_PASS, OURS, Head, Problem, floor, heads, reference
from experiments.bench.measure import Spread, Timing, in_fresh_process, interleaved, peak, until_signal, verdict
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError

SUMMARY = "the output head's log-probs, entropies and gradients: time against three matrix products, memory; with peers"
WITH_PEERS = True
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (3e-2, 0.15)}
"""dtype → tolerance of a gradient, relative to its largest entry, and of a log-prob or an entropy, in nats."""
MOST_TIME, LEAST_SAVING = 1.15, 20
"""Goals: time relative to the floor, and the factor by which memory is smaller than that of full logits."""


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    tokens: int = config.key(512, "N of the time measurement", minimum=1, limit=10**6)
    width: int = config.key(896, "D", minimum=1, limit=10**5)
    vocabularies: str = config.key("32000,151936", "values of V, separated by commas")
    dtypes: str = config.key("float32,bfloat16", "float32 or bfloat16, or both separated by a comma")
    rounds: int = config.key(5, "number of rounds, at least five", minimum=0, limit=1000)
    threads: int = config.key(0, "threads of torch; 0 = torch's default", minimum=0, limit=1024)
    memory_tokens: int = config.key(
        4096, "N of the memory measurement with the last V, about 12·N·V bytes; 0 = none", minimum=0, limit=10**6
    )
    device: str = config.key("auto", "cpu, cuda, or auto")


def run(settings: Settings) -> str:
    """Markdown tables of time and memory, and whether the goals were reached."""
    vocabularies, dtypes, device = _read(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    header = ["vocabulary", "dtype", "head", "seconds", "times the floor", "the same by CPU", "ours, one pass, is"]
    rows, goals, memory = [], [], []
    with until_signal() as ending:
        for vocabulary, dtype in itertools.product(vocabularies, dtypes):
            timing, errors = _timed(settings, vocabulary, dtype, device)
            rows += _rows(timing, errors, vocabulary, dtype)
            goals.append(_goals(timing, vocabulary, dtype))
            timing.check()
        if settings.memory_tokens:
            lines, signal = _memory(settings, vocabularies[-1], dtypes, device)
            memory = ["", *lines]
            if signal is not None:
                raise signal
    threads = "one CUDA device" if device == "cuda" else f"{torch.get_num_threads()} threads"
    about = (
        f"Median and range of {settings.rounds} rounds; N = {settings.tokens}, D = {settings.width}, {threads}. Liger "
        "and cut-cross-entropy do not compute entropies. Off by: the largest difference of an entry of a gradient from "
        f"that of a float64 solution, relative to the largest entry. {peers.summary()}"
    )
    lines = [markdown_table([*header, "gradient off by"], rows), "", about, "", *goals, *memory]
    return ending.finished("\n".join(lines))


def _read(settings: Settings) -> tuple[list[int], list[str], str]:
    vocabularies = [part.strip() for part in settings.vocabularies.split(",")]
    if not all(part.isdecimal() and len(part) < 8 and int(part) > 1 for part in vocabularies):
        raise ConfigError(
            f"vocabularies: found '{settings.vocabularies}'; give sizes below 10 million with commas, as 32000,50257"
        )
    dtypes = [part.strip() for part in settings.dtypes.split(",")]
    if not set(dtypes) <= set(TOLERANCES):
        raise ConfigError(f"dtypes: found '{settings.dtypes}'; give {' or '.join(TOLERANCES)}, or both with a comma")
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: found '{settings.device}'; give cpu, cuda or auto")
    return [int(part) for part in vocabularies], dtypes, device


# Time.


def _timed(settings: Settings, vocabulary: int, dtype: str, device: str) -> tuple[Timing, dict[str, float]]:
    """The timing of one vocabulary and dtype, and the error of each head's gradients."""
    problem = Problem.made(settings.tokens, vocabulary, settings.width, dtype, device)
    errors = compare(problem, heads(), *TOLERANCES[dtype])

    def call(head: Callable[[Problem], object]) -> Callable[[int], None]:
        def turn(number: int) -> None:
            head(problem)
            problem.clear()
            if device == "cuda":
                torch.cuda.synchronize()

        return turn

    least = floor(problem)
    calls = {FLOOR: call(lambda _: least()), **{name: call(one) for name, one in heads().items()}}
    return interleaved(calls, settings.rounds, label=f"V = {vocabulary:,}, {dtype}"), errors


def _rows(timing: Timing, errors: dict[str, float], vocabulary: int, dtype: str) -> list[list[object]]:
    rows = []
    for name, seconds in timing.seconds.items():
        ahead = "" if name in (FLOOR, ONE_PASS) else f"{timing.speedup(ONE_PASS, name)} × as fast"
        error = f"{errors[name]:.0e}" if name in errors else ""
        times = timing.against(FLOOR, name)
        rows.append([f"{vocabulary:,}", dtype, name, Spread.of(seconds), *times, ahead, error])
    return rows


def compare(problem: Problem, every: dict[str, Head], tolerance: float, nats: float) -> dict[str, float]:
    """Head → error of its gradients. This also compiles and loads everything.

    Raises:
        AssertionError: gradients, log-probs or entropies differ from the float64 solution.
    """
    expected, errors = reference(problem), {}
    for name, head in every.items():
        problem.clear()
        result = head(problem)
        gradients = [(problem.hidden.grad, expected.hidden), (problem.weight.grad, expected.weight)]
        errors[name] = checked(gradients, tolerance, name)
        for kind in ("logprobs", "entropies"):
            values = getattr(result, kind)
            gap = 0.0 if values is None else float((values.double() - getattr(expected, kind)).abs().max())
            if not gap <= nats:
                raise AssertionError(f"{name}: {kind} are off by {gap:.1e} nats, tolerated are {nats:g}")
    problem.clear()
    return errors


def _goals(timing: Timing, vocabulary: int, dtype: str) -> str:
    times = timing.speedup(FLOOR, ONE_PASS).median
    behind = [n for n in timing.seconds if n not in (FLOOR, NAIVE, *OURS) and timing.speedup(ONE_PASS, n).median < 1.0]
    ahead = f"ahead of every peer: {verdict(not behind)}" + (f" (behind {', '.join(behind)})" if behind else "")
    return (
        f"- V = {vocabulary:,}, {dtype}: goal at most {MOST_TIME} times the floor: {times:.2f}, "
        f"{verdict(times <= MOST_TIME)}; goal {ahead}."
    )


# Memory.


def head_memory(settings: Settings, vocabulary: int, dtype: str, device: str, name: str) -> int:
    """The peak bytes of a head beyond inputs, weight and their gradients; runs in a separate process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    problem = Problem.made(settings.memory_tokens, vocabulary, settings.width, dtype, device)
    head = HEADS[name]
    # Warm up, so that code and permanent buffers of libraries do not count.
    head(problem.small())
    problem.clear()
    taken = peak(lambda: head(problem))
    return taken - sum(leaf.grad.nbytes for leaf in (problem.hidden, problem.weight))


def _memory(
    settings: Settings, vocabulary: int, dtypes: list[str], device: str
) -> tuple[list[str], BaseException | None]:
    """A table with the goals below it, and what a signal raised, or None."""
    rows, goals, signal = [], [], None
    for dtype in dtypes:
        taken = {}
        for name in heads():
            bytes_taken, signal = in_fresh_process(head_memory, settings, vocabulary, dtype, device, name)
            if signal is not None:
                break
            taken[name] = bytes_taken
        for name, bytes_taken in taken.items():
            naive = taken.get(NAIVE)
            share = f"1/{naive / max(bytes_taken, 1):.1f}" if bytes_taken is not None and naive else ""
            rows.append([dtype, name, "killed" if bytes_taken is None else f"{bytes_taken / 2**20:,.0f}", share])
        if taken.get(ONE_PASS) and taken.get(NAIVE):
            saving = taken[NAIVE] / taken[ONE_PASS]
            goals.append(
                f"- {dtype}: goal at most 1/{LEAST_SAVING}: 1/{saving:.1f}, {verdict(saving >= LEAST_SAVING)}."
            )
        if signal is not None:
            break
    about = (
        f"Memory at N = {settings.memory_tokens:,}, V = {vocabulary:,}, D = {settings.width}: the peak resident memory "
        "of a fresh process during the head, minus the memory before and the two gradients, which every head returns "
        "in the inputs' dtype."
    )
    header = ["dtype", "head", "MiB beyond inputs and gradients", "of the full logits'"]
    return [markdown_table(header, rows), "", about, "", *goals], signal


# Gradients.


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two entries, relative to the largest expected entry."""
    # In blocks, because a float64 gradient of an output embedding is large and the check must not need much more.
    blocks = zip(*(torch.atleast_1d(tensor.detach()).split(4096) for tensor in (actual, expected)), strict=True)
    gaps = torch.stack([(a.to(expected.dtype) - b).abs().max() for a, b in blocks])
    return float(gaps.max()) / (float(expected.abs().max()) or 1.0)


def checked(pairs: Iterable[tuple[Tensor | None, Tensor]], tolerance: float, who: str) -> float:
    """The largest `difference` over (actual, expected) pairs.

    Raises:
        AssertionError: a gradient is missing, has another shape, is not finite, or exceeds `tolerance`.
    """
    worst = 0.0
    for actual, expected in pairs:
        if actual is None or actual.shape != expected.shape:
            raise AssertionError(f"{who}: a gradient is missing or of another shape than {tuple(expected.shape)}")
        gap = difference(actual, expected)
        if not gap <= tolerance:
            raise AssertionError(f"{who}: a gradient off by {gap:.1e} of its largest entry; tolerated is {tolerance:g}")
        worst = max(worst, gap)
    return worst
