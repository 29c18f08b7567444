"""The critic's objective. It is separate because it has its own parameters and is not a product of the four factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, Component
from upge.components.shaping import Whitened
from upge.errors import ConfigError
from upge.formula import Formula
from upge.reduction import Reduction, TokenMean
from upge.views import TrajectoryView


@dataclass(frozen=True)
class ValueLoss(Component):
    """½·Σ w·max((V - R)², (clip(V, V_old ± clip) - R)²) over rollouts, with R = Â + V_old.

    V_old is the critic's value before the step's updates, and R is the return that follows from the advantage. This is
    the loss of the implementation of arXiv 1707.06347.

    Attributes:
        returns: the advantage Â, without whitening.
        clip: distance from V_old beyond which moving V further does not lower the loss; None = plain squared error.
        reduction: the weights w, over the rollouts that count.
        coefficient: a constant factor. The critic has its own optimizer, so it matters only for gradient clipping.
    """

    returns: AdvantageEstimator
    clip: float | None = 0.2
    reduction: Reduction = TokenMean()
    coefficient: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset({"values", "is_demonstration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"ValueLoss.clip: {self.clip} must be positive; 0.2 is customary, null for no clipping")
        if not 0 < self.coefficient < math.inf:
            raise ConfigError(f"ValueLoss.coefficient: {self.coefficient} must be positive and finite")
        if isinstance(self.returns, Whitened):
            raise ConfigError("ValueLoss.returns: Whitened is not on the scale of the values; give what it wraps")
        if self.returns.is_live:
            raise ConfigError(
                f"ValueLoss.returns: {type(self.returns).__name__} reads the current policy, but a return must be "
                "known before the forward pass; give the plain advantage, such as upge.GAE"
            )

    def targets(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        """[B, T] the returns Â + V_old on the whole batch, before the forward pass."""
        return self.returns(self.returns.view(batch)).detach() + batch.values.double()

    def weights(self, batch: TrajectoryView, active: Tensor) -> Float[Tensor, "B T"]:
        """[B, T] coefficient·w.

        Args:
            batch: the whole batch.
            active: [B] True for the trajectories that count; demonstrations among them are left out.
        """
        rows = active & ~batch.is_demonstration
        return self.coefficient * self.reduction(self.reduction.view(batch), rows)

    def __call__(
        self, values: Float[Tensor, "B T"], old: Float[Tensor, "B T"], targets: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """[B, T] the loss of each token, before it is multiplied by `weights`.

        Args:
            values: the critic's values, with gradient.
            old: the values before the step's updates.
            targets: the returns.
        """
        error = (values - targets).square()
        if self.clip is not None:
            near = torch.minimum(torch.maximum(values, old - self.clip), old + self.clip)
            error = torch.maximum(error, (near - targets).square())
        return error / 2

    def formula(self) -> Formula:
        if self.clip is None:
            return Formula("½(V − R)²", r"\tfrac12(V-R)^2")
        return Formula(
            f"½max((V − R)², (clip(V, V_old ± {self.clip:g}) − R)²)",
            rf"\tfrac12\max((V-R)^2,(\mathrm{{clip}}(V,V_{{old}}\pm {self.clip:g})-R)^2)",
        )
