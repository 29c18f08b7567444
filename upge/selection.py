"""What a step's batch is made of beyond the prompts in their order: prompts drawn anew, and updates held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upge.checks import check_fields
from upge.errors import ConfigError
from upge.gates import Gate
from upge.stateful import stateful_gates
from upge.views import TRAJECTORY_COLUMNS

if TYPE_CHECKING:
    from upge.algorithm import Algorithm


@dataclass(frozen=True)
class DynamicSampling:
    """Prompts on whose rollouts `gate` is closed are replaced by others until the batch is full (arXiv 2503.14476).

    Attributes:
        gate: reads rewards and groups alone.
        rounds: how often at most a step samples; what is missing then stays missing.
    """

    gate: Gate
    rounds: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise ConfigError(f"sampling.rounds: {self.rounds} must be at least 1")
        _check_gate(self.gate, "sampling.gate")
        if stateful_gates({"sampling.gate": self.gate}):
            raise ConfigError("sampling.gate: a stateful gate cannot choose prompts; give a gate on pass rates")


@dataclass(frozen=True)
class InterleavedUpdate:
    """An update of another kind, made whenever enough prompts have gathered for it (arXiv 2506.07527).

    Each step, the prompts with a demonstration on whose rollouts `gate` is open are remembered. Once there are `size`
    of them, one update of `algorithm` on their demonstrations follows the step's own, and they are forgotten.

    Attributes:
        gate: reads rewards and groups alone.
        size: prompts of one such update.
        algorithm: learns from demonstrations alone.
        own_optimizer: whether it keeps Adam moments of its own.
        lr_factor: its learning rate as a multiple of the step's.
    """

    gate: Gate
    size: int
    algorithm: Algorithm
    own_optimizer: bool = True
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or not self.lr_factor > 0:
            raise ConfigError(f"interleaved_update: size={self.size}, lr_factor={self.lr_factor}; both must be positive")
        needs = self.algorithm.needs
        if needs.rollouts or needs.preference_pairs:
            raise ConfigError(
                f"interleaved_update.algorithm: '{self.algorithm.name}' needs more than demonstrations; give one that learns "
                "from demonstrations alone"
            )
        check_plain(self.algorithm, "interleaved_update.algorithm")
        _check_gate(self.gate, "interleaved_update.gate")


def _check_gate(gate: Gate, path: str) -> None:
    beyond = sorted(gate.columns - set(TRAJECTORY_COLUMNS))
    if beyond:
        raise ConfigError(
            f"{path}: {type(gate).__name__} reads {', '.join(beyond)}, but prompts are chosen by rewards, before any "
            "forward pass; give a gate on pass rates, such as upge.PassRateBetween"
        )


def check_plain(algorithm: Algorithm, path: str) -> None:
    """Refuses, for an algorithm inside another, what only a whole run provides.

    Raises:
        ConfigError: it has a critic, stateful gates, sampling, or an interleaved update or a validation of its own.
    """
    beside = {name: getattr(algorithm, name) for name in ("critic", "sampling", "interleaved_update", "validation", "stateful")}
    for name, value in beside.items():
        if value:
            what = f"stateful gates ({', '.join(value)})" if name == "stateful" else f"a `{name}` of its own"
            raise ConfigError(f"{path}: '{algorithm.name}' has {what}, which nobody provides here; give one without")
