"""How ∇π_θ enters: plain, or as the gradient of a function of the likelihood, ∇f(π_θ) = f′(π_θ)∇π_θ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from upge.components.base import Formula, LikelihoodGradient, like
from upge.errors import ConfigError
from upge.trajectories import TokenView


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
    """∇f(π_θ) with f(p) = p/(p + γ), f′ = γ/(p + γ)²: the shaping of arXiv 2504.14945, which lifts tokens that
    the policy finds unlikely. With the unit denominator the factor of ∇log π_θ is γp/(p + γ)², largest at p = γ.
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
