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
from upge.gates import Gate, Schedule
from upge.views import TrajectoryView

#: A signal that the trainer computes only for gates that want it. The other signals are the metrics of a run.
UTILITY_SLOPE = "utility_slope"
#: Signals that the trainer also computes only for gates that want them, see `upge.gradient_noise`.
GRADIENT_NOISE = ("rollout_noise", "demonstration_noise", "disagreement")


@dataclass(frozen=True)
class StatefulGate(Gate):
    """A gate whose coefficient is the current value of `variable`.

    Attributes:
        variable: name of the variable.
        wants: class attribute; the signals that `updated` needs. 'utility_slope' is the derivative, with respect to
            the variable, of the gain in the algorithm's `validation` objective from one plain gradient step with the
            current learning rate. It takes two more passes over a batch, in the steps that are `due`. The signals of
            `upge.gradient_noise` take one more forward pass, in the steps that are `measured`. In other steps they keep
            their value. 'step' is the number of steps of the stage so far. Every other name is a metric in
            metrics.jsonl. time/total is not available, because it is recorded last.
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

    def measured(self, step: int) -> bool:
        """True if step `step` (counted from 0) measures the gradients' noise."""
        return self.due(step)

    def tracked(self, before: float | None, measured: float) -> float:
        """The value of a signal that `updated` gets, from its last value (None at first) and a new measurement."""
        return measured

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


@dataclass(frozen=True)
class NoiseBalanced(StatefulGate):
    """The share μ of demonstrations that minimizes the mean squared error of the mixed gradient (arXiv 2605.26184).

    If the gradients have noise of variance σ_s² (demonstrations) and σ_r² (rollouts) and their means are Δ apart, the
    mixture μ·g_s + (1-μ)·g_r is closest to α·E g_s + (1-α)·E g_r, in mean square, at

        μ* = (α·Δ² + σ_r²) / (Δ² + σ_s² + σ_r²).

    Δ², σ_s² and σ_r² are those of `upge.gradient_noise`: exponential means over the steps that measure them. After
    every step, with the prior p of the next one,

        μ ← clip(μ + clip(λ·clip(β·μ + (1-β)·μ*, low, high) + (1-λ)·p - μ, -change, change), low, high).

    Attributes:
        variable: name of the variable.
        start: value before the first step.
        target: α, the share of demonstrations in the target gradient.
        smoothing: β, which the exponential means also use.
        prior: p as a function of the step.
        blend: λ, the weight of the estimate; the prior has 1 - λ.
        change: largest change of μ in one step.
        low, high: bounds of μ.
        every: number of steps between two measurements, the first of which is in the first step.
    """

    variable: str = "mu"
    start: float = 0.5
    target: float = 0.5
    smoothing: float = 0.99
    prior: Schedule = Schedule(start=0.0, peak=0.85, end=0.15, warmup=200, decay=800)
    blend: float = 0.5
    change: float = 0.01
    low: float = 0.05
    high: float = 0.9
    every: int = 10
    wants: ClassVar[frozenset[str]] = frozenset({*GRADIENT_NOISE, "step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.start <= self.high <= 1:
            raise ConfigError(
                f"NoiseBalanced: low={self.low}, start={self.start}, high={self.high}; "
                "need 0 <= low <= start <= high <= 1"
            )
        for name in ("target", "smoothing", "blend"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"NoiseBalanced.{name}: {getattr(self, name)} must be between 0 and 1")
        if self.every < 1:
            raise ConfigError(f"NoiseBalanced.every: {self.every} must be at least 1 step")
        if self.change < 0:
            raise ConfigError(f"NoiseBalanced.change: {self.change} must not be negative")

    def initial(self) -> float:
        """`start`."""
        return self.start

    def measured(self, step: int) -> bool:
        """True every `every` steps, including the first."""
        return step % self.every == 0

    def tracked(self, before: float | None, measured: float) -> float:
        """The exponential mean, which begins with the first measurement."""
        return measured if before is None else self.smoothing * before + (1 - self.smoothing) * measured

    def best(self, signals: Mapping[str, float]) -> float | None:
        """μ*; None if the two gradients have neither noise nor a distance."""
        noise, of_demonstrations, apart = (signals[name] for name in GRADIENT_NOISE)
        total = noise + of_demonstrations + apart
        return (self.target * apart + noise) / total if total > 0 else None

    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        """The rule above."""
        best = self.best(signals)
        estimate = value if best is None else self.smoothing * value + (1 - self.smoothing) * best
        prior = self.prior.coefficient_at(int(signals["step"]))
        moved = self.blend * self._bounded(estimate) + (1 - self.blend) * prior - value
        return self._bounded(value + min(max(moved, -self.change), self.change))

    def _bounded(self, value: float) -> float:
        return min(max(value, self.low), self.high)

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
