"""Answers per second of `VerifierPool` against math-verify called in a plain loop, and errors of graders.

The loop does for every answer what math-verify's documentation shows: parse the ground truth, parse the response,
verify, with its own timeouts. Each case has its own pools and no problem twice, so no cache is used in two rounds.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.graders import accuracy
from experiments.bench.measure import Timing, interleaved, until_signal
from experiments.grid import markdown_table
from upge import config
from upge.data.files import read_file
from upge.errors import ConfigError
from upge.verify import Item, VerifierPool, last_boxed
from upge.verify.math import MathVerifier

SUMMARY = "answers per second of the verifier pool and of math-verify in a plain loop; errors of graders"
WITH_PEERS = True
POOLS = {"pool, 1 worker": 1, "pool, 2 workers": 2}
LOOP = "plain loop"
MOST_SHOWN = 12
"""Maximum number of listed answers on which loop and pool differ."""


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    folder: str = config.key("", "folder with math/train.parquet and gsm8k/train.jsonl; empty = synthetic answers")
    answers: int = config.key(
        0,
        "answers per round, without and with bombs; 0 = 5,000 of the folder or 400 synthetic ones",
        minimum=0,
        limit=10**6,
    )
    bombs: int = config.key(4, "bombs per round, in the case with bombs", minimum=0, limit=10**4)
    grouped: int = config.key(800, "answers per round in the case with groups", minimum=0, limit=10**6)
    group: int = config.key(8, "responses to one problem in that case", minimum=1, limit=4096)
    parsed: int = config.key(
        200, "answers per round in the case of answers that must be parsed", minimum=0, limit=10**6
    )
    rounds: int = config.key(
        5, "number of rounds, at least five; 0 = only the errors of graders", minimum=0, limit=1000
    )
    pairs: int = config.key(10_000, "generated pairs on which graders are compared; 0 = none", minimum=0, limit=10**6)
    time_limit: int = config.key(3, "seconds for one answer, for both pool and loop", minimum=1, limit=3600)

    @property
    def count(self) -> int:
        """Answers per round."""
        return self.answers or (5000 if self.folder else 400)


def run(settings: Settings) -> str:
    """A Markdown table of speeds with the answers on which the verdicts differ, and one of errors."""
    parts = [_speed(settings)] if settings.rounds else []
    return "\n\n".join([*parts, accuracy(settings.pairs)] if settings.pairs else parts)


def _speed(settings: Settings) -> str:
    header = ["answers", "with", "answers per second", "times the plain loop", "by CPU", "CPU ms per answer"]
    rows = []
    differing: dict[Item, tuple[float, float]] = {}
    checked: set[Item] = set()
    with until_signal() as ending:
        for name, rounds in cases(settings):
            timing, count = _measured(name, rounds, settings), len(rounds[0])
            for thing in timing.seconds:
                times = timing.against(thing, LOOP)
                rows.append([name, thing, timing.rate(thing, count), *times, timing.cost(thing, count)])
            complete = rounds[: len(timing.results[LOOP])]
            differing |= _differences(timing, complete)
            checked |= {item for items in complete for item in items}
            timing.check()
    return ending.finished("\n".join([markdown_table(header, rows), "", _summary(differing, len(checked), settings)]))


def cases(settings: Settings) -> Iterator[tuple[str, list[list[Item]]]]:
    """The cases: name, and the answers of each round."""
    every, bombs = single(settings.folder), itertools.cycle(BOMBS)
    plain = _rounds("answers", every, settings.count, settings.rounds)
    yield f"{settings.count:,}", plain
    bombed = [with_bombs(items, list(itertools.islice(bombs, settings.bombs))) for items in plain]
    yield f"{settings.count:,} and {settings.bombs} bombs", bombed
    groups = grouped(settings.folder, settings.group)
    name = f"{settings.grouped:,} in groups of {settings.group}"
    yield name, _rounds("grouped", groups, settings.grouped, settings.rounds)
    name = f"{settings.parsed:,} that must be parsed"
    yield name, _rounds("parsed", parsed(every), settings.parsed, settings.rounds)


def _measured(name: str, rounds: list[list[Item]], settings: Settings) -> Timing:
    def ask(pool: VerifierPool) -> Callable[[int], list[float]]:
        return lambda number: [verdict.reward for verdict in pool.score(rounds[number])]

    with ExitStack() as stack:
        things = {LOOP: lambda number: plain_loop(rounds[number], settings.time_limit)}
        for one, workers in POOLS.items():
            pool = stack.enter_context(VerifierPool("math", workers, settings.time_limit))
            pool.score([Item(r"\boxed{\frac{2}{4}}", "1/2")])  # start the processes
            things[one] = ask(pool)
        return interleaved(things, settings.rounds, label=name)


def plain_loop(items: Sequence[Item], limit: int) -> list[float]:
    """The rewards of math-verify, used as in its documentation."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rewards = []
    for item in items:
        gold = parse(f"${item.answer}$", parsing_timeout=limit)
        given = parse(item.response, parsing_timeout=limit)
        rewards.append(float(verify(gold, given, timeout_seconds=limit)))
    return rewards


def _differences(timing: Timing, rounds: list[list[Item]]) -> dict[Item, tuple[float, float]]:
    """The answers on which pool and loop differ, with both rewards.

    Raises:
        AssertionError: the pools differ from each other.
    """
    differing = {}
    for number, items in enumerate(rounds):
        of_loop, *of_pools = (timing.results[name][number] for name in timing.results)
        if any(rewards != of_pools[0] for rewards in of_pools):
            raise AssertionError("the verdicts of a pool depend on the number of its workers")
        differing |= {i: (a, b) for i, a, b in zip(items, of_loop, of_pools[0], strict=True) if a != b}
    return differing


def _summary(differing: dict[Item, tuple[float, float]], checked: int, settings: Settings) -> str:
    source = "MATH's and GSM8K's training sets" if settings.folder else "made-up answers"
    lines = [
        f"Median and range of {settings.rounds} rounds, answers of {source}, half of them wrong; time limit "
        f"{settings.time_limit} s. Of {checked} different responses the loop and the pool judge {len(differing)} "
        f"differently{':' if differing else '.'}",
    ]
    pairs = {(i.answer, last_boxed(i.response) or ""): rewards for i, rewards in differing.items()}
    if pairs:
        shown = [
            [f"`{_cell(answer)}`", f"`{_cell(box)}`", f"{loop:g}", f"{pool:g}"]
            for (answer, box), (loop, pool) in list(pairs.items())[:MOST_SHOWN]
        ]
        lines += ["", markdown_table(["ground truth", "answer", "plain loop", "pool"], shown)]
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


EVIDENT_BOMBS = (r"9^{9^{9^9}}", r"10^{10^{10^{10}}}", r"(10^{10})!", r"\binom{10^9}{5\cdot 10^8}", r"42!!!!!!")
"""Answers that cannot be evaluated, and whose magnitude shows that they are not the ground truth."""
HIDDEN_BOMBS = (r"i^{9^{9^9}}", r"\frac{(10^9)!}{(10^9-1)!}", r"(-1)^{9^{9^9}}", r"\{9^{9^{9^9}},2\}", r"1^{9^{9^9}}")
"""Answers that cannot be evaluated in time, and whose magnitude shows nothing."""
BOMBS = tuple(bomb for pair in zip(EVIDENT_BOMBS, HIDDEN_BOMBS, strict=True) for bomb in pair)
MOST_WRONG = 4
"""Maximum number of different wrong answers in a group."""


def single(folder: str) -> list[Item]:
    """Each solution with its own ground truth and with another one, in random order."""
    solved = solutions(folder)
    items = []
    for number, (prompt, solution, answer) in enumerate(solved):
        _, other, theirs = solved[(number * 7 + 11) % len(solved)]
        items.append(Item(solution, answer, prompt))
        if theirs != answer:
            items.append(Item(other, answer, prompt))
    random.Random(0).shuffle(items)
    return items


def grouped(folder: str, size: int) -> list[Item]:
    """Groups of `size` responses to one problem each, one after the other."""
    chance, solved = random.Random(0), solutions(folder)
    chance.shuffle(solved)
    items = []
    for prompt, solution, answer in solved:
        wrong = [text for _, text, theirs in chance.sample(solved, chance.randint(1, MOST_WRONG)) if theirs != answer]
        right = chance.randint(0, size) if wrong else size
        weights = [0.5**rank for rank in range(len(wrong))]
        texts = [solution] * right + (chance.choices(wrong, weights, k=size - right) if wrong else [])
        chance.shuffle(texts)
        items += [Item(f"Attempt {number}. {text}", answer, prompt) for number, text in enumerate(texts, 1)]
    return items


def parsed(items: list[Item]) -> list[Item]:
    """The answers that a comparison of texts or numbers does not decide."""
    verifier = MathVerifier()
    given = [verifier.extract(item.response) for item in items]
    return [
        i for i, text in zip(items, given, strict=True) if text and verifier.glance(text, i.answer, i.prompt) is None
    ]


def with_bombs(items: list[Item], bombs: list[str]) -> list[Item]:
    """The answers with bombs spread among them, as answers to another problem."""
    mixed = list(items)
    for number, bomb in enumerate(bombs):
        mixed.insert((2 * number + 1) * len(items) // (2 * len(bombs)), Item(rf"\boxed{{{bomb}}}", "3.5"))
    return mixed


def solutions(folder: str) -> list[tuple[str, str, str]]:
    """(prompt, solution with a box, ground truth) of each problem, synthetic without a folder.

    Raises:
        ConfigError: the files do not exist.
    """
    return list(_real(Path(folder).expanduser()) if folder else _made_up())


def _real(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The problems of MATH and GSM8K, alternately."""
    math, gsm8k = folder / "math" / "train.parquet", folder / "gsm8k" / "train.jsonl"
    for path in (math, gsm8k):
        if not path.is_file():
            raise ConfigError(f"folder: there is no file '{path}'; give the folder that holds it, or none")
    of_math, of_gsm8k = ([record.values for record in read_file(path)] for path in (math, gsm8k))
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
