"""Gates: the coefficient of a term, per prompt or per trajectory. A gate is called with the batch and returns [B].

A gate that reads neither current log-probs nor entropies is known before the forward pass. A trajectory whose
coefficient is then 0 in every term never reaches the model.
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
from upge.formula import Formula, tex, times
from upge.views import TrajectoryView, View, group_sum, masked_mean

#: Pass rates are multiples of 1/n. The tolerance keeps a threshold such as 1/3 from missing them by rounding.
_TOLERANCE = 1e-9


class Gate(Component):
    """The coefficient of a term."""

    @property
    def live_reach(self) -> str:
        """At least 'trajectory' for a live gate, whose one number per response depends on the whole response."""
        return max((super().live_reach, "trajectory" if self.is_live else "token"), key=REACHES.index)

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "B"]:
        """[B] the coefficient of each trajectory, detached."""

    def closed(self, batch: TrajectoryView) -> Bool[Tensor, "B"]:
        """[B] True where the coefficient is known to be 0 before the forward pass. Such a trajectory does not count.

        For a live gate this is False everywhere, unless it multiplies other gates: see `ProductOf`.
        """
        if self.is_live:
            return torch.zeros_like(batch.is_demonstration)
        return self(self.view(batch)) == 0

    def at_pass_rate(self, rate: float) -> float | None:
        """The coefficient of every trajectory in a group with pass rate `rate`.

        None if the pass rate alone does not determine it. `upge.corrections.DynamicSampling` uses this to check that
        no term learns from the prompts that it would replace.
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
        return Formula(f"{self.coefficient:g}", tex(self.coefficient))


class _PassRateGate(Gate):
    """A gate that depends on the pass rate of the trajectory's group."""

    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    @abstractmethod
    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The coefficient at each pass rate, float64."""

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        rate = batch.pass_rate
        if bool(rate.isnan().any()):
            group = int(batch.group[rate.isnan()][0])
            raise ValueError(f"{type(self).__name__}: group {group} has no rollouts, so it has no pass rate")
        return self._at(rate)

    def at_pass_rate(self, rate: float) -> float | None:
        return float(self._at(torch.tensor([rate], dtype=torch.float64)))


@dataclass(frozen=True)
class _PassRateThreshold(_PassRateGate):
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"{type(self).__name__}.threshold: {self.threshold} is not a pass rate; give a number between 0 and 1 "
                "(2 of 8 rollouts is 0.25)"
            )


@dataclass(frozen=True)
class PassRateAbove(_PassRateThreshold):
    """1 where the group's pass rate P exceeds the threshold, else 0.

    Opens a term that learns from rollouts (arXiv 2509.04419, Eq. 10).
    """

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (rate > self.threshold + _TOLERANCE).double()

    def formula(self) -> Formula:
        return Formula(f"1[P > {self.threshold:g}]", rf"\mathbb{{1}}[P>{self.threshold:g}]")


@dataclass(frozen=True)
class PassRateAtMost(_PassRateThreshold):
    """1 where the group's pass rate P is at most the threshold (inclusive), else 0.

    Opens a term that learns from demonstrations (arXiv 2509.04419, Eq. 10).
    """

    def _at(self, rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (rate <= self.threshold + _TOLERANCE).double()

    def formula(self) -> Formula:
        return Formula(f"1[P ≤ {self.threshold:g}]", rf"\mathbb{{1}}[P\le {self.threshold:g}]")


@dataclass(frozen=True)
class PassRateBetween(_PassRateGate):
    """1 where low < P < high, else 0. By default it is open on groups whose rollouts differ (arXiv 2503.14476)."""

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
    """A piecewise linear function of the pass rate P through the points (rates, coefficients), constant outside them.

    Attributes:
        step: True = no interpolation; the coefficient is that of the largest listed rate that does not exceed P.
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
                "coefficients as rates, and the rates in increasing order"
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
class SiblingSucceeded(Gate):
    """1 for trajectories with another rollout of their group that succeeded, else 0 (arXiv 2601.20802).

    Attributes:
        only_failed: True = 0 also for rollouts that themselves succeeded.
    """

    only_failed: bool = True
    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        success = (batch.success & ~batch.is_demonstration).double()
        others = group_sum(success, batch.group_index)[batch.group_index] - success
        is_open = others > 0
        return (is_open & (success == 0) if self.only_failed else is_open).double()

    def formula(self) -> Formula:
        own = " and R = 0" if self.only_failed else ""
        latex = r",\ R=0" if self.only_failed else ""
        return Formula(f"1[a sibling's R = 1{own}]", rf"\mathbb{{1}}[\exists\tau'\ne\tau: R'=1{latex}]")


@dataclass(frozen=True)
class Finished(Gate):
    """1 for responses that ended by themselves, 0 for those that were cut at the length limit (arXiv 2503.14476)."""

    reads: ClassVar[frozenset[str]] = frozenset({"finished"})

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        return batch.finished.double()

    def formula(self) -> Formula:
        return Formula("1[finished]", r"\mathbb{1}[\mathrm{finished}]")


@dataclass(frozen=True)
class Replayed(Gate):
    """1 for rollouts that an earlier step sampled, 0 for those of this step (arXiv 2510.02245), see `upge.Replay`."""

    reads: ClassVar[frozenset[str]] = frozenset({"is_replayed"})

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        return batch.is_replayed.double()

    def formula(self) -> Formula:
        return Formula("1[replayed]", r"\mathbb{1}[\mathrm{replayed}]")


@dataclass(frozen=True)
class EntropyWeight(Gate):
    """scale·exp(sign·H) with H = the mean token entropy of the response, detached (arXiv 2506.19767).

    With a gradient through H, as in the original, the method would not be a product of the four factors.
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
    """A function of the training step (the μ of arXiv 2508.11408).

    It rises linearly from `start` to `peak` over `warmup` steps, follows a cosine to `end` over `decay` steps, and then
    stays constant.
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
    """1 - gate, for a term whose coefficient and that of another term add up to 1."""

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
    """The product of several gates, for example a pass-rate gate and a schedule."""

    gates: tuple[Gate, ...]
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B"]:
        value = ConstantGate()(batch)
        for gate in self.gates:
            value = value * gate(batch)
        return value

    def closed(self, batch: TrajectoryView) -> Bool[Tensor, "B"]:
        """[B] True where at least one gate is closed."""
        shut = torch.zeros_like(batch.is_demonstration)
        for gate in self.gates:
            shut = shut | gate.closed(batch)
        return shut

    def at_pass_rate(self, rate: float) -> float | None:
        """The product of the gates' coefficients; 0 if at least one is 0, even where another gives None."""
        coefficients = [gate.at_pass_rate(rate) for gate in self.gates]
        if 0 in coefficients:
            return 0.0
        known = [coefficient for coefficient in coefficients if coefficient is not None]
        return math.prod(known) if len(known) == len(coefficients) else None

    def formula(self) -> Formula:
        return times([gate.formula() for gate in self.gates])
