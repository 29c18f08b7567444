"""The base class of corrections, and the operations that they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from upge.algorithm import Algorithm
from upge.checks import check_fields
from upge.components.base import AdvantageEstimator, Component, StabilizationMask, rewritten, walk
from upge.components.denominator import SamplerCorrected
from upge.components.mask import AllOf
from upge.errors import ConfigError
from upge.pipeline import Pipeline
from upge.regularizers import Regularizer
from upge.support import SampledToken
from upge.term import Term
from upge.views import NAMED_REWARDS

AnyAlgorithm = TypeVar("AnyAlgorithm", Algorithm, Pipeline)


class NotApplicable(ConfigError):
    """A correction does not apply to an algorithm.

    Attributes:
        reason: why; one clause about the algorithm, such as "it has no term that learns from rollouts".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Correction(ABC):
    """A transformation of algorithms. A concrete correction is a frozen dataclass that implements `apply`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def apply(self, algorithm: Algorithm) -> Algorithm:
        """Return the corrected algorithm.

        Raises:
            NotApplicable: there is nothing to correct, or the correction would work against the algorithm.
        """

    def __call__(self, algorithm: AnyAlgorithm) -> AnyAlgorithm:
        """Return the corrected algorithm, or the pipeline with every stage corrected that the correction applies to.

        Raises:
            NotApplicable: the correction does not apply to the algorithm, or to no stage of the pipeline.
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
    """Name → term, for the terms that learn from rollouts.

    Raises:
        NotApplicable: there is no such term.
    """
    terms = {name: term for name, term in algorithm.terms.items() if term.source == "rollouts"}
    if not terms:
        raise NotApplicable("it has no term that learns from rollouts")
    return terms


def sampled_terms(algorithm: Algorithm) -> dict[str, Term]:
    """Name → term, for the terms that learn from the sampled tokens of rollouts.

    Raises:
        NotApplicable: there is no such term.
    """
    terms = {name: term for name, term in rollout_terms(algorithm).items() if isinstance(term.support, SampledToken)}
    if not terms:
        raise NotApplicable("no term that learns from rollouts moves the sampled token alone (`support`)")
    return terms


def wrap(algorithm: Algorithm, slot: str, change: Callable[[Any], Any], names: list[str] | None = None) -> Algorithm:
    """Replace the part in one slot of the estimators: 'mask', 'denominator', 'advantage' or 'likelihood'.

    A part that contains the changed advantage gets the new one: a denominator or mask of the same term that uses the
    sign of Â, or a mask of another term that ranks tokens by Â.

    Args:
        change: the function from the old to the new part; called once per term.
        names: the terms to change; None = those that learn from the sampled tokens of rollouts.

    Raises:
        NotApplicable: `names` is None and there is no such term.
    """
    old = {name: term.estimator.parts[slot] for name, term in algorithm.terms.items()}
    new = {name: change(old[name]) for name in (sampled_terms(algorithm) if names is None else names)}
    terms = dict(algorithm.terms)
    for name, term in algorithm.terms.items():
        parts = {**term.estimator.parts, slot: new.get(name, old[name])}
        if slot == "advantage":
            # A term that keeps the same advantage keeps it everywhere.
            pairs = [(old[one], new[one]) for one in new if name in new or old[one] != old[name]]
            follow = _substitution(pairs)
            parts |= {other: rewritten(parts[other], follow) for other in parts if other != slot}
        if any(parts[one] is not part for one, part in term.estimator.parts.items()):
            terms[name] = replace(term, estimator=replace(term.estimator, **parts))
    return replace(algorithm, terms=terms)


def mask_with(algorithm: Algorithm, mask: StabilizationMask, names: list[str] | None = None) -> Algorithm:
    """Add a mask to each term that learns from rollouts, or to those in `names`."""
    check_all_absent(algorithm, "mask", type(mask))
    return wrap(algorithm, "mask", lambda inner: AllOf((inner, mask)), names)


def weight_with(algorithm: Algorithm, cap: float | None, level: Literal["token", "sequence"]) -> Algorithm:
    """Multiply the weights of rollout tokens by π_old/π_sampler, see `upge.SamplerCorrected`."""
    check_all_absent(algorithm, "denominator", SamplerCorrected)
    return wrap(algorithm, "denominator", lambda inner: SamplerCorrected(inner, cap, level))


def with_regularizer(algorithm: Algorithm, name: str, part: Regularizer) -> Algorithm:
    """Add a regularizer.

    Raises:
        NotApplicable: the algorithm has a regularizer of this name, or no term learns from rollouts.
    """
    rollout_terms(algorithm)
    if name in algorithm.regularizers:
        raise NotApplicable(
            f"regularizers.{name} already exists; change its settings instead "
            f"(algo.regularizers.{name}.SETTING=VALUE, or those of the correction that added it)"
        )
    return replace(algorithm, regularizers={**algorithm.regularizers, name: part})


def check_all_absent(algorithm: Algorithm, slot: str, kind: type[Component]) -> None:
    """Call `check_absent` for one slot of every term that learns from the sampled tokens of rollouts."""
    for name, term in sampled_terms(algorithm).items():
        check_absent(term.estimator.parts[slot], kind, f"terms.{name}.estimator.{slot}")


def check_absent(part: Component, kind: type[Component], place: str) -> None:
    """Refuse a part that is, or wraps, a `kind`, because the correction would apply twice."""
    if any(isinstance(inner, kind) for _, inner in walk(part, place)):
        raise NotApplicable(
            f"{place} already has upge.{kind.__name__}; change its settings instead, or remove the "
            "correction that added it"
        )


def check_graded(advantage: AdvantageEstimator, place: str) -> None:
    """Refuse an advantage that only checks whether a reward is a success."""
    for path, part in walk(advantage, place):
        if not getattr(part, "graded", True):
            raise NotApplicable(
                f"{path} is a {type(part).__name__}, which only checks whether a reward is a success, so a penalty "
                "would change nothing or turn a success into a failure; give an advantage of the reward itself, such "
                "as upge.GroupRelative"
            )


def check_one_reward(advantage: AdvantageEstimator, place: str) -> None:
    """Refuse an advantage that looks up rewards by name, because it would not see the changed rewards."""
    for path, part in walk(advantage, place):
        if NAMED_REWARDS in part.reads:
            raise NotApplicable(
                f"{path} is a {type(part).__name__}, which reads each of several rewards by itself and not their sum, "
                "so a penalty in the sum would change nothing; give the penalty as a reward of its own, such as "
                "verify.verifier='math + 0.5*my_rewards.in_time' (docs/verification.md)"
            )


def _substitution(pairs: Sequence[tuple[Component, Component]]) -> Callable[[Component], Component]:
    """A function that replaces every part that equals the first of a pair by the second."""

    def replaced(part: Component) -> Component:
        return next((new for old, new in pairs if type(part) is type(old) and part == old), part)

    return replaced
