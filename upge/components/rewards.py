"""Advantages of several rewards: of one of them by name, of each by itself, and sums of advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, Component, walk
from upge.errors import ConfigError
from upge.formula import Formula, tex
from upge.views import LIVE_COLUMNS, NAMED_REWARDS, TokenView, TrajectoryView


def check_reads_total(part: AdvantageEstimator, owner: str) -> None:
    """Refuse an advantage that reads rewards by name inside one that changes `rewards`, which would have no effect.

    Raises:
        ConfigError: `part`, or a part that it wraps, reads `named_rewards`.
    """
    for path, inner in walk(part, "advantage"):
        if NAMED_REWARDS in inner.reads:
            raise ConfigError(
                f"{owner}.{path}: {type(inner).__name__} reads rewards by name, so it would ignore those that {owner} "
                f"gives it; put {owner} inside it, or give an advantage of `rewards`, such as upge.GroupRelative"
            )


def rewarded_by(batch: TrajectoryView, name: str) -> TrajectoryView:
    """The same trajectories with one of the `named_rewards` as `rewards`.

    Raises:
        ValueError: the batch has no such reward.
    """
    if name not in batch.named_rewards:
        known = ", ".join(batch.named_rewards) or "none"
        raise ValueError(f"named_rewards: found no '{name}' in this batch, which has {known}; name one of them")
    return batch.with_rewards(batch.named_rewards[name])


@dataclass(frozen=True)
class OfReward(AdvantageEstimator):
    """The inner Â of one of several rewards: R ← R_name, without its weight.

    For an inner advantage that reads successes, a reward R_name above the batch's `pass_threshold` is a success.

    Attributes:
        reward: the name of the reward; a key of `Trajectories.named_rewards`.
    """

    reward: str
    advantage: AdvantageEstimator
    reads: ClassVar[frozenset[str]] = frozenset({NAMED_REWARDS})
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reads_total(self.advantage, "OfReward")

    @property
    def reward_names(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride] - of a setting
        """The name of the reward."""
        return frozenset({self.reward})

    def precompute_parts(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """This part with the wrapped advantage precomputed on its reward."""
        return replace(self, advantage=self.advantage.precomputed(rewarded_by(batch, self.reward), live))

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        return self.advantage(rewarded_by(batch, self.reward))

    def formula(self) -> Formula:
        inner = self.advantage.formula()
        return Formula(
            f"[{inner.text}, R ← R_{self.reward}]",
            rf"\left[{inner.latex}\right]_{{R\leftarrow R_\mathrm{{{self.reward.replace('_', chr(92) + '_')}}}}}",
        )


@dataclass(frozen=True)
class Summed(AdvantageEstimator):
    """Σ_k weight_k·Â_k.

    Attributes:
        weights: one for each advantage; empty = all 1.
    """

    advantages: tuple[AdvantageEstimator, ...]
    weights: tuple[float, ...] = ()
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.advantages:
            raise ConfigError("Summed.advantages: empty; give at least one advantage")
        if len(self.weights) not in (0, len(self.advantages)) or not all(map(math.isfinite, self.weights)):
            raise ConfigError(
                f"Summed.weights: found {list(self.weights)} for {len(self.advantages)} advantages; give one finite "
                "number for each of them, or none"
            )

    @property
    def _pairs(self) -> list[tuple[float, AdvantageEstimator]]:
        return list(zip(self.weights or (1.0,) * len(self.advantages), self.advantages, strict=True))

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        (weight, first), *rest = self._pairs
        total = weight * first(batch)
        for weight, advantage in rest:
            total = total + weight * advantage(batch)
        return total

    def formula(self) -> Formula:
        inner = [(weight, advantage.formula()) for weight, advantage in self._pairs]
        text = " + ".join(one.text if weight == 1 else f"{weight:g}·{one.text}" for weight, one in inner)
        latex = "+".join(one.latex if weight == 1 else rf"{tex(weight)}\,{one.latex}" for weight, one in inner)
        return Formula(f"[{text}]", rf"\left[{latex}\right]")


@dataclass(frozen=True)
class RewardDecoupled(AdvantageEstimator):
    """Σ_k w_k·Â(R_k): the inner Â of each of the batch's rewards by itself, then their weighted sum.

    With `upge.GroupRelative` every reward is normalized in the group before the rewards are added up, as in
    arXiv 2601.05242. Then a group in which the sum of the rewards is always the same can have a signal, and no reward
    outweighs another one because it varies more. R_k and w_k are the batch's `named_rewards` and `reward_weights`.
    A batch without named rewards has one reward, `rewards`, with weight 1.
    """

    advantage: AdvantageEstimator
    reads: ClassVar[frozenset[str]] = frozenset({NAMED_REWARDS, "rewards"})
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reads_total(self.advantage, "RewardDecoupled")

    def _sum(self, batch: TrajectoryView) -> AdvantageEstimator:
        """The sum, written out for the rewards of a batch."""
        weights = {name: batch.reward_weights.get(name, 1.0) for name in batch.named_rewards}
        if not weights:
            return self.advantage
        return Summed(tuple(OfReward(name, self.advantage) for name in weights), tuple(weights.values()))

    def precompute_parts(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """The sum for the rewards of `batch`, with the wrapped advantage precomputed on each of them."""
        return self._sum(batch).precomputed(batch, live)

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        return self._sum(batch)(batch)

    def formula(self) -> Formula:
        inner = self.advantage.formula()
        return Formula(f"Σ_k w_k·[{inner.text}, R ← R_k]", rf"\sum_k w_k\left[{inner.latex}\right]_{{R\leftarrow R_k}}")
