"""1_stable: which tokens may be updated. A mask returns 0 or 1 per token, and a soft mask any number from 0 to 1.

In the formulas, r = π_θ/π_behavior is the importance ratio of a token. Masks that decide about whole responses are in
`sequence_mask`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import Component, StabilizationMask, like
from upge.errors import ConfigError
from upge.formula import Formula, times
from upge.views import TokenView

RATIO_COLUMNS = frozenset({"logprobs", "behavior_logprobs"})
SAMPLER_COLUMNS = RATIO_COLUMNS | {"sampler_logprobs"}


def outward(log_ratio: Tensor, advantages: Tensor, log_low: float, log_high: float) -> Tensor:
    """True where the ratio is outside the interval and the gradient step would move it further out."""
    return ((advantages > 0) & (log_ratio > log_high)) | ((advantages < 0) & (log_ratio < log_low))


def check_interval(part: StabilizationMask, low: float, high: float) -> None:
    """Refuse an interval [1 - low, 1 + high] of a ratio that does not contain 1 or reaches below 0."""
    if not 0 <= low <= 1 or high < 0:
        raise ConfigError(
            f"{type(part).__name__}: low={low}, high={high}; the interval is [1 - low, 1 + high], so low must lie in "
            "[0, 1] and high must not be negative"
        )


def check_log_interval(part: Component, low: float, high: float) -> None:
    """Refuse bounds on log r whose interval does not contain 0, the logarithm of an unchanged ratio."""
    if low < 0 or high < 0:
        raise ConfigError(
            f"{type(part).__name__}: low={low}, high={high}; the interval of log r is [-low, high], so neither may be "
            "negative"
        )


@dataclass(frozen=True)
class NoMask(StabilizationMask):
    """1 everywhere: every token may be updated."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return like(batch, 1.0)

    def formula(self) -> Formula:
        return Formula("1", "1")


@dataclass(frozen=True)
class HighEntropy(StabilizationMask):
    """1 on the tokens of a response at which the policy is least certain, 0 on the others (arXiv 2507.01679).

    Of the n tokens of a response, the ⌊(1 - share)·n⌋ with the lowest entropies are masked. Ties go to earlier tokens.
    """

    share: float = 0.2
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"HighEntropy.share: {self.share} must be above 0 and at most 1; 0.2 is customary")

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        mask, entropies = batch.response_mask, batch.entropies.detach()
        # Padding sorts last.
        rank = entropies.masked_fill(~mask, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
        # In floats 1 - 0.8 is a little less than 0.2. The tolerance keeps a fifth of 5 tokens at one token.
        dropped = ((1 - self.share) * mask.sum(dim=1, keepdim=True).double() + 1e-9).floor()
        return (mask & (rank >= dropped)).to(entropies.dtype)

    def formula(self) -> Formula:
        text = f"1[H among the top {self.share:.0%}]"
        return Formula(text, rf"\mathbb{{1}}[H\ \text{{among the top}}\ {100 * self.share:g}\%]")


@dataclass(frozen=True)
class PPOClip(StabilizationMask):
    """1_clip (arXiv 1707.06347), which gives the gradient of min(r·Â, clip(r, 1-low, 1+high)·Â), r = π_θ/π_behavior.

    The mask is 0 where Â > 0 and r > 1+high, and where Â < 0 and r < 1-low. With `dual` = c (arXiv 1912.09729) it is
    also 0 where Â < 0 and r > c, because the objective max(min(...), c·Â) is flat there.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, self.low, self.high)
        if self.dual is not None and self.dual <= 1 + self.high:
            raise ConfigError(f"PPOClip.dual: {self.dual} must exceed 1 + high = {1 + self.high}; 3.0 is customary")

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = batch.log_importance_ratio
        log_low = math.log1p(-self.low) if self.low < 1 else -math.inf
        stopped = outward(log_ratio, advantages, log_low, math.log1p(self.high))
        if self.dual is not None:
            stopped |= (advantages < 0) & (log_ratio > math.log(self.dual))
        return (~stopped).to(log_ratio.dtype)

    def formula(self) -> Formula:
        text = f"1[r ≤ {1 + self.high:g} if A>0; r ≥ {1 - self.low:g} if A<0"
        latex = rf"\mathbb{{1}}[r\le {1 + self.high:g}\ (\hat A>0),\ r\ge {1 - self.low:g}\ (\hat A<0)"
        if self.dual is not None:
            text, latex = f"{text}; r ≤ {self.dual:g} if A<0", rf"{latex},\ r\le {self.dual:g}\ (\hat A<0)"
        return Formula(text + "]", latex + "]")


@dataclass(frozen=True)
class ImportanceBand(StabilizationMask):
    """1[low ≤ ratio ≤ high], whatever the sign of the advantage.

    Attributes:
        of: which ratio: 'importance' = π_θ/π_behavior; 'sampler' = π_behavior/π_sampler, the mismatch between trainer
            and inference engine.
    """

    low: float = 0.5
    high: float = 5.0
    of: Literal["importance", "sampler"] = "importance"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high or self.high == 0:
            raise ConfigError(f"ImportanceBand: low={self.low}, high={self.high}; need 0 <= low <= high and high > 0")

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that are read: `sampler_logprobs` only for the ratio to the sampler."""
        return super().columns - ({"sampler_logprobs"} if self.of == "importance" else frozenset())

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = batch.log_importance_ratio if self.of == "importance" else batch.log_sampler_ratio
        log_low = math.log(self.low) if self.low > 0 else -math.inf
        return ((log_ratio >= log_low) & (log_ratio <= math.log(self.high))).to(log_ratio.dtype)

    def formula(self) -> Formula:
        ratio = ("r", "r") if self.of == "importance" else ("π_old/π_sampler", r"\pi_{old}/\pi_{sampler}")
        return Formula(
            f"1[{self.low:g} ≤ {ratio[0]} ≤ {self.high:g}]",
            rf"\mathbb{{1}}[{self.low:g}\le {ratio[1]}\le {self.high:g}]",
        )


@dataclass(frozen=True)
class LogRatioClip(StabilizationMask):
    """1[log r ≤ high if Â > 0; log r ≥ -low if Â < 0] (arXiv 2507.20673).

    This is the rule of `PPOClip` with bounds on log r, so the interval of r is [e^-low, e^high]. A token outside the
    interval may still be updated in the direction back into it.
    """

    low: float = 0.4
    high: float = 0.4
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_log_interval(self, self.low, self.high)

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = batch.log_importance_ratio
        return (~outward(log_ratio, advantages, -self.low, self.high)).to(log_ratio.dtype)

    def formula(self) -> Formula:
        return Formula(
            f"1[log r ≤ {self.high:g} if A>0; log r ≥ {-self.low:g} if A<0]",
            rf"\mathbb{{1}}[\log r\le {self.high:g}\ (\hat A>0),\ \log r\ge {-self.low:g}\ (\hat A<0)]",
        )


@dataclass(frozen=True)
class DivergenceClip(StabilizationMask):
    """1[D ≤ bound, or the step would reduce D], D the divergence from the behavior policy (arXiv 2602.04879).

    The rule of `PPOClip` with a bound on a divergence in place of the ratio: 0 where Â > 0, π_θ > π_behavior and
    D > high, and where Â < 0, π_θ < π_behavior and D > low. D compares distributions over two outcomes: this token or
    any other. The ratio of a rare token may therefore change a lot, that of a likely token only a little.

    Attributes:
        low, high: the largest D where Â < 0 and where Â > 0.
        divergence: 'tv' = |π_θ - π_behavior|; 'kl' = μ·log(μ/π) + (1 - μ)·log((1 - μ)/(1 - π)), μ = π_behavior.
    """

    low: float = 0.15
    high: float = 0.15
    divergence: Literal["tv", "kl"] = "tv"
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 0 or self.high < 0:
            raise ConfigError(
                f"DivergenceClip: low={self.low}, high={self.high}; a divergence is not negative: 0.15 is customary "
                "for tv, 0.05 for kl"
            )

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        current, old = batch.logprobs.detach(), batch.log_behavior.to(batch.logprobs.dtype)
        divergence = current.exp() - old.exp()
        if self.divergence == "kl":
            # Rounding may give a log-prob of 0 or more. Then 1 - π is set to the smallest positive number.
            rest, old_rest = ((-torch.expm1(x)).clamp(min=torch.finfo(x.dtype).tiny).log() for x in (current, old))
            kl = old.exp() * (old - current) - torch.expm1(old) * (old_rest - rest)
            divergence = torch.where(current > old, kl, -kl)
        return (~outward(divergence, advantages, -self.low, self.high)).to(current.dtype)

    def formula(self) -> Formula:
        tv = self.divergence == "tv"
        text, latex = ("π_θ − π_old", r"\pi_\theta-\pi_{old}") if tv else ("±KL(π_old‖π_θ)", r"\pm KL")
        return Formula(
            f"1[{text} ≤ {self.high:g} if A>0; ≥ {-self.low:g} if A<0]",
            rf"\mathbb{{1}}[{latex}\le {self.high:g}\ (\hat A>0),\ \ge {-self.low:g}\ (\hat A<0)]",
        )


@dataclass(frozen=True)
class SigmoidGate(StabilizationMask):
    """4σ(u)(1 - σ(u)) with u = τ(r - 1), τ = `positive` where Â > 0, else `negative` (arXiv 2511.20347).

    This soft mask is 1 where the policies agree and falls to 0 on both sides. It is the derivative of the objective
    4/τ·σ(τ(r - 1)) with respect to r.
    """

    positive: float = 1.0
    negative: float = 1.05
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive <= 0 or self.negative <= 0:
            raise ConfigError(
                f"SigmoidGate: positive={self.positive}, negative={self.negative}; both must be positive, 1.0 and 1.05 "
                "are customary"
            )

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        away = torch.expm1(batch.log_importance_ratio)
        u = torch.where(advantages > 0, self.positive * away, self.negative * away)
        # Rounding can exceed the maximum of 1.
        return (4 * torch.sigmoid(u) * torch.sigmoid(-u)).clamp(max=1.0)

    def formula(self) -> Formula:
        tau = f"{self.positive:g} if A>0 else {self.negative:g}"
        latex = rf"\tau={self.positive:g}\ (\hat A>0),\ {self.negative:g}\ (\hat A\le 0)"
        return Formula(f"4σ(u)(1−σ(u)), u = τ(r−1), τ = {tau}", rf"4\sigma(u)(1-\sigma(u)),\ u=\tau(r-1),\ {latex}")


@dataclass(frozen=True)
class AllOf(StabilizationMask):
    """The product of several masks: a token is updated only if every mask allows it."""

    masks: tuple[StabilizationMask, ...]
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView, advantages: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        values = [mask(batch, advantages) for mask in self.masks]
        return (
            torch.stack([value.expand(batch.response_mask.shape) for value in values]).prod(dim=0)
            if values
            else like(batch, 1.0)
        )

    def formula(self) -> Formula:
        return times([mask.formula() for mask in self.masks])
