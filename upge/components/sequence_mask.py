"""1_stable: masks that decide about whole responses. See `mask` for those that decide about each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from upge.components.base import StabilizationMask
from upge.components.mask import RATIO_COLUMNS, SAMPLER_COLUMNS, check_interval, outward
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import TrajectoryView, masked_mean


@dataclass(frozen=True)
class SequenceClip(StabilizationMask):
    """1_seq-clip (arXiv 2507.18071): the rule of `PPOClip` applied to s = exp(mean_t log r_t), once per response."""

    low: float = 3e-4
    high: float = 4e-4
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, self.low, self.high)

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        log_ratio = masked_mean(batch.log_importance_ratio, batch.response_mask).expand(batch.response_mask.shape)
        log_low = math.log1p(-self.low) if self.low < 1 else -math.inf
        return (~outward(log_ratio, advantages, log_low, math.log1p(self.high))).to(log_ratio.dtype)

    def formula(self) -> Formula:
        return Formula(
            f"1[s ≤ {1 + self.high:g} if A>0; s ≥ {1 - self.low:g} if A<0]",
            rf"\mathbb{{1}}[s\le {1 + self.high:g}\ (\hat A>0),\ s\ge {1 - self.low:g}\ (\hat A<0)]",
        )


@dataclass(frozen=True)
class SequenceSamplerBand(StabilizationMask):
    """1[low ≤ ρ ≤ high], once per response, whatever the sign of the advantage.

    This is masked importance sampling for the mismatch between trainer and inference engine.

    Attributes:
        mean: 'product': ρ = Π_t π_old/π_sampler, the ratio of the whole response. 'geometric': its |τ|-th root, which
            does not shrink or grow with the length, so its bounds should be close to 1.
    """

    low: float = 0.0
    high: float = 2.0
    mean: Literal["geometric", "product"] = "product"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(
                f"SequenceSamplerBand: low={self.low}, high={self.high} bound the ratio itself, which is 1 where "
                "trainer and engine agree; need 0 <= low <= 1 <= high"
            )

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        log_ratio = batch.log_sampler_ratio
        if self.mean == "product":
            log_ratio = log_ratio.sum(dim=1, keepdim=True)
        else:
            log_ratio = masked_mean(log_ratio, batch.response_mask)
        log_low = math.log(self.low) if self.low > 0 else -math.inf
        inside = (log_ratio >= log_low) & (log_ratio <= math.log(self.high))
        return inside.to(log_ratio.dtype).expand(batch.response_mask.shape)

    def formula(self) -> Formula:
        text, latex = "π_old(τ)/π_sampler(τ)", r"\frac{\pi_{old}(\tau)}{\pi_{sampler}(\tau)}"
        if self.mean == "geometric":
            text, latex = f"({text})^(1/|τ|)", rf"\left({latex}\right)^{{1/|\tau|}}"
        low = f"{self.low:g} ≤ " if self.low > 0 else ""
        latex_low = rf"{self.low:g}\le " if self.low > 0 else ""
        return Formula(f"1[{low}{text} ≤ {self.high:g}]", rf"\mathbb{{1}}[{latex_low}{latex}\le {self.high:g}]")


@dataclass(frozen=True)
class OffPolicySequenceMask(StabilizationMask):
    """1[Â ≥ 0, or mean_t log(π_old/π_θ) ≤ threshold]: drops bad responses that became unlikely (arXiv 2512.02556).

    The mean is over the whole response, an estimate of KL(π_old‖π_θ) per token.

    Attributes:
        threshold: the largest mean, in nats per token.
        of: π_old: 'importance' = the behavior policy; 'sampler' = the policy as the inference engine reported it.
    """

    threshold: float = 0.5
    of: Literal["importance", "sampler"] = "importance"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise ConfigError(
                f"OffPolicySequenceMask.threshold: {self.threshold} must not be negative; 0.5 is customary"
            )

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that are read: `sampler_logprobs` only for the ratio to the sampler."""
        return super().columns - {"sampler_logprobs" if self.of == "importance" else "behavior_logprobs"}

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        current = batch.logprobs.detach()
        log_ratio = batch.log_importance_ratio if self.of == "importance" else current - batch.sampler_logprobs
        near = -masked_mean(log_ratio, batch.response_mask) <= self.threshold
        return ((advantages >= 0) | near).to(log_ratio.dtype)

    def formula(self) -> Formula:
        old, latex = ("π_old", "old") if self.of == "importance" else ("π_sampler", "sampler")
        return Formula(
            f"1[A ≥ 0 or mean log({old}/π_θ) ≤ {self.threshold:g}]",
            rf"\mathbb{{1}}[\hat A\ge 0\ \text{{or}}\ \mathrm{{mean}}\log\frac{{\pi_{{{latex}}}}}{{\pi_\theta}}"
            rf"\le {self.threshold:g}]",
        )
