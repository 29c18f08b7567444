"""Stateful gates: a number that is carried from step to step, logged, and kept in checkpoints.

The gate itself stays a pure function. The number lives in `Trajectories.state` under the gate's `variable`; after each
step the trainer asks the gate for the next one. Two gates with one variable share its number and must be equal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import Component
from upge.errors import ConfigError
from upge.formula import Formula
from upge.gates import Gate
from upge.views import TrajectoryView

#: What the trainer can tell a gate after a step; any figure of metrics.jsonl besides.
UTILITY_SLOPE = "utility_slope"


@dataclass(frozen=True)
class StatefulGate(Gate):
    """A gate whose coefficient is the present value of `variable`.

    Class attributes:
        wants: the signals that `updated` needs. 'utility_slope' is the derivative, by the variable, of what the
            algorithm's `validation` objective gains from one plain gradient step of the present learning rate; it
            costs two more passes, made only in the steps that are `due`. Every other name is a figure of
            metrics.jsonl, except time/total, which comes last.
    """

    variable: str
    reads: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def initial(self) -> float:
        """The value before the first step."""

    @abstractmethod
    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        """The value of the next step, from the present one and what `wants` names."""

    def due(self, step: int) -> bool:
        """True if the step (counted from 0) ends with `updated`."""
        return True

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        value = batch.state.get(self.variable, self.initial())
        return torch.full((len(batch),), value, dtype=torch.float64, device=batch.response_mask.device)

    def formula(self) -> Formula:
        return Formula(f"{self.variable}ₖ", rf"\mathrm{{{self.variable}}}_k")


@dataclass(frozen=True)
class MetaGradient(StatefulGate):
    """μ, moved every `every` steps towards what helps a held-out objective, and by the entropy's distance to a target:

        μ ← clip(μ + rate·g + entropy_rate·(target_entropy - H), low, high).

    g is the derivative of the utility U = -L_val by μ after one gradient step θ′ = θ - lr·∇L(μ). Where the loss is
    L = (1-μ)·L_1 + μ·L_2, dU/dμ = +lr·⟨∇L_val, ∇L_2 - ∇L_1⟩: μ rises where the second term's gradient is the better
    aligned with the held-out one. H is the mean token entropy of the step's rollouts (nats).
    """

    variable: str = "mu"
    start: float = 0.8
    rate: float = 1e-4
    entropy_rate: float = 5e-4
    target_entropy: float = 0.5
    low: float = 0.05
    high: float = 0.95
    every: int = 20
    wants: ClassVar[frozenset[str]] = frozenset({UTILITY_SLOPE, "entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.start <= self.high <= 1:
            raise ConfigError(
                f"MetaGradient: low={self.low}, start={self.start}, high={self.high}; "
                "need 0 <= low <= start <= high <= 1"
            )
        if self.every < 1:
            raise ConfigError(f"MetaGradient.every: {self.every} must be at least 1 step")

    def initial(self) -> float:
        """`start`."""
        return self.start

    def due(self, step: int) -> bool:
        """Each `every` steps, at the end of steps every, 2·every, ... counted from 1."""
        return (step + 1) % self.every == 0

    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        """The rule above, from `utility_slope` and `entropy`."""
        moved = value + self.rate * signals[UTILITY_SLOPE]
        moved += self.entropy_rate * (self.target_entropy - signals["entropy"])
        return min(self.high, max(self.low, moved))

    def formula(self) -> Formula:
        return Formula("μₖ" if self.variable == "mu" else f"{self.variable}ₖ", r"\mu_k")


def stateful_gates(parts: Mapping[str, Component]) -> dict[str, StatefulGate]:
    """Variable → gate, of all stateful gates among `parts` and what these wrap.

    Raises:
        ConfigError: two different gates claim one variable.
    """
    found: dict[str, StatefulGate] = {}
    for path, part in parts.items():
        if isinstance(part, StatefulGate):
            first = found.setdefault(part.variable, part)
            if first != part:
                raise ConfigError(
                    f"{path}: {part!r} shares the variable '{part.variable}' with {first!r}; give both the same "
                    "settings (an interpolation of the other will do), or another `variable`"
                )
        for name, gate in stateful_gates({f"{path}.{n}": p for n, p in part.parts.items()}).items():
            if found.setdefault(name, gate) != gate:
                raise ConfigError(f"{path}: two different gates share the variable '{name}'; give them equal settings")
    return found
