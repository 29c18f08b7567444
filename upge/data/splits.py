"""Divides problems into training and evaluation sides, checks that none is on both, and limits their number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from upge.data.problem import Problem
from upge.errors import ConfigError, DataError


def normal(prompt: str) -> str:
    """A prompt with single spaces for white space. Prompts that agree in this are the same."""
    return " ".join(prompt.split())


def for_evaluation(prompt: str, share: float) -> bool:
    """Whether a problem with this prompt is on the evaluation side, which has a share of about `share`.

    Only the SHA-256 of the prompt (see `normal`) decides this, neither its place in the file nor a seed. A larger share
    keeps the problems of a smaller one.
    """
    digest = hashlib.sha256(normal(prompt).encode()).digest()
    return int.from_bytes(digest[:6], "big") < share * 2**48


def divide(problems: Sequence[Problem], share: float, name: str, fix: str) -> tuple[list[Problem], list[Problem]]:
    """Divides problems into (training, evaluation), which keep their order.

    Args:
        problems: all problems.
        share: approximate share of the evaluation side.
        name: the name of the data, for messages.
        fix: a fix for an empty side, for messages.

    Raises:
        DataError: one side is empty.
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
    """Checks that no prompt is on both sides.

    Args:
        train, evaluation: the sides.
        fix: a fix, for the message.
        name: problem → text before the problem's place in the message.

    Raises:
        DataError: a prompt is on both sides; the message names both places.
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
    """Checks the sizes of both sides; None means all problems.

    Raises:
        ConfigError: a size is below 1.
    """
    for key, size in (("train_size", train), ("evaluation_size", evaluation)):
        if size is not None and size < 1:
            raise ConfigError(f"data.{key}: found {size}; give a number of at least 1, or null for all rows")


def limit_levels(problems: Sequence[Problem], per_level: Mapping[str, int]) -> tuple[Problem, ...]:
    """Takes the first problems of each level.

    Args:
        problems: all problems.
        per_level: level → number of problems. Other levels are left out. If it is empty, all problems are returned.

    Raises:
        ConfigError: a level has fewer problems, or a number is not a positive integer.
    """
    if not per_level:
        return tuple(problems)
    kept: list[Problem] = []
    left: dict[str | None, int] = {**per_level}
    for level, count in per_level.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"data_policy.per_level: found {count!r} for '{level}'; give a number of at least 1")
    for problem in problems:
        if left.get(problem.level, 0):
            left[problem.level] -= 1
            kept.append(problem)
    for level, count in per_level.items():
        if left[level]:
            have = sorted({str(problem.level) for problem in problems})
            raise ConfigError(
                f"data_policy.per_level: {count} problems of '{level}' are asked for, and there are "
                f"{count - left[level]}; the levels of the data are {', '.join(have)}"
            )
    return tuple(kept)


def limit_demonstrated(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """Removes the demonstrations of all but `count` problems (0: of none).

    The problems that keep them are spread as evenly as possible over the levels. The choice depends only on the
    problems, so a larger count keeps the choice of a smaller one, and all algorithms learn from the same
    demonstrations. A rejected response is removed with its demonstration, because it then has no chosen response.
    """
    demonstrated = [problem for problem in problems if problem.demonstrations]
    if not count or len(demonstrated) <= count:
        return tuple(problems)
    per_level: dict[tuple[str, str | None], int] = {}
    ranked: list[tuple[int, bytes, str]] = []
    for problem in sorted(demonstrated, key=_rank):
        level = (problem.source, problem.level)
        per_level[level] = per_level.get(level, 0) + 1
        ranked.append((per_level[level], _rank(problem), problem.id))
    kept = {name for *_, name in sorted(ranked)[:count]}
    return tuple(p if p.id in kept else replace(p, demonstrations=(), rejected=None) for p in problems)


def _rank(problem: Problem) -> bytes:
    """A pseudorandom sort key that depends only on the problem."""
    return hashlib.sha256(f"demonstrated/{problem.source}/{problem.id}/{problem.prompt}".encode()).digest()
