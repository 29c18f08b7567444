"""Sums and differences at several levels of difficulty with worked solutions, generated from a seed."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from upge.checks import check_fields
from upge.data.splits import Problem, Splits, even_shares, interleaved
from upge.errors import ConfigError, nearest

#: The default levels, from easy to hard.
LEVELS = tuple(f"{n} numbers" for n in range(2, 7)) + tuple(f"{n} mixed" for n in range(3, 6))

Side = Literal["train", "evaluation"]

#: One in `EVALUATION_EVERY` problems is on the evaluation side.
EVALUATION_EVERY = 5

#: The largest size of a side, and the largest number.
MOST = 10**6

#: By how much the result of a wrong step can be off.
SLIPS = (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20)

_LEVEL = re.compile(r"([2-9]) (numbers|mixed)")


@dataclass(frozen=True)
class Arithmetic:
    r"""Problems such as `37+25-18=?`, with the demonstration `37+25=62`, `62-18=44`, `\boxed{44}` on three lines.

    The rejected response of a preference pair is such a solution with a mistake, see `flawed_solution`.

    A hash of a problem's sorted terms decides which side it is on (see `side`). Problems with the same terms, in any
    order, are therefore always on the same side, even in two data sets with other seeds and sizes.

    Attributes:
        levels: the difficulty levels, each "N numbers" (sums) or "N mixed" (with at least two differences, or one if N
            is 2), with N from 2 to 9. No running total is below zero.
        train_size, evaluation_size: number of problems on each side, divided evenly among the levels. If that leaves a
            remainder, the first levels get one problem more. The order interleaves the levels. A larger size keeps the
            problems of a smaller one.
        evaluation_levels: the levels of the evaluation side; None = `levels`.
        largest: the numbers are from 1 to `largest`.
        seed: another seed draws other problems.

    Raises:
        ConfigError: a level does not exist, a size or `largest` is out of range, or a level has too few different
            problems with numbers up to `largest`. The message names the key.
    """

    levels: Sequence[str] = LEVELS
    train_size: int = 512
    evaluation_size: int = 256
    largest: int = 49
    seed: int = 0
    evaluation_levels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for key in ("levels", "evaluation_levels"):
            levels = getattr(self, key)
            if levels is not None:
                object.__setattr__(self, key, (levels,) if isinstance(levels, str) else tuple(levels))
        check_fields(self)
        for key in ("levels", "evaluation_levels"):
            levels = getattr(self, key)
            if levels is not None:
                _check_levels(f"data.{key}", levels)
        for key, smallest in (("train_size", 1), ("evaluation_size", 1), ("largest", 2)):
            if getattr(self, key) < smallest:
                raise ConfigError(f"data.{key}: found {getattr(self, key)}; give a number of at least {smallest}")
            if getattr(self, key) > MOST:
                raise ConfigError(f"data.{key}: found {getattr(self, key)}; give a number of at most {MOST}")

    def load(self) -> Splits:
        """Draw the problems of both sides. Equal settings give equal problems in the same order."""
        evaluation_levels = self.levels if self.evaluation_levels is None else self.evaluation_levels
        return Splits(
            self._side("train", self.levels, self.train_size),
            self._side("evaluation", evaluation_levels, self.evaluation_size),
        )

    def _side(self, which: Side, levels: Sequence[str], size: int) -> tuple[Problem, ...]:
        shares = even_shares(size, len(levels))
        return interleaved([self._level(which, *one) for one in zip(levels, shares, strict=True)])

    def _level(self, which: Side, level: str, size: int) -> list[Problem]:
        rng = random.Random(f"{self.seed}/{which}/{level}")
        drawn: dict[tuple[int, ...], None] = {}
        # A size far beyond what a level has is refused at once, without drawing each problem a hundred times.
        share = 1 / EVALUATION_EVERY if which == "evaluation" else 1 - 1 / EVALUATION_EVERY
        fits = size <= 1.1 * share * _most_problems(level, self.largest) + 99
        for _ in range(100 * size + 1000 if fits else 0):
            if len(drawn) == size:
                return [as_problem(terms, level) for terms in drawn]
            terms = draw(rng, level, self.largest)
            if side(terms) == which:
                drawn.setdefault(terms)
        made = f"only {len(drawn)} of {size}" if fits else f"fewer than {size}"
        raise ConfigError(
            f"data.largest: numbers up to {self.largest} make {made} different {which} problems of '{level}'; raise "
            f"data.largest or lower data.{which}_size"
        )


def _check_levels(key: str, levels: Sequence[str]) -> None:
    if not levels or len(set(levels)) != len(levels):
        raise ConfigError(f"{key}: expected one or more distinct levels, found {list(levels)}")
    for level in levels:
        parse_level(level, key)


def parse_level(level: str, key: str = "data.levels") -> tuple[int, bool]:
    """(number of terms, whether there are differences) of a level.

    Raises:
        ConfigError: there is no such level; the message begins with `key`.
    """
    match = _LEVEL.fullmatch(level)
    if not match:
        raise ConfigError(
            f"{key}: '{level}' is not a level; expected 'N numbers' or 'N mixed' with N from 2 "
            f"to 9; {nearest(level, LEVELS)}"
        )
    return int(match[1]), match[2] == "mixed"


def _most_problems(level: str, largest: int) -> int:
    """An upper bound of the number of problems of a level."""
    count, differences = parse_level(level)
    return largest**count * 2 ** (differences * (count - 1))


def draw(rng: random.Random, level: str, largest: int) -> tuple[int, ...]:
    """The terms of one problem, on either side. Subtracted terms are negative."""
    count, differences = parse_level(level)
    while True:
        terms = [rng.randint(1, largest) for _ in range(count)]
        if differences:
            fewest = min(2, count - 1)
            for i in rng.sample(range(1, count), rng.randint(fewest, count - 1)):
                terms[i] = -terms[i]
        if all(sum(terms[:n]) >= 0 for n in range(2, count + 1)):
            return tuple(terms)


def side(terms: Sequence[int]) -> Side:
    """The side of every problem with these terms, in any order."""
    digest = hashlib.sha256(" ".join(map(str, sorted(terms))).encode()).digest()
    return "evaluation" if int.from_bytes(digest[:8], "big") % EVALUATION_EVERY == 0 else "train"


def as_problem(terms: Sequence[int], level: str) -> Problem:
    """The problem with these terms. Its demonstration is a worked solution, its rejected response a flawed one."""
    prompt = question(terms)
    return Problem(
        id=f"{level}/{prompt}",
        prompt=prompt,
        answer=str(sum(terms)),
        demonstrations=(worked_solution(terms),),
        level=level,
        where=f"arithmetic, {level}, {prompt}",
        rejected=flawed_solution(terms),
    )


def question(terms: Sequence[int]) -> str:
    """The prompt, such as `37+25-18=?`."""
    return "".join([str(terms[0]), *(f"{t:+d}" for t in terms[1:])]) + "=?"


def worked_solution(terms: Sequence[int], step: Callable[[int, int], int] = int.__add__) -> str:
    """A solution with one line per step and the last result in a box.

    Args:
        terms: the terms of the problem.
        step: (total, term) → the result that the solution states and continues with. A wrong `step` makes a flawed
            solution.
    """
    lines, total = [], terms[0]
    for term in terms[1:]:
        result = step(total, term)
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def flawed_solution(terms: Sequence[int]) -> str:
    """A worked solution with a wrong result. It depends only on the terms.

    In half of the problems with differences, the solution adds every term. Otherwise the result of one step is off by
    one of `SLIPS`, and the solution continues with it. In both cases the errors cannot cancel, and no running total is
    below zero.
    """
    rng = random.Random(f"flawed/{question(terms)}")
    if min(terms[1:]) < 0 and rng.random() < 0.5:
        errors = [2 * max(0, -term) for term in terms[1:]]
    else:
        place = rng.randrange(len(terms) - 1)
        lowest = min(sum(terms[:n]) for n in range(place + 2, len(terms) + 1))
        slip = rng.choice([slip for slip in SLIPS if lowest + slip >= 0])
        errors = [slip * (i == place) for i in range(len(terms) - 1)]
    following = iter(errors)
    return worked_solution(terms, lambda total, term: total + term + next(following))
