"""The critic's part in a step's updates: its targets, its gradient, and how well its values explain the returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.errors import Interrupted
from upge.plan import Plan
from upge.regularizers import ValueLoss
from upge.train.deepspeed_module import StepResult
from upge.train.engine import CriticEngine
from upge.train.metrics import MetricSums
from upge.train.micro_batches import naming_size, nan_if_nonfinite
from upge.train.step_batch import BatchFiller, StepBatch


class CriticTarget(NamedTuple):
    """What the critic learns in an update.

    Attributes:
        values: [B, T] the critic's values before the step's updates.
        returns: [B, T] the targets of the values.
        weights: [B, T] the weight of each token in the loss.
    """

    values: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    weights: Float[Tensor, "B T"]

    @property
    def rows(self) -> list[int]:
        """The trajectories with a token of non-zero weight."""
        return (self.weights != 0).any(dim=1).nonzero()[:, 0].tolist()


class CriticUpdater:
    """Updates the value network `critic` with an algorithm's `loss`; `filler` divides batches into micro-batches."""

    def __init__(self, critic: CriticEngine, loss: ValueLoss, filler: BatchFiller) -> None:
        self.critic, self.loss, self.filler = critic, loss, filler

    def targets(
        self, batch: StepBatch, rows: Sequence[Tensor], batches: Sequence[StepBatch], plans: Sequence[Plan]
    ) -> list[CriticTarget]:
        """The target of each update. Like advantages, returns are computed on the whole batch of the step.

        Args:
            batch: the step's batch.
            rows: for each update, the rows of that batch that it learns from.
            batches, plans: the batch and the plan of each update.
        """
        returns = self.loss.targets(batch.columns)
        targets = []
        for some, (columns, _), plan in zip(rows, batches, plans, strict=True):
            assert columns.values is not None
            width = columns.response_mask.shape[1]
            weights = self.loss.weights(columns, plan.active)
            targets.append(CriticTarget(columns.values, returns[some][:, :width], weights))
        return targets

    def update(
        self, batch: StepBatch, target: CriticTarget, lr: float, poll: Callable[[], None] | None = None
    ) -> tuple[list[MetricSums], StepResult]:
        """Accumulate the gradient of the critic's loss over micro-batches and apply it.

        `poll` is called before each micro-batch. It may raise `Interrupted`, which drops the gradient so far.
        """
        try:
            sums = self._add_gradient(batch, target, poll)
        except Interrupted:
            self.critic.drop_gradient()
            raise
        return sums, self.critic.step(lr)

    def _add_gradient(
        self, batch: StepBatch, target: CriticTarget, poll: Callable[[], None] | None
    ) -> list[MetricSums]:
        micro_batches = self.filler.micro_batch_rows(batch, target.rows)
        sums = []
        for number, rows in enumerate(micro_batches):
            if poll is not None:
                poll()
            with naming_size(batch.ids(rows)):
                values = self.critic.forward(batch.ids(rows))
                loss = values.sum() * 0.0
                if rows:
                    old, returns, weights = (column[rows][:, : values.shape[1]].to(values.device) for column in target)
                    loss = (self.loss(values.double(), old.double(), returns) * weights).sum()
                    sums.append(MetricSums(value_loss=float(loss.detach())))
                self.critic.backward(nan_if_nonfinite(loss), last=number == len(micro_batches) - 1)
        return sums


def value_metrics(targets: Sequence[CriticTarget], masks: Sequence[Bool[Tensor, "B T"]]) -> dict[str, float]:
    """How well the values before the step's updates explain the returns, over the tokens that the critic learns from.

    Args:
        targets: the target of each update.
        masks: the response mask of each update's batch.
    """
    learned = [(t.weights != 0) & mask for t, mask in zip(targets, masks, strict=True)]
    pairs = [(t.values[mask].double(), t.returns[mask].double()) for t, mask in zip(targets, learned, strict=True)]
    if not any(len(value) for value, _ in pairs):
        return {}
    value, target = (torch.cat(column) for column in zip(*pairs, strict=True))
    variance = float(target.var(unbiased=False))
    metrics = {"critic/value_mean": float(value.mean()), "critic/return_mean": float(target.mean())}
    if variance != 0:
        metrics["critic/explained_variance"] = 1 - float(torch.var(target - value, unbiased=False)) / variance
    return metrics
