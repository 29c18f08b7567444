"""Corrections: functions Algorithm → Algorithm, each of which wraps or adds parts.

    algorithm = upge.corrections.TIS(cap=2.0)(algorithm)

A correction is a frozen dataclass whose fields are its settings. It changes the terms that learn from rollouts: no
engine sampled a demonstration. Applied to a pipeline, it changes each stage that can take it. Where it does not apply,
it raises `NotApplicable` with the reason. A correction of your own is a subclass of `Correction` with an `apply`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from upge import algorithm as core
from upge.algorithm import Algorithm
from upge.checks import check_fields
from upge.components.advantage import GroupRelative
from upge.components.base import AdvantageEstimator, Component, rewritten, walk
from upge.components.denominator import BehaviorPolicy, SamplerCorrected
from upge.components.mask import AllOf, ImportanceBand, PPOClip, SequenceSamplerBand
from upge.components.returns import KLKind, KLPenalizedReward
from upge.components.shaping import KLShaped, OverlongShaped
from upge.errors import ConfigError
from upge.gates import Gate, PassRateBetween, ProductOf
from upge.pipeline import Pipeline
from upge.reduction import Reduction, TokenMean
from upge.regularizers import EntropyBonus, KLPenalty, Regularizer
from upge.term import Term
from upge.trajectories import Source

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


# The mismatch between inference engine and trainer.


@dataclass(frozen=True)
class TIS(Correction):
    """Truncated importance sampling: each weight is multiplied by min(ρ, cap), ρ = π_old/π_sampler.

    Attributes:
        cap: upper bound of ρ; None = no truncation.
        level: ρ of the 'token', or of the whole response ('sequence'). See `upge.SamplerCorrected`.
    """

    cap: float | None = 2.0
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplerCorrected(BehaviorPolicy(), self.cap, self.level)  # refuses impossible settings

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return _weighted(algorithm, self.cap, self.level)


@dataclass(frozen=True)
class IcePop(Correction):
    """IcePop (arXiv 2510.18855): each weight is multiplied by ρ = π_old/π_sampler of its token where
    low ≤ ρ ≤ high; the other tokens are masked."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._band()

    def _band(self) -> ImportanceBand:
        return ImportanceBand(self.low, self.high, of="sampler")

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return _weighted(_masked(algorithm, self._band()), cap=None, level="token")


@dataclass(frozen=True)
class MIS(Correction):
    """Masked importance sampling per response: responses whose ρ lies outside [low, high] are masked.

    Attributes:
        low, high: bounds of ρ.
        mean: 'product': ρ = Π_t π_old/π_sampler over the response; 'geometric': its |τ|-th root.
        weight: True = the weights of the other responses are multiplied by Π_t π_old/π_sampler.
    """

    low: float = 0.0
    high: float = 2.0
    mean: Literal["geometric", "product"] = "product"
    weight: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._band()

    def _band(self) -> SequenceSamplerBand:
        return SequenceSamplerBand(self.low, self.high, self.mean)

    def apply(self, algorithm: Algorithm) -> Algorithm:
        masked = _masked(algorithm, self._band())
        return _weighted(masked, cap=None, level="sequence") if self.weight else masked


# KL and entropy.


@dataclass(frozen=True)
class KLTerm(Correction):
    """A KL penalty towards the frozen policy as a term of the loss: the regularizer `kl`, an `upge.KLPenalty`."""

    coefficient: float = 0.001
    kind: KLKind = "k3"
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return _with_regularizer(algorithm, "kl", KLPenalty(self.coefficient, self.reduction, self.kind, self.source))


@dataclass(frozen=True)
class KLInReward(Correction):
    """A KL penalty towards the frozen policy in the reward: each token pays coefficient·k, `upge.KLShaped`.

    Attributes:
        coefficient: the price of one nat.
        kind: the estimator of KL; k1 is unbiased as a reward.
        future: True = a token also pays for all later tokens of its response.
    """

    coefficient: float = 0.001
    kind: KLKind = "k1"
    future: bool = True

    def apply(self, algorithm: Algorithm) -> Algorithm:
        for name, term in rollout_terms(algorithm).items():
            place = f"terms.{name}.estimator.advantage"
            _check_absent(term.estimator.advantage, KLShaped, place)
            for path, part in walk(term.estimator.advantage, place):
                if isinstance(part, KLPenalizedReward):
                    raise NotApplicable(
                        f"{path} is a KLPenalizedReward; its tokens pay for their KL already; change its coefficient, "
                        "or take it out in a file of your own"
                    )
        return wrap(algorithm, "advantage", lambda inner: KLShaped(inner, self.coefficient, self.kind, self.future))


@dataclass(frozen=True)
class Entropy(Correction):
    """A bonus of coefficient·∇H on the full-vocabulary token entropy: the regularizer `entropy`."""

    coefficient: float = 0.001
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return _with_regularizer(algorithm, "entropy", EntropyBonus(self.coefficient, self.reduction, self.source))


# Clip, prompts and rewards.


@dataclass(frozen=True)
class DualClip(Correction):
    """Dual clip (arXiv 1912.09729): tokens with Â < 0 and π_θ/π_behavior > dual are masked, by every `upge.PPOClip`."""

    dual: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        PPOClip(dual=self.dual)  # refuses impossible settings

    def apply(self, algorithm: Algorithm) -> Algorithm:
        clips = [
            part
            for term in rollout_terms(algorithm).values()
            for _, part in walk(term.estimator.mask, "mask")
            if isinstance(part, PPOClip)
        ]
        if not clips:
            raise NotApplicable("no PPOClip is among its parts")
        for clip in clips:
            if clip.dual is not None:
                raise NotApplicable(f"upge.PPOClip has dual: {clip.dual} already; change that by an override")

        def clipped(part: Component) -> Component:
            return replace(part, dual=self.dual) if isinstance(part, PPOClip) else part

        return wrap(algorithm, "mask", lambda inner: rewritten(inner, clipped))


@dataclass(frozen=True)
class DynamicSampling(Correction):
    """Dynamic sampling (arXiv 2503.14476): prompts on which `gate` is closed are replaced by others until the batch is
    full, at most `rounds` times; those that remain do not count in the divisors."""

    gate: Gate = PassRateBetween(0.0, 1.0)
    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sampling()

    def _sampling(self) -> core.DynamicSampling:
        return core.DynamicSampling(self.gate, self.rounds)

    def apply(self, algorithm: Algorithm) -> Algorithm:
        terms = rollout_terms(algorithm)
        _check_learns_from_sampled(algorithm, self.gate)
        if algorithm.sampling is not None:
            raise NotApplicable("it has `sampling` already; change that by algo.sampling.KEY=VALUE")
        gated = {name: replace(term, gate=ProductOf((term.gate, self.gate))) for name, term in terms.items()}
        return replace(algorithm, terms={**algorithm.terms, **gated}, sampling=self._sampling())


@dataclass(frozen=True)
class Overlong(Correction):
    """Soft punishment of overlong responses (arXiv 2503.14476, Eq. 13), `upge.OverlongShaped`: advantages and a
    critic's returns see the punished rewards; gates and pass rates see the verifier's.

    Attributes:
        limit: tokens from which on a response loses the whole penalty; the run's response limit.
        buffer: the share of the limit over which the punishment rises.
        penalty: what the longest responses lose.
    """

    limit: int
    buffer: float = 0.2
    penalty: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shaped(GroupRelative())

    def _shaped(self, inner: AdvantageEstimator) -> OverlongShaped:
        return OverlongShaped(inner, self.limit, self.buffer, self.penalty)

    def apply(self, algorithm: Algorithm) -> Algorithm:
        compared = [
            name
            for name, term in algorithm.terms.items()
            if term.source != "rollouts" and {"rewards", "group"} <= term.estimator.advantage.columns
        ]
        names = [*rollout_terms(algorithm), *compared]
        places = {f"terms.{name}.estimator.advantage": algorithm.terms[name].estimator.advantage for name in names}
        if algorithm.critic is not None:
            places["critic.returns"] = algorithm.critic.returns
        for place, advantage in places.items():
            _check_absent(advantage, OverlongShaped, place)
        for place, advantage in places.items():
            _check_graded(advantage, place)
        shaped = wrap(algorithm, "advantage", self._shaped, names)
        if shaped.critic is None:
            return shaped
        return replace(shaped, critic=replace(shaped.critic, returns=self._shaped(shaped.critic.returns)))


# What corrections are made of; also for corrections of your own.


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


def _masked(algorithm: Algorithm, band: ImportanceBand | SequenceSamplerBand) -> Algorithm:
    """The algorithm with one more mask in each term that learns from rollouts."""
    _check_all_absent(algorithm, "mask", type(band))
    return wrap(algorithm, "mask", lambda inner: AllOf((inner, band)))


def _weighted(algorithm: Algorithm, cap: float | None, level: Literal["token", "sequence"]) -> Algorithm:
    """The algorithm with the importance weight of trainer against sampler on each token of a rollout."""
    _check_all_absent(algorithm, "denominator", SamplerCorrected)
    return wrap(algorithm, "denominator", lambda inner: SamplerCorrected(inner, cap, level))


def _with_regularizer(algorithm: Algorithm, name: str, part: Regularizer) -> Algorithm:
    rollout_terms(algorithm)
    if name in algorithm.regularizers:
        raise NotApplicable(
            f"regularizers.{name} is there already; change that by algo.regularizers.{name}.SETTING=VALUE"
        )
    return replace(algorithm, regularizers={**algorithm.regularizers, name: part})


# Reasons why a correction does not apply.


def _check_all_absent(algorithm: Algorithm, slot: str, kind: type[Component]) -> None:
    for name, term in rollout_terms(algorithm).items():
        _check_absent(term.estimator.parts[slot], kind, f"terms.{name}.estimator.{slot}")


def _check_absent(part: Component, kind: type[Component], place: str) -> None:
    """Refuses a place where what the correction does is done already."""
    if any(isinstance(inner, kind) for _, inner in walk(part, place)):
        raise NotApplicable(f"{place} has upge.{kind.__name__} already; change that by an override")


def _check_graded(advantage: AdvantageEstimator, place: str) -> None:
    """Refuses an advantage that asks only whether a reward is a success."""
    for path, part in walk(advantage, place):
        if not getattr(part, "graded", True):
            raise NotApplicable(
                f"{path} is a {type(part).__name__}, which only asks whether a reward is a success: a reward that is "
                "changed a little changes nothing there, or turns a success into a failure; give an advantage of the "
                "reward itself, such as upge.GroupRelative"
            )


_IN_A_FILE = "an algorithm file of your own may have such a `sampling` all the same"


def _check_learns_from_sampled(algorithm: Algorithm, sampling_gate: Gate) -> None:
    """Refuses an algorithm that learns from prompts on which `sampling_gate` is closed: they would be replaced."""
    for name, term in algorithm.terms.items():
        if term.source != "rollouts":
            source = term.source.replace("_", " ")
            raise NotApplicable(
                f"its term '{name}' learns from {source}, and sampling would replace, with their {source}, the "
                f"questions that all rollouts fail or solve; {_IN_A_FILE}"
            )
    if algorithm.interleaved_update is not None:
        raise NotApplicable(
            "its `interleaved_update` gathers questions by their pass rate, and sampling would replace these; "
            f"{_IN_A_FILE}"
        )
    for name, term in algorithm.terms.items():
        rate = _open_rate(term.gate, sampling_gate)
        if rate is not None:
            raise NotApplicable(
                f"the gate of its term '{name}' chooses questions by their pass rate and is open at {rate:g}, where "
                f"sampling is closed; {_IN_A_FILE}"
            )


def _open_rate(gate: Gate, sampling_gate: Gate) -> float | None:
    """A pass rate at which `gate`, if it reads rewards, may be open although `sampling_gate` is closed; None = none."""
    if "rewards" not in gate.columns:
        return None
    number = 24  # halves, thirds, quarters and eighths are among its shares
    rates = [solved / number for solved in range(number + 1)]
    closed = (rate for rate in rates if sampling_gate.at_pass_rate(rate) == 0)
    return next((rate for rate in closed if gate.at_pass_rate(rate) != 0), None)


def _substitution(old: Component, new: Component) -> Callable[[Component], Component]:
    """The change that puts `new` in the place of every part that equals `old`."""
    return lambda part: new if type(part) is type(old) and part == old else part


__all__ = [
    "MIS",
    "TIS",
    "Correction",
    "DualClip",
    "DynamicSampling",
    "Entropy",
    "IcePop",
    "KLInReward",
    "KLTerm",
    "NotApplicable",
    "Overlong",
    "rollout_terms",
    "wrap",
]
