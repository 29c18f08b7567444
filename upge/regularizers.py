"""Additive penalties that are not products of the four factors. Their gradient is computed by autograd.

Each adds coefficient · Σ w·penalty to the loss, summed over the trajectories of its source that count in some term.
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
    """A penalty per token.

    Every concrete regularizer has these fields:

    Attributes:
        coefficient: the factor of the penalty in the loss.
        reduction: the weights w.
        source: the trajectories that it applies to.
    """

    evaluated_separately: ClassVar[frozenset[str]] = frozenset({"reduction"})

    coefficient: float
    reduction: Reduction
    source: Source

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "*shape"]:
        """The penalty of each token, with gradient."""


def _sign(number: float) -> tuple[str, str]:
    """The sign of `number` as text, with a typographic minus, and as LaTeX."""
    return ("−", "-") if number < 0 else ("+", "+")


@dataclass(frozen=True)
class EntropyBonus(Regularizer):
    """-H(π_θ(·|t)), the negative full-vocabulary entropy.

    It is additive because its gradient is not a multiple of ∇π_θ(y_t).
    """

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
    """A penalty per token on the distance to the reference policy, a function of d = log π_frozen - log π_θ.

    `kind` selects the function. The expected gradient on on-policy samples, given the tokens before, is

    - 'k3', e^d - d - 1: the gradient of KL(π_frozen‖π_θ), the forward KL;
    - 'k2', d²/2: the gradient of KL(π_θ‖π_frozen), the reverse KL;
    - 'k1', -d: zero, because it is a constant times ∇log π_θ. As a loss, k1 has no effect in expectation.

    None of them includes the effect of a token on later distances, so for responses of several tokens none is the
    gradient of the KL between whole responses. `upge.KLShaped` with `future` is. See docs/theory.md for numbers.
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
