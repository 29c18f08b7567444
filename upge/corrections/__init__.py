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

from upge.algorithm import Algorithm
from upge.components.advantage import GroupRelative, LeaveOneOut, OptimalTokenBaseline
from upge.components.base import AdvantageEstimator, Component, rewritten, walk
from upge.components.denominator import BehaviorPolicy, SamplerCorrected
from upge.components.distillation import JensenShannon, LogRatio, RatioSign, TargetProbability
from upge.components.mask import ImportanceBand, PPOClip
from upge.components.returns import KLKind, KLPenalizedReward
from upge.components.sequence_mask import OffPolicySequenceMask, SequenceSamplerBand
from upge.components.shaping import KLShaped, OverlongShaped, PrefixWeighted
from upge.corrections.base import (
    Correction,
    NotApplicable,
    check_absent,
    check_graded,
    check_one_reward,
    mask_with,
    rollout_terms,
    sampled_terms,
    weight_with,
    with_regularizer,
    wrap,
)
from upge.corrections.sampling import Curriculum, DynamicSampling
from upge.errors import ConfigError
from upge.gates import Finished, ProductOf
from upge.reduction import Reduction, TokenMean
from upge.regularizers import DivergencePenalty, EntropyBonus, KLPenalty
from upge.support import FullVocabulary, SampledToken, Support
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
    """A KL penalty towards the reference policy in the loss: the regularizer `kl`, an `upge.KLPenalty`.

    Attributes:
        importance: True = multiply it by the ratio π_θ/π_behavior, with its gradient.
    """

    coefficient: float = 0.001
    kind: KLKind = "k3"
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()
    importance: bool = False

    def apply(self, algorithm: Algorithm) -> Algorithm:
        penalty = KLPenalty(self.coefficient, self.reduction, self.kind, self.source, self.importance)
        return with_regularizer(algorithm, "kl", penalty)


@dataclass(frozen=True)
class FullKL(Correction):
    """A divergence from the reference policy in the loss: the regularizer `kl`, an `upge.DivergencePenalty`.

    Attributes:
        kind: 'reverse' = KL(π_θ‖π_0), 'forward' = KL(π_0‖π_θ), 'jsd' = their Jensen-Shannon divergence.
        support: the candidates, the whole vocabulary or its most likely tokens.
    """

    coefficient: float = 0.001
    kind: Literal["reverse", "forward", "jsd"] = "reverse"
    support: Support = FullVocabulary()
    source: Source = "rollouts"
    reduction: Reduction = TokenMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        kinds = {"reverse": LogRatio, "forward": TargetProbability, "jsd": JensenShannon}
        advantage = kinds[self.kind](target="reference")
        penalty = DivergencePenalty(self.coefficient, self.reduction, advantage, self.support, self.source)
        return with_regularizer(algorithm, "kl", penalty)


@dataclass(frozen=True)
class KLInReward(Correction):
    """A KL penalty towards the reference policy in the reward: each token loses coefficient·k, see `upge.KLShaped`.

    If the advantage of some term reads rewards, terms whose advantage reads none, such as the penalty of KL-Cov, are
    unchanged.

    Attributes:
        coefficient: the reward lost per nat.
        kind: the estimate of the KL; k1 is unbiased as a reward.
        future: True = a token also loses the penalty of all later tokens of its response.
    """

    coefficient: float = 0.001
    kind: KLKind = "k1"
    future: bool = True

    def apply(self, algorithm: Algorithm) -> Algorithm:
        terms = sampled_terms(algorithm)
        rewarded = {name: term for name, term in terms.items() if "rewards" in term.estimator.advantage.columns}
        terms = rewarded or terms
        for name, term in terms.items():
            place = f"terms.{name}.estimator.advantage"
            check_absent(term.estimator.advantage, KLShaped, place)
            for path, part in walk(term.estimator.advantage, place):
                if isinstance(part, KLPenalizedReward):
                    raise NotApplicable(
                        f"{path} is a KLPenalizedReward, so the reward already includes a KL penalty; change its "
                        "coefficient, or remove it in an algorithm file of your own"
                    )
        return wrap(
            algorithm, "advantage", lambda inner: KLShaped(inner, self.coefficient, self.kind, self.future), list(terms)
        )


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
class SequenceMask(Correction):
    """Masks responses with Â < 0 that have become unlikely (arXiv 2512.02556), see `upge.OffPolicySequenceMask`.

    A term with the advantage `upge.RatioSign` is not masked: it is a penalty, whose sign does not mean that the
    response is bad.

    Attributes:
        threshold: the largest mean_t log(π_old/π_θ), in nats per token.
        of: π_old: 'importance' = the behavior policy; 'sampler' = the policy as the inference engine reported it.
    """

    threshold: float = 0.5
    of: Literal["importance", "sampler"] = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mask()

    def _mask(self) -> OffPolicySequenceMask:
        return OffPolicySequenceMask(self.threshold, self.of)

    def apply(self, algorithm: Algorithm) -> Algorithm:
        names = [
            name
            for name, term in sampled_terms(algorithm).items()
            if not any(isinstance(part, RatioSign) for _, part in walk(term.estimator.advantage, "advantage"))
        ]
        if not names:
            raise NotApplicable("its terms over rollouts are penalties (RatioSign), which do not rate responses")
        return mask_with(algorithm, self._mask(), names)


@dataclass(frozen=True)
class OptimalBaseline(Correction):
    """Replaces `upge.GroupRelative` and `upge.LeaveOneOut` by `upge.OptimalTokenBaseline`, which divides by no std.

    Attributes:
        alone: as in `upge.OptimalTokenBaseline`.
    """

    alone: Literal["reward", "zero"] = "reward"

    def apply(self, algorithm: Algorithm) -> Algorithm:
        kinds, new = (GroupRelative, LeaveOneOut), OptimalTokenBaseline(self.alone)
        names = [
            name
            for name, term in rollout_terms(algorithm).items()
            if any(isinstance(part, kinds) for _, part in walk(term.estimator.advantage, "advantage"))
        ]
        if not names:
            raise NotApplicable("no term over rollouts has the advantage GroupRelative or LeaveOneOut")

        def replaced(part: Component) -> Component:
            return new if isinstance(part, kinds) else part

        return wrap(algorithm, "advantage", lambda inner: rewritten(inner, replaced), names)


@dataclass(frozen=True)
class OverlongFilter(Correction):
    """Rollouts that were cut at the length limit have no gradient and count in no divisor (arXiv 2503.14476).

    This includes the demonstration tokens that a guided rollout begins with, if their advantage reads rewards. A term
    that imitates them regardless of the reward is not changed.
    """

    def apply(self, algorithm: Algorithm) -> Algorithm:
        terms = rollout_terms(algorithm)
        if algorithm.guidance is not None:
            shown = {name: term for name, term in algorithm.terms.items() if term.source == "demonstrations"}
            terms |= {name: term for name, term in shown.items() if "rewards" in term.estimator.advantage.columns}
        for name, term in terms.items():
            check_absent(term.gate, Finished, f"terms.{name}.gate")
        gated = {name: replace(term, gate=ProductOf((term.gate, Finished()))) for name, term in terms.items()}
        return replace(algorithm, terms={**algorithm.terms, **gated})


@dataclass(frozen=True)
class Overlong(Correction):
    """Soft overlong punishment (arXiv 2503.14476, Eq. 13), see `upge.OverlongShaped`.

    Advantages and a critic's returns read the penalized rewards. Gates and pass rates read the verifier's rewards.

    Attributes:
        limit: number of tokens from which the full penalty applies, usually the run's response limit.
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
            check_one_reward(advantage, place)
        shaped = wrap(algorithm, "advantage", self._shaped, names)
        if shaped.critic is None:
            return shaped
        return replace(shaped, critic=replace(shaped.critic, returns=self._shaped(shaped.critic.returns)))


__all__ = [
    "IWOPD",
    "MIS",
    "TIS",
    "Correction",
    "Curriculum",
    "DualClip",
    "DynamicSampling",
    "Entropy",
    "FullKL",
    "IcePop",
    "KLInReward",
    "KLTerm",
    "NotApplicable",
    "OptimalBaseline",
    "Overlong",
    "OverlongFilter",
    "SequenceMask",
    "rollout_terms",
    "wrap",
]
