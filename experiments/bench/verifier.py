"""Answers per second: `VerifierPool` with one and two workers against math-verify called in a plain loop.

The loop does for every answer what its documentation shows: parse the ground truth, parse the response, verify, with
its own time-outs. The answers are the human solutions of MATH and GSM8K, each once against its own ground truth and
once, with the end of another problem's solution, against that of a different problem. Rounds use different answers, so
that no cache serves twice.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.measure import Timing, interleaved
from upge.errors import ConfigError
from upge.verify import Item, VerifierPool, last_boxed
from upge.verify.math import MathVerifier

SUMMARY = "answers per second: the verifier pool against math-verify in a plain loop, without and with bombs"
BOMBS = (r"9^{9^{9^9}}", r"10^{10^{10^{10}}}", r"(10^{10})!", r"\binom{10^9}{5\cdot 10^8}", r"9^{9^{9^{9}}}+1")
POOLS = {"pool, 1 worker": 1, "pool, 2 workers": 2}
LOOP = "plain loop"
MOST_SHOWN = 12
"""Answers that are listed of those on which loop and pool differ."""


@dataclass(frozen=True)
class Settings:
    """Keys of this bench.

    Fields:
        folder: with math/train.parquet and gsm8k/train.jsonl; empty for made-up answers.
        answers: per round.
        parsed: answers per round of those that no comparison of texts decides.
        bombs: per round, among `parsed` answers.
        rounds: at least five.
        time_limit: seconds for one answer, of the pool and of the loop alike.
    """

    folder: str = ""
    answers: int = 400
    parsed: int = 200
    bombs: int = 2
    rounds: int = 5
    time_limit: int = 5


def run(settings: Settings) -> str:
    """A Markdown table, and where the verdicts differ."""
    cases = _cases(settings)
    header = ["answers", "with", "answers per second", "times the plain loop", "CPU ms per answer"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    differing: dict[Item, tuple[float, float]] = {}
    with ExitStack() as stack:
        pools = {n: stack.enter_context(VerifierPool("math", w, settings.time_limit)) for n, w in POOLS.items()}
        for pool in pools.values():
            pool.score([Item(r"\boxed{\frac{2}{4}}", "1/2")])  # the processes are there
        for name, rounds in cases.items():
            timing = interleaved(_things(pools, rounds, settings.time_limit), settings.rounds)
            lines += [_row(name, thing, timing, len(rounds[0])) for thing in timing.seconds]
            differing |= _differences(timing, rounds)
    checked = len({item for rounds in cases.values() for items in rounds for item in items})
    return "\n".join([*lines, "", _told(differing, checked, settings)])


def _cases(settings: Settings) -> dict[str, list[list[Item]]]:
    """What is measured → the answers of each round, none of them twice."""
    every, verifier = _answers(settings), MathVerifier()
    hard = [item for item in every if _needs_parsing(verifier, item)]
    parsed = _rounds(hard, settings.parsed, 2 * settings.rounds)
    bombs = itertools.cycle(BOMBS)
    with_bombs = [
        _mixed(items, [Item(rf"\boxed{{{next(bombs)}}}", "3.5") for _ in range(settings.bombs)])
        for items in parsed[settings.rounds :]
    ]
    return {
        "all answers": _rounds(every, settings.answers, settings.rounds),
        "answers that have to be parsed": parsed[: settings.rounds],
        f"others of these, with {settings.bombs} bombs a round": with_bombs,
    }


def _things(pools: dict[str, VerifierPool], rounds: list[list[Item]], limit: int) -> dict[str, Callable]:
    def ask(pool: VerifierPool) -> Callable[[int], list[float]]:
        return lambda number: [verdict.reward for verdict in pool.score(rounds[number])]

    return {LOOP: lambda number: plain_loop(rounds[number], limit), **{name: ask(pool) for name, pool in pools.items()}}


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
    times = "1" if thing == LOOP else str(timing.speedup(thing, LOOP))
    return f"| {case} | {thing} | {timing.rate(thing, count)} | {times} | {timing.cost(thing, count)} |"


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
        f"Median and range of {settings.rounds} rounds with {settings.answers} and {settings.parsed} answers of "
        f"{source}, half of them wrong; time limit {settings.time_limit} s. Of {checked} different answers the loop "
        f"and the pool judge {len(differing)} differently{':' if differing else '.'}",
    ]
    if differing:
        lines += ["", "| ground truth | answer | plain loop | pool |", "|---|---|---|---|"]
    for item, (loop, pool) in list(differing.items())[:MOST_SHOWN]:
        box = last_boxed(item.response) or ""
        lines.append(f"| `{_cell(item.answer)}` | `{_cell(box)}` | {loop:g} | {pool:g} |")
    if len(differing) > MOST_SHOWN:
        more = sum(pool > loop for loop, pool in differing.values())
        lines += ["", f"These are the first {MOST_SHOWN}; of all the pool takes {more} for right, the loop the rest."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "¦").split())[:100]


def _needs_parsing(verifier: MathVerifier, item: Item) -> bool:
    given = verifier.extract(item.response)
    return bool(given) and verifier.glance(given, item.answer, item.prompt) is None


def _rounds(items: list[Item], count: int, rounds: int) -> list[list[Item]]:
    if len(items) < count * rounds:
        raise ConfigError(
            f"answers: {count} in each of {rounds} rounds are more than there are ({len(items)}); give smaller "
            "answers= and parsed=, or another folder"
        )
    return [items[number * count : (number + 1) * count] for number in range(rounds)]


def _mixed(items: list[Item], bombs: list[Item]) -> list[Item]:
    """The answers with the bombs spread among them."""
    mixed = list(items)
    for number, bomb in enumerate(bombs):
        mixed.insert((2 * number + 1) * len(items) // (2 * len(bombs)), bomb)
    return mixed


def _answers(settings: Settings) -> list[Item]:
    """Right and wrong ones of all kinds, in an order of chance that is always the same."""
    solved = list(_real(Path(settings.folder).expanduser()) if settings.folder else _made_up())
    items = []
    for number, (prompt, solution, answer) in enumerate(solved):
        _, other, theirs = solved[(number * 7 + 11) % len(solved)]
        items.append(Item(solution, answer, prompt))
        if theirs != answer:
            items.append(Item(other, answer, prompt))
    random.Random(0).shuffle(items)
    return items


def _real(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(prompt, solution with a box, ground truth) of MATH and GSM8K in turn.

    Raises:
        ConfigError: the files are not there.
    """
    import pyarrow.parquet

    math, gsm8k = folder / "math" / "train.parquet", folder / "gsm8k" / "train.jsonl"
    for path in (math, gsm8k):
        if not path.is_file():
            raise ConfigError(f"folder: there is no file '{path}'; give the folder that holds it, or none")
    of_math = pyarrow.parquet.read_table(math).to_pylist()
    of_gsm8k = [json.loads(line) for line in gsm8k.read_text("utf-8").split("\n") if line.strip()]
    for first, second in zip(of_math, of_gsm8k, strict=False):
        if first["answer"]:
            yield first["problem"], first["solution"], first["answer"]
        worked, _, number = (part.strip() for part in second["answer"].rpartition("####"))
        yield second["question"], rf"{worked} So it is $\boxed{{{number}}}$.", number


def _made_up() -> Iterator[tuple[str, str, str]]:
    """Fractions, roots, polynomials and numbers, each in another form than its ground truth."""
    for k in range(1, 1201):
        yield f"Problem {k}", rf"We find $\boxed{{\frac{{{2 * k}}}{{{2 * k + 4}}}}}$.", rf"\frac{{{k}}}{{{k + 2}}}"
        yield f"Problem {k}", rf"We find $\boxed{{(x+{k})^2}}$.", f"x^2+{2 * k}x+{k * k}"
        yield f"Problem {k}", rf"We find $\boxed{{\sqrt{{{k * k * 3}}}}}$.", rf"{k}\sqrt{{3}}"
        yield f"Problem {k}", rf"We find $\boxed{{{k}}}$.", f"{k}"
