"""Which prompts a step samples: drawn with weights that the memory gives, and redrawn by a gate on the rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.checks import check_fields
from upge.errors import ConfigError
from upge.gates import Gate
from upge.prompt_memory import PromptColumns
from upge.stateful import stateful_gates
from upge.views import NAMED_REWARDS, TRAJECTORY_COLUMNS


@dataclass(frozen=True)
class DynamicSampling:
    """Replacement of prompts on whose rollouts `gate` is closed, until the batch is full (arXiv 2503.14476).

    Attributes:
        gate: the gate; it may read only rewards, groups and the memory of prompts.
        rounds: maximum rounds of sampling per step. After the last round the step trains on fewer prompts.
    """

    gate: Gate
    rounds: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise ConfigError(f"sampling.rounds: {self.rounds} must be at least 1")
        check_reads_outcomes(self.gate, "sampling.gate")
        if stateful_gates({"sampling.gate": self.gate}):
            raise ConfigError("sampling.gate: a stateful gate cannot choose prompts; give a gate on pass rates")


class PromptWeight(ABC):
    """The weight with which a curriculum draws a prompt. Each subclass is a frozen dataclass."""

    @abstractmethod
    def __call__(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        """[P] a positive weight for each prompt; only their ratios matter."""

    def describe(self) -> str:
        """The formula."""
        return type(self).__name__


@dataclass(frozen=True)
class NearPassRate(PromptWeight):
    """exp(-(v - target)²/(2·width²)) + floor, v the prompt's remembered value.

    Attributes:
        target: the value with the largest weight.
        width: the distance from it at which the weight without `floor` is e^(-1/2).
        floor: added, so that no prompt is forgotten.
    """

    target: float = 0.5
    width: float = 0.2
    floor: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width <= 0:
            raise ConfigError(f"NearPassRate.width: {self.width:g} must be positive; 0.2 is customary")
        _check_floor(self, self.floor)

    def __call__(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        return torch.exp(-(((prompts.value - self.target) / self.width) ** 2) / 2) + self.floor

    def describe(self) -> str:
        return f"exp(-(v - {self.target:g})²/(2·{self.width:g}²)) + {self.floor:g}"


@dataclass(frozen=True)
class Uncertainty(PromptWeight):
    """√(v(1 - v)) + floor, v the prompt's remembered value: the std of a reward of 0 or 1 (arXiv 2509.13232).

    Attributes:
        floor: added, so that no prompt is forgotten.
    """

    floor: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        _check_floor(self, self.floor)

    def __call__(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        value = prompts.value
        return (value * (1 - value)).clamp(min=0).sqrt() + self.floor

    def describe(self) -> str:
        return f"√(v(1 - v)) + {self.floor:g}"


@dataclass(frozen=True)
class Age(PromptWeight):
    """age^power, the age being the number of steps since the prompt was last sampled, at least 1.

    Attributes:
        power: 0 draws uniformly.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.power <= 16:
            raise ConfigError(f"Age.power: {self.power:g} must lie between 0 and 16; 1.0 is customary")

    def __call__(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        return prompts.age.double() ** self.power

    def describe(self) -> str:
        return f"age^{self.power:g}"


@dataclass(frozen=True)
class ProductOfWeights(PromptWeight):
    """The product of several weights."""

    weights: tuple[PromptWeight, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.weights:
            raise ConfigError("ProductOfWeights.weights: is empty; give at least one weight")

    def __call__(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        return torch.stack([weight(prompts) for weight in self.weights]).prod(dim=0)

    def describe(self) -> str:
        return " · ".join(f"({weight.describe()})" for weight in self.weights)


@dataclass(frozen=True)
class Curriculum:
    """Prompts are drawn with probabilities proportional to `weight`, which reads the memory before the step.

    The prompts of a step are drawn one after the other without replacement. Seed, step and memory determine them. In a
    mixture of data sets, each keeps its share. The estimator is not corrected for the draw: it maximizes the objective
    in which prompts count by their weights.

    Attributes:
        weight: the weight of a prompt.
        redraw: the rule that also replaces prompts depending on their rollouts; the replacements are drawn with the
            same weights. None = no replacement.
    """

    weight: PromptWeight
    redraw: DynamicSampling | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def weights(self, prompts: PromptColumns) -> Float[Tensor, "P"]:
        """[P] the weight of each prompt.

        Raises:
            ConfigError: a weight is not a positive finite number.
        """
        weights = self.weight(prompts).double()
        bad = ~((weights > 0) & weights.isfinite())
        if bool(bad.any()):
            number = float(weights[bad][0])
            raise ConfigError(
                f"sampling.weight: {type(self.weight).__name__} gives a prompt with the value "
                f"{float(prompts.value[bad][0]):g} the weight {number:g}; weights must be positive and finite, for "
                "example with a `floor`"
            )
        return weights


def check_reads_outcomes(gate: Gate, path: str) -> None:
    """Refuse a gate that reads what is not yet known when prompts are chosen."""
    beyond = sorted(gate.columns - {*TRAJECTORY_COLUMNS, NAMED_REWARDS})
    if beyond:
        raise ConfigError(
            f"{path}: {type(gate).__name__} reads {', '.join(beyond)}, but prompts are chosen by rewards, before any "
            "forward pass; give a gate on pass rates, such as upge.PassRateBetween"
        )


def _check_floor(weight: PromptWeight, floor: float) -> None:
    if floor <= 0:
        raise ConfigError(
            f"{type(weight).__name__}.floor: {floor:g} must be positive, because a prompt of weight 0 would never be "
            "drawn again; 0.05 is customary"
        )
