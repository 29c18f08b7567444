"""Additive penalties that are not products of the four factors. A gradient flows through them by autograd.

Each is added to the loss as coefficient × Σ w·penalty over the trajectories of its source that count in some term.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from upge.components.base import Component
from upge.components.returns import KLKind, kl_value
from upge.formula import Formula
from upge.reduction import Reduction
from upge.trajectories import Source
from upge.views import TokenView, View


class Regularizer(Component):
    """A penalty per token. Every concrete regularizer has the fields `coefficient`, `reduction` and `source`."""

    evaluated_separately: ClassVar[frozenset[str]] = frozenset({"reduction"})

    coefficient: float
    reduction: Reduction
    source: Source

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "*shape"]:
        """Penalty per token, with gradient."""


def _sign(number: float) -> tuple[str, str]:
    """As text and as LaTeX; the minus of the text is the typographic one."""
    return ("−", "-") if number < 0 else ("+", "+")


@dataclass(frozen=True)
class EntropyBonus(Regularizer):
    """-H(π_θ(·|t)), the full-vocabulary entropy: its gradient is no multiple of ∇π_θ(y_t), hence additive."""

    coefficient: float
    reduction: Reduction
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return -batch.entropies

    def formula(self) -> Formula:
        (text, latex), size = _sign(self.coefficient), f"{abs(self.coefficient):g}"
        return Formula(f"{text} {size}·∇H", rf"{latex}{size}\,\nabla H")


@dataclass(frozen=True)
class KLPenalty(Regularizer):
    """A penalty on the distance to a frozen policy, token by token, from d = log π_frozen - log π_θ. Its gradient, on
    on-policy samples and in expectation over a token given what stands before it:

    'k3', e^d - d - 1: that of KL(π_frozen‖π_θ), the forward one.
    'k2', d²/2: that of KL(π_θ‖π_frozen), the reverse one.
    'k1', -d: zero, a constant times ∇log π_θ. As a loss it regularises nothing.

    Neither counts what a token does to the distances after it, so for a response of several tokens none is the gradient
    of the KL of whole responses; `upge.KLShaped` with `future` is. docs/theory.md has the figures.
    """

    coefficient: float
    reduction: Reduction
    kind: KLKind = "k3"
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "reference_logprobs"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return kl_value(batch.reference_logprobs.detach() - batch.logprobs, self.kind)

    def formula(self) -> Formula:
        (text, latex), size = _sign(-self.coefficient), f"{abs(self.coefficient):g}"
        return Formula(
            f"{text} {size}·∇{self.kind}(π_θ, π_frozen)",
            rf"{latex}{size}\,\nabla\mathrm{{{self.kind}}}(\pi_\theta,\pi_{{frozen}})",
        )
