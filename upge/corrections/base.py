"""What a correction is, and the operations that corrections are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from upge.algorithm import Algorithm
from upge.checks import check_fields
from upge.components.base import AdvantageEstimator, Component, rewritten, walk
from upge.components.denominator import SamplerCorrected
from upge.components.mask import AllOf, ImportanceBand, SequenceSamplerBand
from upge.errors import ConfigError
from upge.pipeline import Pipeline
from upge.regularizers import Regularizer
from upge.term import Term

AnyAlgorithm = TypeVar("AnyAlgorithm", Algorithm, Pipeline)


class NotApplicable(ConfigError):
    """A correction does not apply to an algorithm.

    Attributes:
        reason: why, in one clause about the algorithm ("it has no term that learns from rollouts").
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Correction(ABC):
    """A transformation of algorithms; a concrete one is a frozen dataclass and implements `apply`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def apply(self, algorithm: Algorithm) -> Algorithm:
        """The corrected algorithm.

        Raises:
            NotApplicable: there is nothing to correct, or the correction would work against the algorithm.
        """

    def __call__(self, algorithm: AnyAlgorithm) -> AnyAlgorithm:
        """The corrected algorithm, or the pipeline with each stage corrected that can be.

        Raises:
            NotApplicable: the correction does not apply to the algorithm, or to any stage.
        """
        if isinstance(algorithm, Algorithm):
            return self.apply(algorithm)
        stages, reasons = dict(algorithm.stages), []
        for name, stage in algorithm.stages.items():
            try:
                stages[name] = replace(stage, algorithm=self.apply(stage.algorithm))
            except NotApplicable as error:
                reasons.append(error.reason)
        if len(reasons) == len(stages):
            raise NotApplicable("; ".join(dict.fromkeys(reasons)))
        return replace(algorithm, stages=stages)


def rollout_terms(algorithm: Algorithm) -> dict[str, Term]:
    """The terms that learn from rollouts, by name.

    Raises:
        NotApplicable: there is none.
    """
    terms = {name: term for name, term in algorithm.terms.items() if term.source == "rollouts"}
    if not terms:
        raise NotApplicable("it has no term that learns from rollouts")
    return terms


def wrap(algorithm: Algorithm, slot: str, change: Callable[[Any], Any], names: list[str] | None = None) -> Algorithm:
    """`algorithm` with `change(part)` in place of the part in one slot of the estimators.

    A denominator or a mask that holds the term's own advantage, to follow its sign, holds the changed one afterwards.

    Args:
        slot: 'mask', 'denominator', 'advantage' or 'likelihood'.
        change: from the part in the slot to the one that takes its place; called once per term.
        names: the terms; None = those that learn from rollouts.

    Raises:
        NotApplicable: `names` is None and no term learns from rollouts.
    """
    terms = dict(algorithm.terms)
    for name in rollout_terms(algorithm) if names is None else names:
        estimator = terms[name].estimator
        parts = {**estimator.parts, slot: change(estimator.parts[slot])}
        if slot == "advantage":
            follow = _substitution(estimator.advantage, parts[slot])
            parts |= {other: rewritten(parts[other], follow) for other in parts if other != slot}
        terms[name] = replace(terms[name], estimator=replace(estimator, **parts))
    return replace(algorithm, terms=terms)


def mask_with(algorithm: Algorithm, band: ImportanceBand | SequenceSamplerBand) -> Algorithm:
    """The algorithm with one more mask in each term that learns from rollouts."""
    check_all_absent(algorithm, "mask", type(band))
    return wrap(algorithm, "mask", lambda inner: AllOf((inner, band)))


def weight_with(algorithm: Algorithm, cap: float | None, level: Literal["token", "sequence"]) -> Algorithm:
    """The algorithm with the importance weight of trainer against sampler on each token of a rollout."""
    check_all_absent(algorithm, "denominator", SamplerCorrected)
    return wrap(algorithm, "denominator", lambda inner: SamplerCorrected(inner, cap, level))


def with_regularizer(algorithm: Algorithm, name: str, part: Regularizer) -> Algorithm:
    """The algorithm with one more regularizer.

    Raises:
        NotApplicable: there is one of that name, or no term learns from rollouts.
    """
    rollout_terms(algorithm)
    if name in algorithm.regularizers:
        raise NotApplicable(
            f"regularizers.{name} is there already; change that by algo.regularizers.{name}.SETTING=VALUE"
        )
    return replace(algorithm, regularizers={**algorithm.regularizers, name: part})


def check_all_absent(algorithm: Algorithm, slot: str, kind: type[Component]) -> None:
    """`check_absent` for a slot of every term that learns from rollouts."""
    for name, term in rollout_terms(algorithm).items():
        check_absent(term.estimator.parts[slot], kind, f"terms.{name}.estimator.{slot}")


def check_absent(part: Component, kind: type[Component], place: str) -> None:
    """Refuses a place where what the correction does is done already."""
    if any(isinstance(inner, kind) for _, inner in walk(part, place)):
        raise NotApplicable(f"{place} has upge.{kind.__name__} already; change that by an override")


def check_graded(advantage: AdvantageEstimator, place: str) -> None:
    """Refuses an advantage that asks only whether a reward is a success."""
    for path, part in walk(advantage, place):
        if not getattr(part, "graded", True):
            raise NotApplicable(
                f"{path} is a {type(part).__name__}, which only asks whether a reward is a success: a reward that is "
                "changed a little changes nothing there, or turns a success into a failure; give an advantage of the "
                "reward itself, such as upge.GroupRelative"
            )


def _substitution(old: Component, new: Component) -> Callable[[Component], Component]:
    """The change that puts `new` in the place of every part that equals `old`."""
    return lambda part: new if type(part) is type(old) and part == old else part
