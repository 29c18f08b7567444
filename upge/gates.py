"""Per question or per trajectory: the coefficient of a term. A gate is called with the batch and returns [B].

A gate that reads no current log-probs or entropies is known before the forward pass: trajectories whose coefficient it
sets to zero, in every term, never reach the model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.components.advantage import GROUP_COLUMNS
from upge.components.base import REACHES, Component, Precomputed
from upge.errors import ConfigError
from upge.formula import Formula, times
from upge.views import TrajectoryView, View, masked_mean

#: Pass rates are multiples of 1/n; thresholds such as 1/3 must not miss them by rounding.
_TOLERANCE = 1e-9


class Gate(Component):
    """The coefficient of a term."""

    @property
    def live_reach(self) -> str:
        """One number for a whole response: where the current policy has a say in it, it is no matter of one token."""
        return max((super().live_reach, "trajectory" if self.is_live else "token"), key=REACHES.index)

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "B"]:
        """[B] coefficient per trajectory, detached."""

    def closed(self, batch: TrajectoryView) -> Bool[Tensor, "B"]:
        """[B] True where the coefficient is known to be 0 before the forward pass; such a trajectory does not count.

        A gate that waits for the current policy knows of none. One that multiplies others may: see `ProductOf`.
        """
        if self.is_live:
            return torch.zeros_like(batch.is_demonstration)
        return self(self.view(batch)) == 0

    def at_pass_rate(self, rate: float) -> float | None:
        """The coefficient of every trajectory in a group with this pass rate, or None if the pass rate alone does not
        decide it.

        Dynamic sampling asks a gate that reads rewards whether it is closed on the prompts that it would replace.
        """
        return None


Gate.register(Precomputed)


@dataclass(frozen=True)
class ConstantGate(Gate):
    """The same coefficient for every trajectory."""

    coefficient: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        return torch.full((len(batch),), self.coefficient, dtype=torch.float64, device=batch.response_mask.device)

    def at_pass_rate(self, rate: float) -> float | None:
        return self.coefficient

    def formula(self) -> Formula:
        return Formula(f"{self.coefficient:g}", f"{self.coefficient:g}")


class _PassRateGate(Gate):
    """A gate that follows the pass rate of the trajectory's group."""

    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    @abstractmethod
    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The coefficient at each of these pass rates, float64."""

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        return self._at(self._pass_rate(batch))

    def at_pass_rate(self, rate: float) -> float | None:
        return float(self._at(torch.tensor([rate], dtype=torch.float64)))

    def _pass_rate(self, batch: TrajectoryView) -> Tensor:
        rate = batch.pass_rate
        if bool(rate.isnan().any()):
            group = int(batch.group[rate.isnan()][0])
            raise ValueError(f"{type(self).__name__}: group {group} has no rollouts, so it has no pass rate")
        return rate


@dataclass(frozen=True)
class _PassRateThreshold(_PassRateGate):
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"{type(self).__name__}.threshold: {self.threshold} is not a pass rate; give a share between 0 and 1 "
                "(2 of 8 rollouts is 0.25)"
            )


@dataclass(frozen=True)
class PassRateAbove(_PassRateThreshold):
    """1 where the group's pass rate P exceeds the threshold, else 0: when to learn from rollouts (Eq. 10)."""

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (rate > self.threshold + _TOLERANCE).double()

    def formula(self) -> Formula:
        return Formula(f"1[P > {self.threshold:g}]", rf"\mathbb{{1}}[P>{self.threshold:g}]")


@dataclass(frozen=True)
class PassRateAtMost(_PassRateThreshold):
    """1 where the group's pass rate P is at most the threshold (inclusive), else 0: when to learn from a demonstration
    (Eq. 10)."""

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (rate <= self.threshold + _TOLERANCE).double()

    def formula(self) -> Formula:
        return Formula(f"1[P ≤ {self.threshold:g}]", rf"\mathbb{{1}}[P\le {self.threshold:g}]")


@dataclass(frozen=True)
class PassRateBetween(_PassRateGate):
    """1 where low < P < high, else 0: the questions whose rollouts differ (arXiv 2503.14476), all others closed."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < self.high <= 1:
            raise ConfigError(f"PassRateBetween: low={self.low}, high={self.high}; need 0 <= low < high <= 1")

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return ((rate > self.low + _TOLERANCE) & (rate < self.high - _TOLERANCE)).double()

    def formula(self) -> Formula:
        return Formula(f"1[{self.low:g} < P < {self.high:g}]", rf"\mathbb{{1}}[{self.low:g}<P<{self.high:g}]")


@dataclass(frozen=True)
class PassRateTable(_PassRateGate):
    """A coefficient that follows the pass rate: piecewise linear through (rates, coefficients), constant beyond.

    `step` = True takes the coefficient of the largest listed rate that does not exceed P instead of interpolating.
    """

    rates: tuple[float, ...] = (0.0, 1.0)
    coefficients: tuple[float, ...] = (0.0, 1.0)
    step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.rates, self.rates[1:], strict=False))
        if len(self.rates) != len(self.coefficients) or not self.rates or not rising:
            raise ConfigError(
                f"PassRateTable: rates={list(self.rates)}, coefficients={list(self.coefficients)}; give as many "
                "coefficients as rates, and the rates in rising order"
            )

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        rates, values = (
            torch.tensor(v, dtype=torch.float64, device=rate.device) for v in (self.rates, self.coefficients)
        )
        last = len(rates) - 1
        below = (torch.searchsorted(rates, rate + _TOLERANCE, right=True) - 1).clamp(0, last)
        if self.step or last == 0:
            return values[below]
        left = below.clamp(max=last - 1)
        share = ((rate - rates[left]) / (rates[left + 1] - rates[left])).clamp(0, 1)
        return values[left] + share * (values[left + 1] - values[left])

    def formula(self) -> Formula:
        points = ", ".join(f"{r:g}→{c:g}" for r, c in zip(self.rates, self.coefficients, strict=True))
        return Formula(f"c(P; {points})", r"c(P)")


@dataclass(frozen=True)
class EntropyWeight(Gate):
    """scale·exp(sign·H), H = the mean token entropy of the response, detached: the weights of arXiv 2506.19767.

    Where the original lets a gradient flow through H the method is not a product of the four factors; here it does not.
    """

    scale: float = 0.5
    sign: Literal[-1, 1] = -1
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    reach: ClassVar[str] = "trajectory"

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        entropy = masked_mean(batch.entropies.detach(), batch.response_mask)[:, 0]
        return self.scale * torch.exp(self.sign * entropy)

    def formula(self) -> Formula:
        sign = "−" if self.sign < 0 else ""
        return Formula(f"{self.scale:g}·exp({sign}H)", rf"{self.scale:g}\,e^{{{'-' if self.sign < 0 else ''}H}}")


@dataclass(frozen=True)
class Schedule(Gate):
    """A coefficient that follows the training step: `warmup` steps linear from `start` to `peak`, then `decay` steps
    along a cosine to `end`, then constant (the μ of arXiv 2508.11408).
    """

    start: float = 0.0
    peak: float = 1.0
    end: float = 0.0
    warmup: int = 0
    decay: int = 100
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0 or self.decay < 0:
            raise ConfigError(f"Schedule: warmup={self.warmup}, decay={self.decay}; steps must not be negative")

    def coefficient_at(self, step: int) -> float:
        """The coefficient after `step` training steps."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        share = min(1.0, (step - self.warmup) / self.decay) if self.decay > 0 else 1.0
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * share))

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        value = self.coefficient_at(batch.step)
        return torch.full((len(batch),), value, dtype=torch.float64, device=batch.response_mask.device)

    def formula(self) -> Formula:
        return Formula("μ(step)", r"\mu_k")


@dataclass(frozen=True)
class Complement(Gate):
    """1 - gate: the other share of a balance."""

    gate: Gate
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        return 1 - self.gate(batch)

    def at_pass_rate(self, rate: float) -> float | None:
        coefficient = self.gate.at_pass_rate(rate)
        return None if coefficient is None else 1 - coefficient

    def formula(self) -> Formula:
        inner = self.gate.formula()
        return Formula(f"(1 − {inner.text})", rf"(1-{inner.latex})")


@dataclass(frozen=True)
class ProductOf(Gate):
    """The product of gates, for example a pass-rate gate times a schedule."""

    gates: tuple[Gate, ...]
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        value = ConstantGate()(batch)
        for gate in self.gates:
            value = value * gate(batch)
        return value

    def closed(self, batch: TrajectoryView) -> Bool[Tensor, "B"]:
        """[B] True where one of the gates is closed, whatever the others will say."""
        shut = torch.zeros_like(batch.is_demonstration)
        for gate in self.gates:
            shut = shut | gate.closed(batch)
        return shut

    def at_pass_rate(self, rate: float) -> float | None:
        """The product; 0 where one of the gates is closed, whatever the others will say."""
        coefficients = [gate.at_pass_rate(rate) for gate in self.gates]
        if 0 in coefficients:
            return 0.0
        known = [coefficient for coefficient in coefficients if coefficient is not None]
        return math.prod(known) if len(known) == len(coefficients) else None

    def formula(self) -> Formula:
        return times([gate.formula() for gate in self.gates])
