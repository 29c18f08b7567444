"""A mixture of data sets with a share of the training prompts for each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upge.checks import check_fields
from upge.data.problem import Problem, Splits
from upge.data.splits import check_disjoint
from upge.errors import ConfigError, UserError, nearest


@dataclass(frozen=True)
class Mixture:
    """The problems of several data sets.

    A problem's `source` is the name of its set, which is also a prefix of its id. On the evaluation side it is a prefix
    of its level as well ("gsm8k", "math, Level 5"), so that accuracy is reported for each set.

    Attributes:
        sets: name → data set, each with `load() -> Splits`.
        weights: name → share of the training prompts of every step. Shares need not add up to 1. A set with share 0 is
            only evaluated. None mixes by size: every problem is equally frequent.

    Raises:
        ConfigError: there is no set, a value is not a data set or is a mixture, or the weights do not match the sets.
        DataError: (by `load`) a set raises it, or a prompt is on both sides. The message names the set.
    """

    sets: Mapping[str, Any]  # Any: checked here, because a message then names the set
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sets:
            raise ConfigError("data.sets: empty; give a data set or more, as name: {_target_: upge.data.NAME, ...}")
        for name, one in self.sets.items():
            if not name or not isinstance(name, str):
                raise ConfigError(f"data.sets: found the name {name!r}, expected a text")
            if not callable(getattr(one, "load", None)):
                raise ConfigError(
                    f"data.sets.{name}: found {str(one)[:80]!r} ({type(one).__name__}), expected a data set; give a "
                    "mapping such as {_target_: upge.data.GSM8K, path: gsm8k}"
                )
            if isinstance(one, Mixture):
                raise ConfigError(f"data.sets.{name}: is a mixture itself; list its sets here, with their own weights")
        if self.weights is not None:
            _check_weights(self.weights, self.sets)

    def load(self) -> Splits:
        """Loads all sets in order."""
        train: list[Problem] = []
        evaluation: list[Problem] = []
        for name, one in self.sets.items():
            try:
                splits = one.load()
            except UserError as error:
                raise type(error)(f"data.sets.{name}: {error}") from error
            # A set with share 0 is not trained on, so its training side is left out.
            if self.weights is None or self.weights[name] > 0:
                train += _named(splits.train, name)
            evaluation += [_levelled(problem) for problem in _named(splits.evaluation, name)]
        fix = "remove one of the two, or give both sets the same division (data.sets.NAME.evaluation_share)"
        check_disjoint(train, evaluation, fix, lambda problem: f"data.sets.{problem.source}: ")
        shares = {name: weight for name, weight in (self.weights or {}).items() if weight > 0}
        return Splits(tuple(train), tuple(evaluation), shares)


def _named(problems: Sequence[Problem], name: str) -> list[Problem]:
    return [replace(problem, id=f"{name}/{problem.id}", source=name) for problem in problems]


def _levelled(problem: Problem) -> Problem:
    return replace(problem, level=f"{problem.source}, {problem.level}" if problem.level else problem.source)


def _check_weights(weights: Mapping[str, float], sets: Collection[str]) -> None:
    for name, weight in weights.items():
        if name not in sets:
            raise ConfigError(f"data.weights.{name}: no such set; {nearest(str(name), sets)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"data.weights.{name}: found {weight!r}, expected a number of at least 0")
    for name in sets:
        if name not in weights:
            raise ConfigError(f"data.weights.{name}: missing; give it a share, or 0 to leave it out of training")
    if not sum(weights.values()) > 0:
        raise ConfigError("data.weights: all are 0; give one set a share")
