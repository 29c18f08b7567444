"""Several algorithms in sequence in one run, each starting from the weights of the one before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from upge.algorithm import Algorithm
from upge.checks import check_fields
from upge.components.base import Component
from upge.errors import ConfigError
from upge.estimate import Estimate
from upge.needs import Needs
from upge.plan import Plan
from upge.term import Term
from upge.trajectories import Trajectories


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own algorithm.

    Attributes:
        share: its number of steps, relative to the other stages' shares.
        lr_factor: its learning rate as a multiple of the run's.
    """

    algorithm: Algorithm
    share: float = 1.0
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.share < math.inf or not 0 < self.lr_factor < math.inf:
            raise ConfigError(
                f"stage: share={self.share}, lr_factor={self.lr_factor}; both must be positive and finite"
            )


@dataclass(frozen=True)
class Span:
    """The steps of a stage in a run: first, first + 1, ..., end - 1, counted from 0."""

    name: str
    stage: Stage
    first: int
    end: int


@dataclass(frozen=True)
class Pipeline:
    """A sequence of stages.

    Each stage starts from the weights of the one before, as a separate run would: its optimizer moments and its
    learning-rate schedule start anew.
    """

    name: str
    stages: Mapping[str, Stage]
    description: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.stages:
            raise ConfigError(f"{self.name}: stages is empty; a pipeline has at least one stage")

    @staticmethod
    def of(algorithm: Algorithm | Pipeline) -> Pipeline:
        """`algorithm` as a pipeline: a single algorithm becomes the only stage, a pipeline is returned unchanged."""
        if isinstance(algorithm, Pipeline):
            return algorithm
        return Pipeline(algorithm.name, {algorithm.name: Stage(algorithm)}, algorithm.description)

    def spans(self, steps: int) -> list[Span]:
        """The steps of each stage in a run of `steps` steps. A stage with a very small share may have no step."""
        total, done, first, spans = sum(s.share for s in self.stages.values()), 0.0, 0, []
        for name, stage in self.stages.items():
            done += stage.share
            end = round(steps * done / total)
            spans.append(Span(name, stage, first, end))
            first = end
        return spans

    @property
    def parts(self) -> dict[str, Component]:
        """Every part of every stage by its path in the file."""
        parts = {}
        for name, stage in self.stages.items():
            parts |= {f"stages.{name}.algorithm.{path}": part for path, part in stage.algorithm.parts.items()}
        return parts

    @property
    def needs(self) -> Needs:
        """The needs of all stages together."""
        needs = []
        for name, stage in self.stages.items():
            stage_needs = stage.algorithm.needs
            because = f"stages.{name}.algorithm.{stage_needs.group_size_because}"
            needs.append(replace(stage_needs, group_size_because=because))
        return reduce(lambda a, b: a.joined(b), needs)

    def check(
        self,
        *,
        group_size: int,
        demonstrations: int | None = None,
        provided: Iterable[str] = (),
        rewards: Iterable[str] | None = None,
        path: str = "algo",
    ) -> None:
        """Check that a run can train every stage, see `Algorithm.check`.

        Raises:
            ConfigError: it cannot; the message names the stage, the key, the value and the fix.
        """
        provided, rewards = tuple(provided), None if rewards is None else tuple(rewards)
        for name, stage in self.stages.items():
            place = f"{path}.stages.{name}.algorithm"
            stage.algorithm.check(
                group_size=group_size, demonstrations=demonstrations, provided=provided, rewards=rewards, path=place
            )

    @property
    def only(self) -> Algorithm:
        """The algorithm of a pipeline with one stage.

        Raises:
            ConfigError: the pipeline has several stages.
        """
        if len(self.stages) > 1:
            names = ", ".join(self.stages)
            raise ConfigError(f"{self.name}: has the stages {names}; use the algorithm of one, stages[NAME].algorithm")
        return next(iter(self.stages.values())).algorithm

    @property
    def terms(self) -> Mapping[str, Term]:
        """`Algorithm.terms` of the only stage."""
        return self.only.terms

    def plan(self, batch: Trajectories) -> Plan:
        """`Algorithm.plan` of the only stage."""
        return self.only.plan(batch)

    def estimate(self, batch: Trajectories) -> Estimate:
        """`Algorithm.estimate` of the only stage."""
        return self.only.estimate(batch)

    def formula(self, style: str = "text") -> str:
        """The stages' formulas as 'text' or 'latex', each under its stage's name."""
        if style == "latex":
            return r" \\ ".join(
                rf"\text{{{name}: }} {stage.algorithm.formula(style)}" for name, stage in self.stages.items()
            )
        return "\n".join(f"stage {name}:\n{stage.algorithm.formula(style)}" for name, stage in self.stages.items())
