"""Corrections: functions Algorithm → Algorithm that wrap or add parts.

    algorithm = upge.corrections.TIS(cap=2.0)(algorithm)

A correction is a frozen dataclass whose fields are its settings. It changes the terms that learn from rollouts, because
demonstrations are not sampled by an engine. Applied to a pipeline, it changes every stage that it applies to. If it
applies to nothing, it raises `NotApplicable` with the reason. To write your own, subclass `Correction` and implement
`apply`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from upge import algorithm as core
from upge.algorithm import Algorithm
from upge.components.advantage import GroupRelative
from upge.components.base import AdvantageEstimator, Component, rewritten, walk
from upge.components.denominator import BehaviorPolicy, SamplerCorrected
from upge.components.distillation import LogRatio
from upge.components.mask import ImportanceBand, PPOClip, SequenceSamplerBand
from upge.components.returns import KLKind, KLPenalizedReward
from upge.components.shaping import KLShaped, OverlongShaped, PrefixWeighted
from upge.corrections.base import (
    Correction,
    NotApplicable,
    check_absent,
    check_graded,
    mask_with,
    rollout_terms,
    sampled_terms,
    weight_with,
    with_regularizer,
    wrap,
)
from upge.errors import ConfigError
from upge.gates import Gate, PassRateBetween, ProductOf
from upge.reduction import Reduction, TokenMean
from upge.regularizers import EntropyBonus, KLPenalty
from upge.support import SampledToken
from upge.trajectories import Source


@dataclass(frozen=True)
class TIS(Correction):
    """Truncated importance sampling: multiplies each weight by min(ρ, cap), ρ = π_old/π_sampler.

    Attributes:
        cap: upper bound of ρ; None = no truncation.
        level: 'token' = ρ of the token; 'sequence' = ρ of the whole response. See `upge.SamplerCorrected`.
    """

    cap: float | None = 2.0
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplerCorrected(BehaviorPolicy(), self.cap, self.level)  # checks the settings

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return weight_with(algorithm, self.cap, self.level)


@dataclass(frozen=True)
class IcePop(Correction):
    """IcePop (arXiv 2510.18855): multiplies each weight by its token's ρ = π_old/π_sampler if low ≤ ρ ≤ high.

    All other tokens are masked.
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._band()

    def _band(self) -> ImportanceBand:
        return ImportanceBand(self.low, self.high, of="sampler")

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return weight_with(mask_with(algorithm, self._band()), cap=None, level="token")


@dataclass(frozen=True)
class MIS(Correction):
    """Masked importance sampling per response: masks responses whose ρ is outside [low, high].

    Attributes:
        mean: 'product': ρ = Π_t π_old/π_sampler over the response; 'geometric': its |τ|-th root.
        weight: True = multiply the weights of the other responses by Π_t π_old/π_sampler.
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
        masked = mask_with(algorithm, self._band())
        return weight_with(masked, cap=None, level="sequence") if self.weight else masked


@dataclass(frozen=True)
class KLTerm(Correction):
    """A KL penalty towards the reference policy in the loss: the regularizer `kl`, an `upge.KLPenalty`."""

    coefficient: float = 0.001
    kind: KLKind = "k3"
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return with_regularizer(algorithm, "kl", KLPenalty(self.coefficient, self.reduction, self.kind, self.source))


@dataclass(frozen=True)
class KLInReward(Correction):
    """A KL penalty towards the reference policy in the reward: each token loses coefficient·k, see `upge.KLShaped`.

    Attributes:
        coefficient: the reward lost per nat.
        kind: the estimate of the KL; k1 is unbiased as a reward.
        future: True = a token also loses the penalty of all later tokens of its response.
    """

    coefficient: float = 0.001
    kind: KLKind = "k1"
    future: bool = True

    def apply(self, algorithm: Algorithm) -> Algorithm:
        for name, term in sampled_terms(algorithm).items():
            place = f"terms.{name}.estimator.advantage"
            check_absent(term.estimator.advantage, KLShaped, place)
            for path, part in walk(term.estimator.advantage, place):
                if isinstance(part, KLPenalizedReward):
                    raise NotApplicable(
                        f"{path} is a KLPenalizedReward, so the reward already includes a KL penalty; change its "
                        "coefficient, or remove it in an algorithm file of your own"
                    )
        return wrap(algorithm, "advantage", lambda inner: KLShaped(inner, self.coefficient, self.kind, self.future))


@dataclass(frozen=True)
class Entropy(Correction):
    """A bonus on the full-vocabulary token entropy, with gradient coefficient·∇H: the regularizer `entropy`."""

    coefficient: float = 0.001
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        return with_regularizer(algorithm, "entropy", EntropyBonus(self.coefficient, self.reduction, self.source))


@dataclass(frozen=True)
class IWOPD(Correction):
    """Weights log-ratios to the teacher by `upge.PrefixWeighted` (arXiv 2606.22600)."""

    gamma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        PrefixWeighted(LogRatio(), self.gamma)  # checks the setting

    def apply(self, algorithm: Algorithm) -> Algorithm:
        names = [
            name
            for name, term in algorithm.terms.items()
            if isinstance(term.estimator.advantage, LogRatio) and isinstance(term.support, SampledToken)
        ]
        if not names:
            raise NotApplicable("no term has the advantage LogRatio on sampled tokens")
        return wrap(algorithm, "advantage", lambda inner: PrefixWeighted(inner, self.gamma), names)


@dataclass(frozen=True)
class DualClip(Correction):
    """Dual clip (arXiv 1912.09729): every `upge.PPOClip` also masks tokens with Â < 0 and π_θ/π_behavior > dual."""

    dual: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.dual < math.inf:
            raise ConfigError(f"{self.dual} must be above 1 and finite; 3 is customary", "dual")

    def apply(self, algorithm: Algorithm) -> Algorithm:
        clips = [
            part
            for term in rollout_terms(algorithm).values()
            for _, part in walk(term.estimator.mask, "mask")
            if isinstance(part, PPOClip)
        ]
        if not clips:
            raise NotApplicable("it has no PPOClip")
        for clip in clips:
            if clip.dual is not None:
                raise NotApplicable(
                    f"its upge.PPOClip already has dual: {clip.dual}; override that setting of the algorithm"
                )

        def clipped(part: Component) -> Component:
            return replace(part, dual=self.dual) if isinstance(part, PPOClip) else part

        return wrap(algorithm, "mask", lambda inner: rewritten(inner, clipped))


@dataclass(frozen=True)
class DynamicSampling(Correction):
    """Dynamic sampling (arXiv 2503.14476): replaces prompts on which `gate` is closed until the batch is full.

    Prompts on which it is still closed after the last round do not count in the divisors.

    Attributes:
        gate: the gate; it may read only rewards and groups.
    """

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
            raise NotApplicable("it already has `sampling`; change that by algo.sampling.KEY=VALUE")
        gated = {name: replace(term, gate=ProductOf((term.gate, self.gate))) for name, term in terms.items()}
        return replace(algorithm, terms={**algorithm.terms, **gated}, sampling=self._sampling())


@dataclass(frozen=True)
class Overlong(Correction):
    """Soft overlong punishment (arXiv 2503.14476, Eq. 13), see `upge.OverlongShaped`.

    Advantages and a critic's returns read the penalized rewards. Gates and pass rates read the verifier's rewards.

    Attributes:
        limit: number of tokens from which on the full penalty applies; the run's response limit.
        buffer: the share of the limit over which the penalty rises.
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
        rewarded = [n for n, term in rollout_terms(algorithm).items() if "rewards" in term.estimator.advantage.columns]
        if not rewarded:
            raise NotApplicable("no advantage on rollouts reads rewards, so a penalty would change nothing")
        names = [*rewarded, *compared]
        places = {f"terms.{name}.estimator.advantage": algorithm.terms[name].estimator.advantage for name in names}
        if algorithm.critic is not None:
            places["critic.returns"] = algorithm.critic.returns
        for place, advantage in places.items():
            check_absent(advantage, OverlongShaped, place)
        for place, advantage in places.items():
            check_graded(advantage, place)
        shaped = wrap(algorithm, "advantage", self._shaped, names)
        if shaped.critic is None:
            return shaped
        return replace(shaped, critic=replace(shaped.critic, returns=self._shaped(shaped.critic.returns)))


_IN_A_FILE = "to use it nevertheless, write an algorithm file of your own with such a `sampling`"


def _check_learns_from_sampled(algorithm: Algorithm, sampling_gate: Gate) -> None:
    """Refuse an algorithm that learns from prompts on which `sampling_gate` is closed, because they are replaced."""
    for name, term in algorithm.terms.items():
        if term.source != "rollouts":
            source = term.source.replace("_", " ")
            raise NotApplicable(
                f"its term '{name}' learns from {source}, and sampling would replace the questions that all rollouts "
                f"fail or solve, together with their {source}; {_IN_A_FILE}"
            )
    if algorithm.interleaved_update is not None:
        raise NotApplicable(
            "its `interleaved_update` collects questions by their pass rate, and sampling would replace these; "
            f"{_IN_A_FILE}"
        )
    for name, term in algorithm.terms.items():
        rate = _open_rate(term.gate, sampling_gate)
        if rate is not None:
            raise NotApplicable(
                f"the gate of its term '{name}' chooses questions by their pass rate and is open at {rate:g}, where "
                f"sampling would replace them; {_IN_A_FILE}"
            )


def _open_rate(gate: Gate, sampling_gate: Gate) -> float | None:
    """A pass rate at which `gate` may be open although `sampling_gate` is closed.

    None if there is none, or if `gate` does not read rewards.
    """
    if "rewards" not in gate.columns:
        return None
    number = 24  # its multiples of 1/24 include halves, thirds, quarters and eighths
    rates = [solved / number for solved in range(number + 1)]
    closed = (rate for rate in rates if sampling_gate.at_pass_rate(rate) == 0)
    return next((rate for rate in closed if gate.at_pass_rate(rate) != 0), None)


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
