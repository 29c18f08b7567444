"""Which problems are on which side of a data set, that none is on both, and smaller selections of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from upge.data.problem import Problem
from upge.errors import ConfigError, DataError


def normal(prompt: str) -> str:
    """A prompt with its white space made single, by which two prompts are the same."""
    return " ".join(prompt.split())


def for_evaluation(prompt: str, share: float) -> bool:
    """Is a problem with this prompt on the evaluation side, which gets about `share` of all?

    The SHA-256 of the prompt (see `normal`) decides, nothing else: not the place in the file, no seed. A larger share
    keeps the problems of a smaller one.
    """
    digest = hashlib.sha256(normal(prompt).encode()).digest()
    return int.from_bytes(digest[:6], "big") < share * 2**48


def divide(problems: Sequence[Problem], share: float, name: str, fix: str) -> tuple[list[Problem], list[Problem]]:
    """Training and evaluation side of problems that come as one, each in their order.

    Raises:
        DataError: one side is empty; `name` is that of the data, `fix` what to do.
    """
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[for_evaluation(problem.prompt, share)].append(problem)
    for side, which in zip(sides, ("training", "evaluation"), strict=True):
        if not side:
            raise DataError(
                f"{name}: none of its {len(problems)} rows falls on the {which} side (a share of {share:g} is for "
                f"evaluation, by a hash of the prompt); {fix}"
            )
    return sides


def check_disjoint(
    train: Sequence[Problem], evaluation: Sequence[Problem], fix: str, name: Callable[[Problem], str] = lambda p: ""
) -> None:
    """Refuses problems of which one has the same prompt as one of the other side.

    Args:
        train, evaluation: the sides.
        fix: what to do, for the message.
        name: what to write before a problem's place.

    Raises:
        DataError: naming both places.
    """
    seen = {normal(problem.prompt): problem for problem in train}
    for problem in evaluation:
        other = seen.get(normal(problem.prompt))
        if other is not None:
            raise DataError(
                f"{name(problem)}{problem.where or problem.id}: the same question is on the training side, at "
                f"{name(other)}{other.where or other.id}; {fix}"
            )


def check_sizes(train: int | None, evaluation: int | None) -> None:
    """Raises ConfigError for a size of a side below 1; None is all there are."""
    for key, size in (("train_size", train), ("evaluation_size", evaluation)):
        if size is not None and size < 1:
            raise ConfigError(f"data.{key}: found {size}; give a number of at least 1, or null for all rows")


def limit_levels(problems: Sequence[Problem], per_level: Mapping[str, int]) -> tuple[Problem, ...]:
    """Of each level in `per_level` the first so many problems, in their order; all problems if it is empty.

    Raises:
        ConfigError: a level has fewer problems, or a number is none.
    """
    if not per_level:
        return tuple(problems)
    kept: list[Problem] = []
    left = dict(per_level)
    for level, count in per_level.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"data_policy.per_level: found {count!r} for '{level}'; give a number of at least 1")
    for problem in problems:
        if left.get(problem.level, 0):
            left[problem.level] -= 1
            kept.append(problem)
    for level, missing in left.items():
        if missing:
            have = sorted({str(problem.level) for problem in problems})
            raise ConfigError(
                f"data_policy.per_level: {per_level[level]} problems of '{level}' are asked for, and there are "
                f"{per_level[level] - missing}; the levels of the data are {', '.join(have)}"
            )
    return tuple(kept)


def limit_demonstrated(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """The same problems, of which `count` keep their demonstrations (0: all do) and the rest have none.

    They are spread over the levels as evenly as these allow. Which they are follows from the prompts alone, so a larger
    count keeps those of a smaller one, and every algorithm learns from the same ones. A rejected response has no chosen
    side without a demonstration and goes with it.
    """
    having = [problem for problem in problems if problem.demonstrations]
    if not count or len(having) <= count:
        return tuple(problems)
    turns: dict[tuple[str, str | None], int] = {}
    ranked = []
    for problem in sorted(having, key=_rank):
        kind = (problem.source, problem.level)
        turns[kind] = turns.get(kind, 0) + 1
        ranked.append((turns[kind], _rank(problem), problem.id))
    kept = {name for *_, name in sorted(ranked)[:count]}
    return tuple(p if p.id in kept else replace(p, demonstrations=(), rejected=None) for p in problems)


def _rank(problem: Problem) -> bytes:
    """A place by chance that depends on nothing but the problem."""
    return hashlib.sha256(f"demonstrated/{problem.source}/{problem.id}/{problem.prompt}".encode()).digest()
