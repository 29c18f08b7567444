"""Several algorithms one after the other in one run: a stage begins where the one before it ends."""

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
    """A part of a run with an algorithm of its own.

    Attributes:
        algorithm: what is trained with.
        share: how many of the run's steps, in relation to the other stages' shares.
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
    """A stage in a run: its steps are first, first + 1, ..., end - 1, counted from 0."""

    name: str
    stage: Stage
    first: int
    end: int


@dataclass(frozen=True)
class Pipeline:
    """Stages in their order. Weights go from one to the next; optimizer moments and learning-rate schedule begin anew,
    as in a run of its own that starts from the one before.

    Attributes:
        name: as in its file.
        stages: name → stage.
        description: a line or two for people.
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
        """A single algorithm as a pipeline of one stage; a pipeline as it is."""
        if isinstance(algorithm, Pipeline):
            return algorithm
        return Pipeline(algorithm.name, {algorithm.name: Stage(algorithm)}, algorithm.description)

    def spans(self, steps: int) -> list[Span]:
        """Which steps of a run of `steps` each stage has; stages too small for a step have none."""
        total, done, first, found = sum(s.share for s in self.stages.values()), 0.0, 0, []
        for name, stage in self.stages.items():
            done += stage.share
            end = round(steps * done / total)
            found.append(Span(name, stage, first, end))
            first = end
        return found

    @property
    def parts(self) -> dict[str, Component]:
        """Every part of every stage by its path in the file."""
        found = {}
        for name, stage in self.stages.items():
            found |= {f"stages.{name}.algorithm.{path}": part for path, part in stage.algorithm.parts.items()}
        return found

    @property
    def needs(self) -> Needs:
        """What all stages need together."""
        found = []
        for name, stage in self.stages.items():
            own = stage.algorithm.needs
            found.append(replace(own, group_size_because=f"stages.{name}.algorithm.{own.group_size_because}"))
        return reduce(lambda a, b: a.joined(b), found)

    def check(
        self, *, group_size: int, demonstrations: int | None = None, provided: Iterable[str] = (), path: str = "algo"
    ) -> None:
        """`Algorithm.check` of every stage.

        Raises:
            ConfigError: naming the stage, the key, the value and the fix.
        """
        provided = tuple(provided)
        for name, stage in self.stages.items():
            place = f"{path}.stages.{name}.algorithm"
            stage.algorithm.check(group_size=group_size, demonstrations=demonstrations, provided=provided, path=place)

    @property
    def only(self) -> Algorithm:
        """The algorithm of a pipeline with one stage.

        Raises:
            ConfigError: there are several.
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
        """The stages' formulas, each under its name."""
        if style == "latex":
            return r" \\ ".join(
                rf"\text{{{name}: }} {stage.algorithm.formula(style)}" for name, stage in self.stages.items()
            )
        return "\n".join(f"stage {name}:\n{stage.algorithm.formula(style)}" for name, stage in self.stages.items())
