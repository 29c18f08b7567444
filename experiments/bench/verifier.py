"""Answers per second: `VerifierPool` with one and with two workers against math-verify called in a plain loop.

The loop does for every answer what its documentation shows: parse the ground truth, parse the response, verify, with
its own time-outs. Each case has pools of its own, and no problem twice, so that no cache serves two rounds.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from experiments.bench import answers as made
from experiments.bench.measure import Timing, interleaved
from upge.errors import ConfigError
from upge.verify import Item, VerifierPool, last_boxed

SUMMARY = "answers per second: the verifier pool against math-verify in a plain loop, without and with bombs"
POOLS = {"pool, 1 worker": 1, "pool, 2 workers": 2}
LOOP = "plain loop"
MOST_SHOWN = 12
"""Answers that are listed of those on which loop and pool differ."""


@dataclass(frozen=True)
class Settings:
    """Keys of this bench.

    Fields:
        folder: with math/train.parquet and gsm8k/train.jsonl; empty for made-up answers.
        answers: per round, without and with bombs; 0 for 5,000 of the folder or 400 made-up ones.
        bombs: per round, where there are any.
        grouped: answers per round of those in groups.
        group: responses to one problem, of those.
        parsed: answers per round of those that no comparison of texts decides.
        rounds: at least five.
        time_limit: seconds for one answer, of the pool and of the loop alike.
    """

    folder: str = ""
    answers: int = 0
    bombs: int = 4
    grouped: int = 800
    group: int = 8
    parsed: int = 200
    rounds: int = 5
    time_limit: int = 3

    @property
    def count(self) -> int:
        """Answers per round."""
        return self.answers or (5000 if self.folder else 400)


def run(settings: Settings) -> str:
    """A Markdown table, and where the verdicts differ."""
    header = ["answers", "with", "answers per second", "times the plain loop", "by CPU", "CPU ms per answer"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    differing: dict[Item, tuple[float, float]] = {}
    checked: set[Item] = set()
    for name, rounds in cases(settings):
        timing = _measured(rounds, settings)
        lines += [_row(name, thing, timing, len(rounds[0])) for thing in timing.seconds]
        differing |= _differences(timing, rounds)
        checked |= {item for items in rounds for item in items}
    return "\n".join([*lines, "", _told(differing, len(checked), settings)])


def cases(settings: Settings) -> Iterator[tuple[str, list[list[Item]]]]:
    """What is measured, and the answers of each round."""
    every, bombs = made.single(settings.folder), itertools.cycle(made.BOMBS)
    plain = _rounds("answers", every, settings.count, settings.rounds)
    yield f"{settings.count:,}", plain
    bombed = [made.with_bombs(items, list(itertools.islice(bombs, settings.bombs))) for items in plain]
    yield f"{settings.count:,} and {settings.bombs} bombs", bombed
    groups = made.grouped(settings.folder, settings.group)
    name = f"{settings.grouped:,} in groups of {settings.group}"
    yield name, _rounds("grouped", groups, settings.grouped, settings.rounds)
    name = f"{settings.parsed:,} that have to be parsed"
    yield name, _rounds("parsed", made.parsed(every), settings.parsed, settings.rounds)


def _measured(rounds: list[list[Item]], settings: Settings) -> Timing:
    def ask(pool: VerifierPool) -> Callable[[int], list[float]]:
        return lambda number: [verdict.reward for verdict in pool.score(rounds[number])]

    with ExitStack() as stack:
        things = {LOOP: lambda number: plain_loop(rounds[number], settings.time_limit)}
        for name, workers in POOLS.items():
            pool = stack.enter_context(VerifierPool("math", workers, settings.time_limit))
            pool.score([Item(r"\boxed{\frac{2}{4}}", "1/2")])  # the processes are there
            things[name] = ask(pool)
        return interleaved(things, settings.rounds)


def plain_loop(items: Sequence[Item], limit: int) -> list[float]:
    """math-verify as its documentation uses it."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rewards = []
    for item in items:
        gold = parse(f"${item.answer}$", parsing_timeout=limit)
        given = parse(item.response, parsing_timeout=limit)
        rewards.append(float(verify(gold, given, timeout_seconds=limit)))
    return rewards


def _row(case: str, thing: str, timing: Timing, count: int) -> str:
    times = ["1"] * 2 if thing == LOOP else [timing.speedup(thing, LOOP), timing.thrift(thing, LOOP)]
    return f"| {case} | {thing} | {timing.rate(thing, count)} | {times[0]} | {times[1]} | {timing.cost(thing, count)} |"


def _differences(timing: Timing, rounds: list[list[Item]]) -> dict[Item, tuple[float, float]]:
    """Answers on which pool and loop do not agree, with the rewards of both; the pools must agree among themselves."""
    found = {}
    for number, items in enumerate(rounds):
        of_loop, *of_pools = (timing.results[name][number] for name in timing.results)
        if any(rewards != of_pools[0] for rewards in of_pools):
            raise AssertionError("the verdicts of a pool depend on the number of its workers")
        found |= {i: (a, b) for i, a, b in zip(items, of_loop, of_pools[0], strict=True) if a != b}
    return found


def _told(differing: dict[Item, tuple[float, float]], checked: int, settings: Settings) -> str:
    source = "MATH's and GSM8K's training sets" if settings.folder else "made-up answers"
    lines = [
        f"Median and range of {settings.rounds} rounds, answers of {source}, half of them wrong; time limit "
        f"{settings.time_limit} s. Of {checked} different responses the loop and the pool judge {len(differing)} "
        f"differently{':' if differing else '.'}",
    ]
    pairs = {(i.answer, last_boxed(i.response) or ""): rewards for i, rewards in differing.items()}
    if pairs:
        lines += ["", "| ground truth | answer | plain loop | pool |", "|---|---|---|---|"]
    for (answer, box), (loop, pool) in list(pairs.items())[:MOST_SHOWN]:
        lines.append(f"| `{_cell(answer)}` | `{_cell(box)}` | {loop:g} | {pool:g} |")
    if len(pairs) > MOST_SHOWN:
        more = sum(pool > loop for loop, pool in pairs.values())
        lines += ["", f"These are the first {MOST_SHOWN} of {len(pairs)} different pairs; of all of them the pool "
                  f"takes {more} for right, the loop the rest."]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "¦").split())[:100]


def _rounds(key: str, items: list[Item], count: int, rounds: int) -> list[list[Item]]:
    if len(items) < count * rounds:
        raise ConfigError(
            f"{key}: {count} in each of {rounds} rounds are more than there are ({len(items)}); give a smaller "
            f"{key}=, or another folder"
        )
    return [items[number * count : (number + 1) * count] for number in range(rounds)]
