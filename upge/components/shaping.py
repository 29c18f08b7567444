"""Advantages that wrap another advantage and change its values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, Component, walk
from upge.components.mask import RATIO_COLUMNS
from upge.components.returns import KLKind, discounted_sum, kl_value
from upge.components.rewards import check_reads_total
from upge.errors import ConfigError
from upge.formula import Formula, tex
from upge.views import LIVE_COLUMNS, TokenView, TrajectoryView, masked_mean


@dataclass(frozen=True)
class KLShaped(AdvantageEstimator):
    """Â_t - coefficient·k_t: a KL penalty towards another policy as part of the reward.

    See arXiv 2509.04419, appendix B.2. k_t is computed from the current policy without gradient: with
    d = log π_other - log π_θ, it is -d (k1), d²/2 (k2) or e^d - d - 1 (k3).

    With `future` the penalty of a token is the sum over all tokens from its own on: Â_t - coefficient·Σ_{k≥t} k_k.
    On-policy, with k1 and the current policy as denominator, this is the unbiased gradient of the KL of the whole
    response. Without `future`, the effect of a token on the KL of later tokens is missing.

    Attributes:
        coefficient: the reward lost per nat.
        towards: the other policy: 'reference' = π_0; 'behavior' = the policy that generated the data.
    """

    advantage: AdvantageEstimator
    coefficient: float = 0.001
    kind: KLKind = "k1"
    future: bool = False
    towards: Literal["reference", "behavior"] = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.coefficient):
            raise ConfigError(f"KLShaped.coefficient: {self.coefficient} must be finite")

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a setting
        """The log-probs of the two policies."""
        return frozenset({"logprobs", f"{self.towards}_logprobs"})

    @property
    def reach(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a setting
        """'trajectory' with `future`, which reads later tokens, else 'token'."""
        return "trajectory" if self.future else "token"

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        other = batch.reference_logprobs if self.towards == "reference" else batch.log_behavior
        penalty = kl_value(other - batch.logprobs.detach(), self.kind)
        if self.future:
            penalty = (penalty * batch.response_mask).flip(1).cumsum(dim=1).flip(1)
        return self.advantage(batch) - self.coefficient * penalty

    def formula(self) -> Formula:
        inner = self.advantage.formula()
        other, latex_other = ("π_0", r"\pi_0") if self.towards == "reference" else ("π_old", r"\pi_{old}")
        text = f"log(π_θ/{other})" if self.kind == "k1" else f"{self.kind}(π_θ, {other})"
        latex = rf"\log\frac{{\pi_\theta}}{{{latex_other}}}"
        latex = latex if self.kind == "k1" else rf"\mathrm{{{self.kind}}}(\pi_\theta,{latex_other})"
        sums = ("Σ_{k≥t} ", r"\sum_{k\ge t}") if self.future else ("", "")
        return Formula(
            f"[{inner.text} − {self.coefficient:g}·{sums[0]}{text}]",
            rf"\left[{inner.latex}-{tex(self.coefficient)}{sums[1]}{latex}\right]",
        )


@dataclass(frozen=True)
class FutureKLShaped(AdvantageEstimator):
    """Â_t·clip(exp Σ_{k≥t} γ^(k-t)·log r_k, low, high), r = π_θ/π_behavior, γ = 2^(-1/half_life) (arXiv 2603.19835).

    A token counts more if what follows it in its response has become more likely since the rollout. The factor is
    detached and positive, so a mask sees the sign of Â.

    Attributes:
        half_life: distance in tokens at which a later token counts half; inf = all count the same.
        low, high: bounds of the factor, which is 1 on-policy.
        outlier: tokens with r above this bound are left out of the sums; None = none.
        safe: where Â < 0 and r is above this bound, the factor is at most 1; None = nowhere.
    """

    advantage: AdvantageEstimator
    half_life: float = 32.0
    low: float = 1.0
    high: float = 1.2
    outlier: float | None = 10.0
    safe: float | None = 4.0
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.half_life > 0 and 0 < self.low <= 1 <= self.high < math.inf):
            raise ConfigError(
                f"FutureKLShaped: half_life={self.half_life}, low={self.low}, high={self.high}; the half-life must be "
                "positive, and the bounds of the factor positive and finite with low <= 1 <= high"
            )
        for name in ("outlier", "safe"):
            if (bound := getattr(self, name)) is not None and bound <= 1:
                raise ConfigError(
                    f"FutureKLShaped.{name}: {bound} bounds a ratio that is 1 on-policy; give more than 1"
                )

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        log_ratio, advantages = batch.log_importance_ratio, self.advantage(batch)
        counted = log_ratio
        if self.outlier is not None:
            counted = torch.where(log_ratio > math.log(self.outlier), 0.0, log_ratio)
        future = discounted_sum(counted, batch.response_mask, 2.0 ** (-1 / self.half_life))
        factor = future.clamp(math.log(self.low), math.log(self.high)).exp()
        if self.safe is not None:
            factor = torch.where((advantages < 0) & (log_ratio > math.log(self.safe)), factor.clamp(max=1.0), factor)
        return advantages * factor

    def formula(self) -> Formula:
        inner, bounds = self.advantage.formula(), f"{self.low:g}, {self.high:g}"
        return Formula(
            f"{inner.text} · clip(exp Σ_{{k≥t}} 2^((t−k)/{self.half_life:g})·log r_k, {bounds})",
            rf"{inner.latex}\,\mathrm{{clip}}\Big(\exp\sum_{{k\ge t}}2^{{(t-k)/{self.half_life:g}}}\log r_k,"
            rf"{bounds}\Big)",
        )


@dataclass(frozen=True)
class Whitened(AdvantageEstimator):
    """(Â - mean Â)/√(var Â + epsilon), with mean and variance over the rollouts of the batch (arXiv 2501.03262).

    The variance is the unbiased one. Demonstrations are whitened with the rollouts' mean and variance. All values are 0
    if the mean is over fewer than two numbers.

    Attributes:
        over: 'tokens' = mean and variance over rollout tokens; 'rollouts' = over one number per rollout, the mean Â of
            its tokens, so that long responses do not count more (arXiv 2601.05242).
    """

    advantage: AdvantageEstimator
    epsilon: float = 1e-8
    over: Literal["tokens", "rollouts"] = "tokens"
    reads: ClassVar[frozenset[str]] = frozenset({"is_demonstration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon <= 0:
            raise ConfigError(f"Whitened.epsilon: {self.epsilon} must be positive; 1e-8 is customary")
        if self.advantage.is_live:
            raise ConfigError(
                f"Whitened.advantage: {type(self.advantage).__name__} depends on the current policy, but mean and "
                "variance are taken over the whole batch before any forward pass; wrap Whitened in that advantage "
                "instead, or give an advantage that reads neither logprobs nor entropies"
            )

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        values, mask = self.advantage(batch).double(), batch.response_mask
        counted, samples = mask & ~batch.is_demonstration[:, None], values
        if self.over == "rollouts":
            counted, samples = counted.any(dim=1, keepdim=True), masked_mean(values, mask)
        number = int(counted.sum())
        if number < 2:
            return torch.zeros_like(values)
        samples = torch.where(counted, samples, 0.0)
        # Advantages relative to a group add up to 0 except for rounding. Subtracting the rounding error would give
        # groups whose advantages are all 0 tiny non-zero ones.
        total, rounding = samples.sum(), number * torch.finfo(samples.dtype).eps * samples.abs().sum()
        mean = torch.where(total.abs() <= rounding, 0.0, total / number)
        variance = torch.where(counted, (samples - mean).square(), 0.0).sum() / (number - 1)
        return torch.where(mask, (values - mean) / (variance + self.epsilon).sqrt(), 0.0)

    def formula(self) -> Formula:
        inner, over = self.advantage.formula(), "" if self.over == "tokens" else "_τ"
        latex_over = "" if self.over == "tokens" else r"_{\tau}"
        return Formula(f"white{over}({inner.text})", rf"\mathrm{{white}}{latex_over}\left({inner.latex}\right)")


@dataclass(frozen=True)
class Tempered(AdvantageEstimator):
    """Â/(1 + temperature) (arXiv 2501.12599).

    This is the advantage under a KL penalty of strength `temperature` towards the policy before the update.
    """

    advantage: AdvantageEstimator
    temperature: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0:
            raise ConfigError(f"Tempered.temperature: {self.temperature} must not be negative; 1.0 is customary")

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return self.advantage(batch) / (1 + self.temperature)

    def formula(self) -> Formula:
        inner, divisor = self.advantage.formula(), f"{1 + self.temperature:g}"
        return Formula(f"{inner.text}/{divisor}", rf"\frac{{{inner.latex}}}{{{divisor}}}")


@dataclass(frozen=True)
class PrefixWeighted(AdvantageEstimator):
    """Â_t·(1 + gamma·(1 - Σ_{k<t}|Â_k| / Σ_k|Â_k|)) (arXiv 2606.22600).

    The weight is 1 + gamma at the first token. It falls towards 1 as the share of the response's total |Â| that earlier
    tokens have grows.
    """

    advantage: AdvantageEstimator
    gamma: float = 0.5
    reads: ClassVar[frozenset[str]] = frozenset()
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"PrefixWeighted.gamma: {self.gamma} must be finite and not negative; 0.5 is customary")

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        values = self.advantage(batch)
        size = values.abs() * batch.response_mask
        total = size.sum(dim=1, keepdim=True)
        before = size.cumsum(dim=1) - size
        share = before / torch.where(total == 0, torch.ones_like(total), total)
        return values * (1 + self.gamma * (1 - share))

    def formula(self) -> Formula:
        inner, gamma = self.advantage.formula(), f"{self.gamma:g}"
        return Formula(
            f"{inner.text}·(1 + {gamma}·(1 − Σ_{{k<t}}|Â_k|/Σ_k|Â_k|))",
            rf"{inner.latex}\left(1+{gamma}\left(1-\frac{{\sum_{{k<t}}|\hat A_k|}}{{\sum_k|\hat A_k|}}\right)\right)",
        )


@dataclass(frozen=True)
class Shifted(AdvantageEstimator):
    """Â - delta: the baseline shifted by delta (arXiv 2506.20520).

    A negative delta lowers the baseline. Good responses are then reinforced more than bad ones are suppressed, which
    stabilizes off-policy learning.
    """

    advantage: AdvantageEstimator
    delta: float = -0.1
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return self.advantage(batch) - self.delta

    def formula(self) -> Formula:
        inner, sign = self.advantage.formula(), ("−", "-") if self.delta >= 0 else ("+", "+")
        size = f"{abs(self.delta):g}"
        return Formula(f"[{inner.text} {sign[0]} {size}]", rf"\left[{inner.latex}{sign[1]}{size}\right]")


@dataclass(frozen=True)
class OverlongShaped(AdvantageEstimator):
    """The inner Â of the rewards R - penalty·clip((|τ| - s)/(limit - s), 0, 1), s = limit·(1 - buffer).

    This is the soft overlong punishment of arXiv 2503.14476, Eq. 13. Gates and pass rates read the verifier's rewards
    without the penalty. |τ| includes the tokens of a demonstration that a rollout continues, because the limit
    includes them.

    Attributes:
        advantage: the inner advantage. Demonstrations keep their rewards.
        limit: number of tokens from which the full penalty applies, usually the run's response limit.
        buffer: the share of the limit over which the penalty rises.
        penalty: the full penalty. 0.5 for rewards in [0, 1] corresponds to 1 for the rewards ±1 of the paper.
    """

    advantage: AdvantageEstimator
    limit: int
    buffer: float = 0.2
    penalty: float = 0.5
    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "is_demonstration"})
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1 or not 0 < self.buffer <= 1 or not 0 <= self.penalty < math.inf:
            raise ConfigError(
                f"OverlongShaped: limit={self.limit}, buffer={self.buffer}, penalty={self.penalty}; the limit is a "
                "number of tokens, the buffer a share of it in (0, 1], and the penalty finite and not negative"
            )
        check_reads_total(self.advantage, "OverlongShaped")
        for path, part in walk(self.advantage, "advantage"):
            if not getattr(part, "graded", True):
                raise ConfigError(
                    f"OverlongShaped.{path}: {type(part).__name__} only checks whether a reward is a success, so a "
                    "penalty would change nothing or turn a success into a failure; give an advantage of the reward "
                    "itself, such as upge.GroupRelative"
                )

    @property
    def _start(self) -> float:
        return self.limit * (1 - self.buffer)

    def shaped(self, batch: TrajectoryView) -> TrajectoryView:
        """The batch, or a view of it, with the penalized rewards."""
        excess = ((batch.limited_lengths.double() - self._start) / (self.limit - self._start)).clamp(0, 1)
        excess = excess * (~batch.is_demonstration).double()
        return batch.with_rewards(batch.rewards.double() - self.penalty * excess)

    def precompute_parts(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """This part with the wrapped advantage precomputed on the penalized rewards."""
        return dataclasses.replace(self, advantage=self.advantage.precomputed(self.shaped(batch), live))

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        return self.advantage(self.shaped(batch))

    def formula(self) -> Formula:
        inner, start, width = self.advantage.formula(), self._start, self.limit - self._start
        return Formula(
            f"[{inner.text}, R ← R − {self.penalty:g}·clip((|τ| − {start:g})/{width:g}, 0, 1)]",
            rf"\left[{inner.latex}\right]_{{R\leftarrow R-{self.penalty:g}\,"
            rf"\mathrm{{clip}}\left((|\tau|-{start:g})/{width:g},0,1\right)}}",
        )
