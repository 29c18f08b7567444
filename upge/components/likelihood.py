"""The likelihood gradient: ∇π_θ itself, or the gradient of a function of the likelihood, ∇f(π_θ) = f′(π_θ)∇π_θ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from upge.components.base import LikelihoodGradient, like
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import TokenView


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
