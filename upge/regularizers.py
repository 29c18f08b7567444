"""Additive penalties that are not products of the four factors. A gradient flows through them by autograd.

Each is added to the loss as coefficient × Σ w·penalty over the trajectories of its source that count in some term.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import Component, Formula
from upge.reduction import Reduction
from upge.trajectories import Trajectories

Source = Literal["rollouts", "demonstrations", "preference_pairs", "all"]


class Regularizer(Component):
    """A penalty per token. Every concrete regularizer has the fields `coefficient`, `reduction` and `source`."""

    coefficient: float
    reduction: Reduction
    source: Source

    @abstractmethod
    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        """[B, T] penalty per token, with gradient."""


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

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        return -batch.entropies

    def formula(self) -> Formula:
        (text, latex), size = _sign(self.coefficient), f"{abs(self.coefficient):g}"
        return Formula(f"{text} {size}·∇H", rf"{latex}{size}\,\nabla H")


@dataclass(frozen=True)
class KLPenalty(Regularizer):
    """KL(π_θ‖π_frozen) by one of the sample estimators, with d = log π_frozen - log π_θ:

    'k3': e^d - d - 1. Its gradient on on-policy samples is in expectation that of KL(π_frozen‖π_θ) (forward).
    'k2': d²/2. Its gradient is in expectation that of KL(π_θ‖π_frozen): the right one for the reverse KL.
    'k1': -d. As a loss its gradient is a constant times ∇log π_θ, in expectation zero on-policy: it regularises
    nothing.
    """

    coefficient: float
    reduction: Reduction
    kind: Literal["k1", "k2", "k3"] = "k3"
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "reference_logprobs"})

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        log_ratio = batch.reference_logprobs - batch.logprobs
        if self.kind == "k1":
            return -log_ratio
        return log_ratio.square() / 2 if self.kind == "k2" else torch.expm1(log_ratio) - log_ratio

    def formula(self) -> Formula:
        (text, latex), size = _sign(-self.coefficient), f"{abs(self.coefficient):g}"
        return Formula(
            f"{text} {size}·∇{self.kind}(π_θ, π_frozen)",
            rf"{latex}{size}\,\nabla\mathrm{{{self.kind}}}(\pi_\theta,\pi_{{frozen}})",
        )
