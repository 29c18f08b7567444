"""The two sides of a data set: which problem is on which, and that none is on both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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
