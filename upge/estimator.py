"""The unified gradient: the product of four parts, one per slot (UPGE, arXiv 2509.04419, Eq. 6)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import (
    AdvantageEstimator,
    Component,
    LikelihoodGradient,
    ReferenceDenominator,
    StabilizationMask,
)
from upge.components.likelihood import PolicyLikelihood
from upge.errors import ConfigError
from upge.formula import Formula
from upge.trajectories import Trajectories
from upge.views import LIVE_COLUMNS, TokenView


class Factors(NamedTuple):
    """The four factors per token, detached. `shape` is f′(π_θ), which is 1 for the plain likelihood gradient."""

    mask: Tensor
    log_denominator: Tensor
    advantages: Tensor
    shape: Tensor


class TermFactors(NamedTuple):
    """The factors of one term, each [B, T] (packed tokens: [N]) and detached.

    Their product is the number in front of each token's ∇log π_θ:

        weights = gate · reduction · mask · advantages · shape · exp(log π_θ - log_denominator)

    `gate` includes the term's coefficient, and `shape` is f′(π_θ). On a support with candidates other than the sampled
    token, `advantages` are Σ_v π_θ(v)·Â_v, `weights` are Σ_v |k_v| including gate and reduction, and `mask` and `shape`
    are 1.
    """

    mask: Tensor
    log_denominator: Tensor
    advantages: Tensor
    shape: Tensor
    gate: Tensor
    reduction: Tensor
    weights: Tensor


def call_problem(part: Component) -> str | None:
    """Why a part of an estimator cannot be called with its arguments, with the fix; None if it can."""
    sees = part.sees_advantages and not isinstance(part, AdvantageEstimator)
    takes = ("batch", "advantages") if sees else ("batch",)
    try:
        inspect.signature(part.__call__).bind(*takes)
    except TypeError:
        return (
            f"{type(part).__name__} is called with ({', '.join(takes)}), which its `__call__` does not take; set "
            "`sees_advantages = True` in the class if it takes the advantages"
        )
    return None


@dataclass(frozen=True)
class UnifiedGradient:
    """1_stable · (1/π_ref) · Â · f′(π_θ)∇π_θ, as one detached number per token in front of ∇log π_θ:

        weight = mask · Â · f′ · exp(log π_θ - log π_ref).

    It is evaluated in the leading shape of the batch: [B, T], or [N] packed tokens if every part has reach 'token'.

    Attributes:
        mask: 1_stable.
        denominator: 1/π_ref.
        advantage: Â.
        likelihood: f′.
    """

    mask: StabilizationMask
    denominator: ReferenceDenominator
    advantage: AdvantageEstimator
    likelihood: LikelihoodGradient = PolicyLikelihood()

    def __post_init__(self) -> None:
        check_fields(self)
        for slot, part in self.parts.items():
            if problem := call_problem(part):
                raise ConfigError(f"estimator.{slot}: {problem}")

    @property
    def parts(self) -> dict[str, Component]:
        """The four parts by slot."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def factors(self, batch: TokenView) -> Factors:
        """The four factors on `batch`. Each part sees only the columns that it declares."""
        advantages = self.advantage(self.advantage.view(batch)).detach()

        def value(part: Component) -> Tensor:
            return part(part.view(batch), *([advantages] if part.sees_advantages else [])).detach()

        return Factors(value(self.mask), value(self.denominator), advantages, value(self.likelihood).exp())

    def weight(self, batch: TokenView, factors: Factors | None = None) -> Float[Tensor, "*shape"]:
        """The number in front of each token's ∇log π_θ.

        A token whose mask or advantage is 0 gets exactly 0, even if its ratio overflows.
        """
        mask, log_denominator, advantages, shape = factors or self.factors(batch)
        signed = mask * advantages
        # A single exponential, so that a shape of 0 gives 0 even where the ratio alone would overflow.
        ratio = torch.exp(batch.logprobs.detach() - log_denominator + shape.log())
        return torch.where(signed == 0, torch.zeros_like(ratio), signed * ratio)

    def precompute_parts(self, batch: Trajectories, live: frozenset[str] = LIVE_COLUMNS) -> UnifiedGradient:
        """This estimator with every part that reads none of the columns `live` replaced by its values on `batch`."""
        parts: dict[str, Any] = {slot: part.precomputed(batch, live) for slot, part in self.parts.items()}
        return UnifiedGradient(**parts)

    def formula(self) -> Formula:
        """The formula of the product, without factors of 1."""
        printed = [part.formula() for part in self.parts.values()]
        return Formula(
            " · ".join(p.text for p in printed if p.text != "1"),
            r"\cdot ".join(p.latex for p in printed if p.latex != "1"),
        )
