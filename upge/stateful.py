"""Stateful gates: gates with a variable that is updated from step to step, logged, and saved in checkpoints.

The gate itself is a pure function. The variable's value is in `Trajectories.state`, under the name `variable`. After
each step the trainer calls the gate's `updated` for the next value. Two gates with the same variable share its value
and must be equal.
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

#: A signal that the trainer computes only for gates that want it. The other signals are the metrics of a run.
UTILITY_SLOPE = "utility_slope"


@dataclass(frozen=True)
class StatefulGate(Gate):
    """A gate whose coefficient is the current value of `variable`.

    Attributes:
        variable: name of the variable.
        wants: class attribute; the signals that `updated` needs. 'utility_slope' is the derivative, with respect to
            the variable, of the gain in the algorithm's `validation` objective from one plain gradient step with the
            current learning rate. It takes two more passes over a batch, in the steps that are `due`. Every other
            name is a metric in metrics.jsonl. time/total is not available, because it is recorded last.
    """

    variable: str
    reads: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def initial(self) -> float:
        """The value before the first step."""

    @abstractmethod
    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        """The value for the next step, from the current one and the signals that `wants` names."""

    def due(self, step: int) -> bool:
        """True if `updated` is called at the end of step `step` (counted from 0)."""
        return True

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        value = batch.state.get(self.variable, self.initial())
        return torch.full((len(batch),), value, dtype=torch.float64, device=batch.response_mask.device)

    def formula(self) -> Formula:
        return Formula(f"{self.variable}ₖ", rf"\mathrm{{{self.variable}}}_k")


@dataclass(frozen=True)
class MetaGradient(StatefulGate):
    """μ, updated every `every` steps to improve a held-out objective and to keep the entropy near a target:

        μ ← clip(μ + rate·g + entropy_rate·(target_entropy - H), low, high).

    g is the derivative with respect to μ of the utility U = -L_val after one gradient step θ′ = θ - lr·∇L(μ). For the
    loss L = (1-μ)·L_1 + μ·L_2, dU/dμ = +lr·⟨∇L_val, ∇L_2 - ∇L_1⟩: μ increases if the second term's gradient is better
    aligned with the held-out gradient than the first one's. H is the mean token entropy of the step's rollouts (nats).

    Attributes:
        variable: name of the variable.
        start: value before the first step.
        rate: step size for g.
        entropy_rate: step size for the distance to the target entropy.
        target_entropy: target of H (nats).
        low, high: bounds of μ.
        every: number of steps between updates.
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
        """True every `every` steps: at the end of steps every, 2·every, ..., counted from 1."""
        return (step + 1) % self.every == 0

    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        """The rule above, from `utility_slope` and `entropy`."""
        moved = value + self.rate * signals[UTILITY_SLOPE]
        moved += self.entropy_rate * (self.target_entropy - signals["entropy"])
        return min(max(moved, self.low), self.high)  # in this order NaN stays NaN

    def formula(self) -> Formula:
        return Formula("μₖ" if self.variable == "mu" else f"{self.variable}ₖ", r"\mu_k")


def stateful_gates(parts: Mapping[str, Component]) -> dict[str, StatefulGate]:
    """Variable → gate, for all stateful gates among `parts` and the parts that these wrap.

    Raises:
        ConfigError: two different gates share one variable.
    """
    gates: dict[str, StatefulGate] = {}
    for path, part in parts.items():
        if isinstance(part, StatefulGate):
            first = gates.setdefault(part.variable, part)
            if first != part:
                raise ConfigError(
                    f"{path}: {part!r} shares the variable '{part.variable}' with {first!r}; give both the same "
                    "settings (an interpolation of the other is enough), or another `variable`"
                )
        for name, gate in stateful_gates({f"{path}.{n}": p for n, p in part.parts.items()}).items():
            if gates.setdefault(name, gate) != gate:
                raise ConfigError(f"{path}: two different gates share the variable '{name}'; give them equal settings")
    return gates
