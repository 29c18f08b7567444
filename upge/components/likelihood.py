"""The likelihood gradient: ∇π_θ itself, or the gradient of a function of the likelihood, ∇f(π_θ) = f′(π_θ)∇π_θ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from upge.components.base import LikelihoodGradient, like
from upge.components.mask import RATIO_COLUMNS
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import TokenView, TrajectoryView


@dataclass(frozen=True)
class PolicyLikelihood(LikelihoodGradient):
    """∇π_θ itself: f′ = 1."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "*shape"]:
        return like(batch, 0.0)

    def formula(self) -> Formula:
        return Formula("∇π_θ", r"\nabla\pi_\theta")


@dataclass(frozen=True)
class ShapedLikelihood(LikelihoodGradient):
    """∇f(π_θ) with f(p) = p/(p + γ), so f′(p) = γ/(p + γ)²: the policy shaping of arXiv 2504.14945.

    It increases the weight of tokens that are unlikely under the policy. With `UnitDenominator` the factor in front of
    ∇log π_θ is γp/(p + γ)², which is largest at p = γ.
    """

    gamma: float = 0.1
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise ConfigError(f"ShapedLikelihood.gamma: {self.gamma} must be positive; 0.1 is customary")

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "*shape"]:
        return math.log(self.gamma) - 2 * torch.log(batch.logprobs.detach().exp() + self.gamma)

    def formula(self) -> Formula:
        g = f"{self.gamma:g}"
        return Formula(f"{g}/(π_θ+{g})² · ∇π_θ", rf"\frac{{{g}}}{{(\pi_\theta+{g})^2}}\nabla\pi_\theta")


@dataclass(frozen=True)
class ShapedRatio(LikelihoodGradient):
    """∇f(r) with f(r) = r/(r + β), r = π_θ/π_behavior, so f′(r) = β/(r + β)² (arXiv 2510.02245).

    With `BehaviorPolicy` the factor in front of ∇log π_θ is βr/(r + β)², which is largest at r = β and never exceeds ¼.
    So tokens that have become unlikely weigh more than those that have become likely, and no ratio can dominate.
    """

    beta: float = 0.1
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"ShapedRatio.beta: {self.beta} must be positive and finite; 0.1 is customary")

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "*shape"]:
        log_ratio, log_beta = batch.log_importance_ratio, math.log(self.beta)
        return log_beta - 2 * torch.logaddexp(log_ratio, torch.full_like(log_ratio, log_beta))

    def formula(self) -> Formula:
        b = f"{self.beta:g}"
        return Formula(f"{b}/(r+{b})² · ∇π_θ", rf"\frac{{{b}}}{{(r+{b})^2}}\nabla\pi_\theta")


@dataclass(frozen=True)
class PowerLikelihood(LikelihoodGradient):
    """f′ = π_θ^likely · (1 - π_θ)^unlikely, detached: the relative weight of likely and unlikely tokens.

    likely = unlikely = 1 is the φ of arXiv 2508.11408, largest at π_θ = ½. likely = 0 with unlikely = ½ increases the
    weight of tokens that the policy rarely explores, as in arXiv 2508.00222. With likely = unlikely = 0 the gradient is
    plain. f′ multiplies ∇π_θ/π_ref, so with π_ref = π_θ it is the factor in front of ∇log π_θ.
    """

    likely: float
    unlikely: float
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.likely < 0 or self.unlikely < 0:
            raise ConfigError(
                f"PowerLikelihood: likely={self.likely}, unlikely={self.unlikely}; neither exponent may be negative: "
                "to divide by a power of a probability, choose another denominator"
            )

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "*shape"]:
        logprobs = batch.logprobs.detach()
        shape = torch.zeros_like(logprobs)
        if self.likely:
            shape = shape + self.likely * logprobs
        if self.unlikely:
            # Rounding may give a log-prob of 0 or more. Then 1 - π is set to the smallest positive number.
            rest = (-torch.expm1(logprobs)).clamp(min=torch.finfo(logprobs.dtype).tiny)
            shape = shape + self.unlikely * torch.log(rest)
        return shape

    def formula(self) -> Formula:
        bases = ((self.likely, "π_θ", r"\pi_\theta"), (self.unlikely, "(1−π_θ)", r"(1-\pi_\theta)"))
        factors = [(p, text, latex) for p, text, latex in bases if p]
        text = [t if p == 1 else f"{t}^{p:g}" for p, t, _ in factors]
        latex = [t if p == 1 else f"{t}^{{{p:g}}}" for p, _, t in factors]
        return Formula(" · ".join([*text, "∇π_θ"]), r"\,".join([*latex, r"\nabla\pi_\theta"]))


@dataclass(frozen=True)
class EntropyLikelihood(LikelihoodGradient):
    """f′ = (H_k/scale)^power, H_k the entropy of the k most likely tokens, renormalized (arXiv 2601.02151).

    Positions at which the policy is certain lose their weight, whichever token the demonstration has there. With
    π_ref = π_θ, f′ is the weight of ∇log π_θ, at most (log k/scale)^power.

    Attributes:
        k: number of tokens; a smaller vocabulary is taken whole.
        scale: in nats; log 20 is about 3.
        power: not negative; 0 gives weights of 1.
    """

    k: int = 20
    scale: float = 3.0
    power: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    needs_vocabulary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 2 or not 0 < self.scale < math.inf or not 0 <= self.power < math.inf:
            raise ConfigError(
                f"EntropyLikelihood: k={self.k}, scale={self.scale}, power={self.power}; k must be at least 2, scale "
                "positive, power not negative; 20, 3 and 1 are customary"
            )

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "N V"]:
        logprobs = batch.logprobs.detach()
        likeliest = logprobs.topk(min(self.k, logprobs.shape[-1]), dim=-1, sorted=False).values.log_softmax(dim=-1)
        entropy = -torch.where(likeliest > -math.inf, likeliest.exp() * likeliest, 0.0).sum(dim=-1, keepdim=True)
        shape = self.power * torch.log((entropy / self.scale).clamp(min=torch.finfo(logprobs.dtype).tiny))
        return shape.expand(logprobs.shape)

    def formula(self) -> Formula:
        power = "" if self.power == 1 else f"^{self.power:g}"
        latex = "" if self.power == 1 else f"^{{{self.power:g}}}"
        return Formula(
            f"(H_{self.k}/{self.scale:g}){power} · ∇π_θ",
            rf"\left(\frac{{H_{{{self.k}}}}}{{{self.scale:g}}}\right){latex}\nabla\pi_\theta",
        )


@dataclass(frozen=True)
class GammaLikelihood(LikelihoodGradient):
    """f′ = e^λ·W^k·e^(-λW), W = Π_t π_θ/π_behavior of the whole response, detached (arXiv 2602.10693).

    k and λ are `positive` where Â ≥ 0 and `negative` where Â < 0. f′ is 1 on-policy and largest at W = k/λ. Above this
    W it falls to 0 faster than any power of W, below it like W^k. With π_ref = π_θ, f′ replaces the importance ratio as
    the weight of ∇log π_θ. Unlike a mask, it may exceed 1.

    Attributes:
        positive, negative: the pairs (k, λ).
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS
    reach: ClassVar[str] = "trajectory"
    sees_advantages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= k < math.inf and 0 < rate < math.inf for k, rate in (self.positive, self.negative)):
            raise ConfigError(
                f"GammaLikelihood: positive={list(self.positive)}, negative={list(self.negative)}; each is [k, λ] with "
                "k >= 0 and λ > 0; [2, 3] and [3, 2] are customary"
            )

    def __call__(self, batch: TrajectoryView, advantages: Float[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B T"]:
        log_ratio = batch.log_importance_ratio.sum(dim=1, keepdim=True)
        (up_k, up), (down_k, down) = (
            (k * log_ratio, rate * torch.expm1(log_ratio)) for k, rate in (self.positive, self.negative)
        )
        return torch.where(advantages >= 0, up_k - up, down_k - down)

    def formula(self) -> Formula:
        (k, rate), (down_k, down) = self.positive, self.negative
        pairs = f"k, λ = {k:g}, {rate:g} if A≥0 else {down_k:g}, {down:g}"
        latex = rf"(k,\lambda)=({k:g},{rate:g})\ (\hat A\ge 0),\ ({down_k:g},{down:g})\ (\hat A<0)"
        return Formula(f"W^k·e^(λ(1−W)) · ∇π_θ, {pairs}", rf"W^k e^{{\lambda(1-W)}}\nabla\pi_\theta,\ {latex}")
