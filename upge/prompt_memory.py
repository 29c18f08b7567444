"""Memory per prompt: what a run remembers of each prompt's rollouts from step to step, saved in checkpoints.

A run with a memory counts the rollouts and the successes of each prompt and keeps the pass rate and the number of the
step in which the prompt was last sampled. A `PromptMemory` adds the numbers that it tracks, and one value per prompt
that it computes from them. Parts and gates read the memory *before* the step as the columns `prompt_value`,
`prompt_attempts`, `prompt_successes`, `prompt_last_pass_rate` and `prompt_age` of the batch. `upge.Curriculum` draws
prompts by the same numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upge.checks import check_fields
from upge.errors import ConfigError

#: The numbers that a `PromptMemory` tracks of one prompt.
Tracked = tuple[float, ...]


@dataclass(frozen=True)
class PromptRecord:
    """What is remembered of a prompt. The defaults are those of a prompt that was never sampled.

    Attributes:
        attempts: number of rollouts so far.
        successes: number of successes among them.
        last_pass_rate: pass rate in the step in which the prompt was last sampled; NaN if it never was.
        last_step: the number of that step within the stage, from 0; -1 if there is none.
        tracked: the numbers of the algorithm's `PromptMemory`; empty before the first step.
    """

    attempts: int = 0
    successes: int = 0
    last_pass_rate: float = math.nan
    last_step: int = -1
    tracked: Tracked = ()


class PromptMemory(ABC):
    """The numbers that are tracked of each prompt. Each subclass is a frozen dataclass of pure functions.

    Attributes:
        wants_drift: True if `updated` reads the drift, which takes one more forward pass per step over a remembered and
            a new response of each prompt.
    """

    wants_drift: bool = False

    @abstractmethod
    def initial(self) -> Tracked:
        """The numbers of a prompt before it is first sampled."""

    @abstractmethod
    def updated(self, tracked: Tracked, rewards: Sequence[float], drift: float) -> Tracked:
        """The numbers after a step.

        Args:
            tracked: the numbers before it.
            rewards: the rewards of the prompt's rollouts in the step, in order of sampling.
            drift: mean_t |log π(y_t) - log π_then(y_t)| in nats, for a response y from the step in which the prompt was
                last sampled. π is the policy that sampled in this step, π_then the one that sampled y. It is 0 the
                first time, and if `wants_drift` is False.
        """

    @abstractmethod
    def value(self, tracked: Tracked) -> float:
        """The value of a prompt, on the scale of the rewards: an estimate of its expected reward."""

    def describe(self) -> str:
        """What is tracked, as a noun phrase."""
        return type(self).__name__

    def remembered(self, record: PromptRecord, step: int) -> Remembered:
        """What step `step`, counted from 0, reads of a prompt."""
        value = self.value(record.tracked or self.initial())
        return Remembered(value, record.attempts, record.successes, record.last_pass_rate, step - record.last_step)

    def recorded(
        self, before: PromptRecord, rewards: Sequence[float], successes: int, step: int, drift: float
    ) -> PromptRecord:
        """The record of a prompt after step `step`, in which it was sampled."""
        tracked = self.updated(before.tracked or self.initial(), rewards, drift)
        attempts, solved = before.attempts + len(rewards), before.successes + successes
        return PromptRecord(attempts, solved, successes / len(rewards), step, tracked)


@dataclass(frozen=True)
class DriftDecay:
    """ρ = 2^(-drift/half_life), clipped to [low, high]: the more the policy has moved, the less the past counts.

    See arXiv 2509.13232 and `PromptMemory.updated`.

    Attributes:
        half_life: the drift, in nats per token, at which the past counts half.
        low, high: bounds of ρ. If n rollouts are sampled each time, the memory of a prompt tends to the weight of
            n/(1 - ρ) rollouts.
    """

    half_life: float = 0.06
    low: float = 0.875
    high: float = 0.96

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.half_life < math.inf:
            raise ConfigError(
                f"DriftDecay.half_life: {self.half_life:g} must be positive and finite; 0.06 is customary"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"DriftDecay: low={self.low:g}, high={self.high:g}; need 0 <= low <= high <= 1")

    def at(self, drift: float) -> float:
        """ρ at a drift."""
        return min(max(2.0 ** (-drift / self.half_life), self.low), self.high)


@dataclass(frozen=True)
class DecayedMean(PromptMemory):
    """v = S/W, the mean of a prompt's rewards in which those of earlier steps count less:

        S ← ρ·S + Σ R,   W ← ρ·W + n,   starting from S = weight·start and W = weight,

    where n is the number of the prompt's rollouts in a step. For rewards of 0 and 1, S and W - S are the parameters of
    a Beta distribution whose mean is v. A prompt's numbers do not change in steps that do not sample it.

    Attributes:
        start: v before the first rollout.
        weight: the number of rollouts that `start` counts as.
        decay: ρ: a number, where 1 forgets nothing and 0 remembers the last step alone, or a function of the drift.
    """

    start: float = 0.5
    weight: float = 1.0
    decay: float | DriftDecay = 0.9

    def __post_init__(self) -> None:
        check_fields(self)
        if not math.isfinite(self.start):
            raise ConfigError(f"DecayedMean.start: {self.start:g} must be finite; 0.5 is customary")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"DecayedMean.weight: {self.weight:g} must be positive and finite; 1.0 is customary")
        if not isinstance(self.decay, DriftDecay) and not 0 <= self.decay <= 1:
            raise ConfigError(f"DecayedMean.decay: {self.decay:g} must lie between 0 and 1; 0.9 is customary")

    @property
    def wants_drift(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from the settings
        return isinstance(self.decay, DriftDecay)

    def initial(self) -> Tracked:
        return self.start * self.weight, self.weight

    def updated(self, tracked: Tracked, rewards: Sequence[float], drift: float) -> Tracked:
        total, weight = tracked
        rho = self.decay.at(drift) if isinstance(self.decay, DriftDecay) else self.decay
        return rho * total + math.fsum(rewards), rho * weight + len(rewards)

    def value(self, tracked: Tracked) -> float:
        total, weight = tracked
        return total / weight

    def describe(self) -> str:
        decay = f"2^(-drift/{self.decay.half_life:g})" if isinstance(self.decay, DriftDecay) else f"{self.decay:g}"
        bounds = f" within [{self.decay.low:g}, {self.decay.high:g}]" if isinstance(self.decay, DriftDecay) else ""
        return (
            f"the mean reward, in which the past counts {decay}{bounds} as much each time; begins at {self.start:g} "
            f"with the weight {self.weight:g}"
        )


class Remembered(NamedTuple):
    """What a step reads of one prompt: its memory before the step.

    Attributes:
        value: the prompt's value by the algorithm's `PromptMemory`.
        attempts: number of rollouts before this step.
        successes: number of successes among them.
        last_pass_rate: pass rate in the step in which the prompt was last sampled; NaN if it never was.
        age: steps since then. A prompt that was never sampled counts as sampled in step -1, before the first.
    """

    value: float
    attempts: int
    successes: int
    last_pass_rate: float
    age: int


class PromptColumns(NamedTuple):
    """`Remembered` for P prompts, as float64 and int64 columns. A prompt may occur several times."""

    value: Float[Tensor, "P"]
    attempts: Int[Tensor, "P"]
    successes: Int[Tensor, "P"]
    last_pass_rate: Float[Tensor, "P"]
    age: Int[Tensor, "P"]

    @classmethod
    def of(cls, prompts: Sequence[Remembered]) -> PromptColumns:
        """The columns of P prompts."""
        whole = {"attempts", "successes", "age"}
        columns = (
            torch.tensor([getattr(one, name) for one in prompts], dtype=torch.int64 if name in whole else torch.float64)
            for name in cls._fields
        )
        return cls(*columns)

    def named(self) -> dict[str, Tensor]:
        """The columns by their names in a batch: `prompt_value` and so on."""
        return {f"prompt_{name}": column for name, column in self._asdict().items()}
