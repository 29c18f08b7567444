"""The critic's part in a step's updates: its targets, its gradient, and how well its values explain the returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.plan import Plan
from upge.regularizers import ValueLoss
from upge.train.critic import CriticEngine
from upge.train.deepspeed_module import StepResult
from upge.train.metrics import MetricSums, value_metrics
from upge.train.micro_batches import nan_if_nonfinite
from upge.train.step_batch import BatchFiller, StepBatch


class CriticTarget(NamedTuple):
    """What the critic learns in an update.

    Attributes:
        values: [B, T] before the step's updates.
        returns: [B, T] what they should be.
        weights: [B, T] of each token in the loss.
    """

    values: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    weights: Float[Tensor, "B T"]

    @property
    def rows(self) -> list[int]:
        """The trajectories with a weight."""
        return (self.weights != 0).any(dim=1).nonzero()[:, 0].tolist()


class CriticUpdater:
    """Updates the critic of an algorithm.

    Args:
        critic: the value network.
        loss: the algorithm's objective for it.
        filler: divides batches into micro-batches.
    """

    def __init__(self, critic: CriticEngine, loss: ValueLoss, filler: BatchFiller) -> None:
        self.critic, self.loss, self.filler = critic, loss, filler

    def targets(
        self, batch: StepBatch, rows: Sequence[Tensor], batches: Sequence[StepBatch], plans: Sequence[Plan]
    ) -> list[CriticTarget]:
        """The target of each update. The returns are those of the whole step's batch, as the advantages are.

        Args:
            batch: of the step.
            rows: of the step's batch that each update learns from.
            batches: of the updates.
            plans: of the updates.
        """
        returns = self.loss.targets(batch.columns)
        targets = []
        for some, of_update, plan in zip(rows, batches, plans, strict=True):
            columns = of_update.columns
            assert columns.values is not None
            width = columns.response_mask.shape[1]
            weights = self.loss.weights(columns, plan.active)
            targets.append(CriticTarget(columns.values, returns[some][:, :width], weights))
        return targets

    def run_micro_batches(self, batch: StepBatch, target: CriticTarget) -> list[MetricSums]:
        """Adds the gradient of the critic's loss, micro-batch by micro-batch; the optimizer step is not taken."""
        micro_batches = self.filler.micro_batch_rows(batch, target.rows)
        sums = []
        for number, rows in enumerate(micro_batches):
            values = self.critic.forward(batch.ids(rows)).values
            if rows:
                old, returns, weights = (column[rows][:, : values.shape[1]].to(values.device) for column in target)
                loss = (self.loss(values.double(), old.double(), returns) * weights).sum()
                sums.append(MetricSums(value_loss=float(loss.detach())))
            else:
                loss = values.sum() * 0.0
            self.critic.backward(nan_if_nonfinite(loss), last=number == len(micro_batches) - 1)
        return sums

    def step(self, lr: float) -> StepResult:
        """Applies the gradient."""
        return self.critic.step(lr)

    @staticmethod
    def metrics(targets: Sequence[CriticTarget], masks: Sequence[Bool[Tensor, "B T"]]) -> dict[str, float]:
        """How well the values explain the returns, over the tokens of the updates that the critic learns from.

        Args:
            targets: of the updates.
            masks: the response mask of each update's batch.
        """
        values = torch.cat([target.values.flatten() for target in targets])
        returns = torch.cat([target.returns.flatten() for target in targets])
        learned = [((t.weights != 0) & mask).flatten() for t, mask in zip(targets, masks, strict=True)]
        return value_metrics(values, returns, torch.cat(learned))
