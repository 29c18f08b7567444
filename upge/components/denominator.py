"""1/π_ref: the policy by whose probability a token's gradient is divided. Every part returns log π_ref, detached.

With the plain likelihood gradient, the factor in front of ∇log π_θ is π_θ/π_ref: 1 for the current policy, the
importance ratio for the behavior policy, and π_θ for the unit denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, ReferenceDenominator, like
from upge.components.mask import RATIO_COLUMNS, SAMPLER_COLUMNS, check_log_interval
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import TokenView, TrajectoryView, masked_mean

REFERENCE_COLUMNS = frozenset({"logprobs", "reference_logprobs"})


def _check_bounds(part: ReferenceDenominator, low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ConfigError(
            f"{type(part).__name__}: low={low}, high={high} bound the weight itself, which is 1 where the policies "
            "agree; need 0 <= low <= 1 <= high"
        )


@dataclass(frozen=True)
class CurrentPolicy(ReferenceDenominator):
    """π_ref = π_θ: the factor in front of ∇log π_θ is the advantage alone, as in maximum likelihood."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return batch.logprobs.detach()

    def formula(self) -> Formula:
        return Formula("1/π_θ", r"\frac{1}{\pi_\theta}")


@dataclass(frozen=True)
class BehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θold, the policy that generated the data: importance sampling per token.

    Without `behavior_logprobs` the data are strictly on-policy, and π_θold is π_θ.
    """

    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return batch.log_behavior

    def formula(self) -> Formula:
        return Formula("1/π_old", r"\frac{1}{\pi_{old}}")


@dataclass(frozen=True)
class UnitDenominator(ReferenceDenominator):
    """π_ref = 1, for offline data whose behavior policy is unknown.

    The estimator is biased but stable (arXiv 2509.04419, section 2.3).
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return like(batch, 0.0)

    def formula(self) -> Formula:
        return Formula("1", "1")


@dataclass(frozen=True)
class SequenceBehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θ/s with s = exp(mean_t log r_t), r = π_θ/π_old: the sequence-level ratio of arXiv 2507.18071."""

    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        return batch.logprobs.detach() - masked_mean(batch.log_importance_ratio, batch.response_mask)

    def formula(self) -> Formula:
        return Formula("s/π_θ, s = (π_θ(τ)/π_old(τ))^(1/|τ|)", r"\frac{s}{\pi_\theta}")


@dataclass(frozen=True)
class ClippedBehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θ/clip(r, low, high), r = π_θ/π_old: the truncated importance weight of arXiv 2506.13585.

    Inside the bounds it equals `BehaviorPolicy`. Outside, the weight is the bound and the token keeps its gradient,
    whereas a clip mask would drop the token.

    Attributes:
        high: upper bound of the ratio r itself, which is 1 on-policy; None = unbounded.
        low: lower bound of the ratio r itself; None = unbounded.
    """

    high: float | None = 1.2
    low: float | None = None
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.low is not None and not 0 < self.low <= 1) or (self.high is not None and self.high < 1):
            raise ConfigError(
                f"ClippedBehaviorPolicy: low={self.low}, high={self.high} bound the ratio itself (1 on-policy); "
                "need 0 < low <= 1 <= high: the interval [1 - 0.2, 1 + 0.28] is low: 0.8, high: 1.28"
            )

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_low = None if self.low is None else math.log(self.low)
        log_high = None if self.high is None else math.log(self.high)
        log_ratio = batch.log_importance_ratio
        if log_low is not None or log_high is not None:
            log_ratio = log_ratio.clamp(min=log_low, max=log_high)
        return batch.logprobs.detach() - log_ratio

    def formula(self) -> Formula:
        low = "0" if self.low is None else f"{self.low:g}"
        text, latex = ("∞", r"\infty") if self.high is None else (f"{self.high:g}",) * 2
        return Formula(f"clip(r, {low}, {text})/π_θ", rf"\frac{{\mathrm{{clip}}(r, {low}, {latex})}}{{\pi_\theta}}")


@dataclass(frozen=True)
class GeometricMeanBehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θ/ρ with ρ = exp(mean_t log r_t), the geometric mean of the ratios r = π_θ/π_old (arXiv 2507.20673).

    It is less sensitive to single extreme ratios than the arithmetic mean. Before averaging, log r_t is clamped to at
    most `high` where Â > 0 and to at least -`low` where Â < 0. A token that the mask `LogRatioClip` stops still enters
    ρ, with its clamped value.

    Attributes:
        advantage: must equal the estimator's advantage, whose sign selects the bound.
    """

    advantage: AdvantageEstimator
    low: float = 0.4
    high: float = 0.4
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_log_interval(self, self.low, self.high)

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        log_ratio, advantages = batch.log_importance_ratio, self.advantage(batch)
        clamped = torch.where(advantages > 0, log_ratio.clamp(max=self.high), log_ratio)
        clamped = torch.where(advantages < 0, log_ratio.clamp(min=-self.low), clamped)
        return batch.logprobs.detach() - masked_mean(clamped, batch.response_mask)

    def formula(self) -> Formula:
        return Formula(
            f"ρ/π_θ, ρ = exp(mean log r; log r ≤ {self.high:g} if A>0, ≥ {-self.low:g} if A<0)",
            r"\frac{\rho}{\pi_\theta}",
        )


@dataclass(frozen=True)
class ClippedReferencePolicy(ReferenceDenominator):
    """π_ref = π_θ/clip(π_θ/π_0, low, high): the importance weight of arXiv 2507.12856 per token.

    π_0 is the reference policy.
    """

    low: float = 0.2
    high: float = 1.8
    reads: ClassVar[frozenset[str]] = REFERENCE_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self, self.low, self.high)

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        current = batch.logprobs.detach()
        low = math.log(self.low) if self.low > 0 else -math.inf
        return current - (current - batch.reference_logprobs).clamp(min=low, max=math.log(self.high))

    def formula(self) -> Formula:
        bounds = f"{self.low:g}, {self.high:g}"
        return Formula(
            f"clip(π_θ/π_0, {bounds})/π_θ",
            rf"\frac{{\mathrm{{clip}}(\pi_\theta/\pi_0, {bounds})}}{{\pi_\theta}}",
        )


@dataclass(frozen=True)
class SequenceReferencePolicy(ReferenceDenominator):
    """π_ref = π_θ/W with W = clip(exp(power·mean_t log(π_θ/π_0)), low, high).

    This is the importance weight of arXiv 2507.12856 for a whole response. π_0 is the reference policy.
    """

    power: float = 2.0
    low: float = 0.0
    high: float = 16.0
    reads: ClassVar[frozenset[str]] = REFERENCE_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self, self.low, self.high)

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        current = batch.logprobs.detach()
        log_weight = self.power * masked_mean(current - batch.reference_logprobs, batch.response_mask)
        low = math.log(self.low) if self.low > 0 else -math.inf
        return current - log_weight.clamp(min=low, max=math.log(self.high))

    def formula(self) -> Formula:
        bounds, power = f"{self.low:g}, {self.high:g}", f"{self.power:g}"
        return Formula(
            f"W/π_θ, W = clip((π_θ(τ)/π_0(τ))^({power}/|τ|), {bounds})",
            rf"\frac{{W}}{{\pi_\theta}},\ W=\mathrm{{clip}}\left("
            rf"(\pi_\theta(\tau)/\pi_0(\tau))^{{{power}/|\tau|}}, {bounds}\right)",
        )


@dataclass(frozen=True)
class MixedBehaviorPolicy(ReferenceDenominator):
    """π_ref = share·π_old + (1 - share): a mixture of π_old and a policy that gives every token probability 1.

    It is meant for demonstrations whose own policy is unknown (multiple importance sampling, arXiv 2508.00222). The
    ratio π_θ/π_ref stays below 1/(1 - share), however unlikely the token is under π_old. share = 1 is `BehaviorPolicy`,
    and share = 0 is `UnitDenominator`. π_old is also read on demonstrations; without `behavior_logprobs` it is π_θ.
    """

    share: float = 0.75
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ConfigError(
                f"MixedBehaviorPolicy.share: {self.share} is out of range; give a number between 0 (π_ref = 1) and 1 "
                "(π_ref = π_old)"
            )

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_old = math.log(self.share) if self.share > 0 else -math.inf
        log_sure = math.log1p(-self.share) if self.share < 1 else -math.inf
        old = batch.log_behavior + log_old
        return torch.logaddexp(old, torch.full_like(old, log_sure))

    def formula(self) -> Formula:
        mixture = f"{self.share:g}·π_old + {1 - self.share:g}"
        return Formula(f"1/({mixture})", rf"\frac{{1}}{{{self.share:g}\pi_{{old}}+{1 - self.share:g}}}")


@dataclass(frozen=True)
class SamplerCorrected(ReferenceDenominator):
    """π_ref = inner/min(ρ, cap): truncated importance sampling.

    It corrects the mismatch between the policy as the trainer computes it (π_old) and as the inference engine sampled
    from it (π_sampler).

    Attributes:
        cap: upper bound of ρ; None = no truncation.
        level: 'token': ρ_t = π_old/π_sampler of the token. 'sequence': ρ = Π_t ρ_t, one number per response. This is
            the unbiased weight of a whole response, and its variance grows with the response's length.
    """

    denominator: ReferenceDenominator
    cap: float | None = 2.0
    level: Literal["token", "sequence"] = "token"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and not 1 <= self.cap < math.inf:
            raise ConfigError(
                f"SamplerCorrected.cap: {self.cap} bounds the ratio itself, which is 1 where trainer and engine agree; "
                "give a finite number of 1 or more (2.0 is customary), or null for no truncation"
            )

    @property
    def reach(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a setting
        """'token' or 'trajectory', depending on `level`."""
        return "token" if self.level == "token" else "trajectory"

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_weight = batch.log_sampler_ratio
        if self.level == "sequence":
            log_weight = log_weight.sum(dim=1, keepdim=True)
        if self.cap is not None:
            log_weight = log_weight.clamp(max=math.log(self.cap))
        return self.denominator(batch) - log_weight

    def formula(self) -> Formula:
        inner = self.denominator.formula()
        text, latex = "π_old/π_sampler", r"\frac{\pi_{old}}{\pi_{sampler}}"
        if self.level == "sequence":
            text, latex = "π_old(τ)/π_sampler(τ)", r"\frac{\pi_{old}(\tau)}{\pi_{sampler}(\tau)}"
        if self.cap is not None:
            text, latex = f"min({text}, {self.cap:g})", rf"\min({latex}, {self.cap:g})"
        return Formula(f"{inner.text} · {text}", rf"{inner.latex}\,{latex}")
