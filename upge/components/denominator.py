"""1/π_ref: by which policy's probability a token's gradient is divided. Every part returns log π_ref, detached.

With the plain likelihood gradient the factor in front of ∇log π_θ is π_θ/π_ref: 1 for the current policy, the
importance ratio for the behaviour policy, π_θ itself for the unit denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from upge.components.base import Formula, ReferenceDenominator, like
from upge.components.mask import RATIO_COLUMNS
from upge.errors import ConfigError
from upge.trajectories import TokenView, Trajectories, masked_mean


@dataclass(frozen=True)
class CurrentPolicy(ReferenceDenominator):
    """π_ref = π_θ: each token's ∇log π_θ enters with its advantage alone, as in maximum likelihood."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return batch.logprobs.detach()

    def formula(self) -> Formula:
        return Formula("1/π_θ", r"\frac{1}{\pi_\theta}")


@dataclass(frozen=True)
class BehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θold, the policy that generated the data: importance sampling per token.

    Without a behaviour column the data are strictly on-policy and π_θold is π_θ.
    """

    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return batch.log_behavior

    def formula(self) -> Formula:
        return Formula("1/π_old", r"\frac{1}{\pi_{old}}")


@dataclass(frozen=True)
class UnitDenominator(ReferenceDenominator):
    """π_ref = 1: offline data whose behaviour policy is unknown. Biased and stable (arXiv 2509.04419, section 2.3)."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return like(batch, 0.0)

    def formula(self) -> Formula:
        return Formula("1", "1")


@dataclass(frozen=True)
class SequenceBehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θ / s with s = exp(mean_t log r_t): the sequence-level importance ratio of arXiv 2507.18071."""

    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        return batch.logprobs.detach() - masked_mean(batch.log_importance_ratio, batch.response_mask)

    def formula(self) -> Formula:
        return Formula("s/π_θ, s = (π_θ(τ)/π_old(τ))^(1/|τ|)", r"\frac{s}{\pi_\theta}")


@dataclass(frozen=True)
class ClippedBehaviorPolicy(ReferenceDenominator):
    """π_ref = π_θ / clip(r, low, high), bounds on the ratio itself: the truncated importance weight of
    arXiv 2506.13585. Equal to the behaviour policy inside the bounds; outside, the weight stays at the bound and
    the token keeps its gradient, where a clip mask would drop it. None leaves a side open.
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
class SamplerCorrected(ReferenceDenominator):
    """π_ref = inner / min(π_old/π_sampler, cap): truncated importance sampling for the mismatch between the policy as
    the trainer computes it and as the inference engine sampled from it, token by token.
    """

    denominator: ReferenceDenominator
    cap: float | None = 2.0
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS | {"sampler_logprobs"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and self.cap < 1:
            raise ConfigError(
                f"SamplerCorrected.cap: {self.cap} bounds the ratio itself, which is 1 where trainer and engine agree; "
                "give 1 or more (2.0 is customary), or null for no truncation"
            )

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_weight = batch.log_sampler_ratio
        if self.cap is not None:
            log_weight = log_weight.clamp(max=math.log(self.cap))
        return self.denominator(batch) - log_weight

    def formula(self) -> Formula:
        inner = self.denominator.formula()
        text, latex = "π_old/π_sampler", r"\frac{\pi_{old}}{\pi_{sampler}}"
        if self.cap is not None:
            text, latex = f"min({text}, {self.cap:g})", rf"\min({latex}, {self.cap:g})"
        return Formula(f"{inner.text} · {text}", rf"{inner.latex}\,{latex}")
