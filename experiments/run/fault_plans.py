"""Plans with faults that follow from the split of an update into micro-batches; see `experiments.run.faults`.

Each function takes an algorithm, the batch of an update, its plan with all parts evaluated, and the rows of every
micro-batch of all ranks. It returns another plan for the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.components import GroupRelative
from upge.components.base import Component, Precomputed, rewritten, walk
from upge.plan import Plan
from upge.train.step_batch import StepBatch


def averaged(algorithm: Algorithm, batch: StepBatch, plan: Plan, micro_batches: Sequence[Tensor]) -> Plan:
    """The plan of a mean of micro-batches' means.

    w' = w · (w_m/M)/w_c: w_m is the reduction over the token's micro-batch, w_c that over all trajectories that
    contribute, and M the number of micro-batches. So w' = w for one micro-batch, or for several with equal counts.
    """
    contributing = plan.contributing.nonzero()[:, 0]
    own = algorithm.plans(batch.columns, [contributing, *micro_batches])

    def changed(weights: Tensor, of: Callable[[Plan], Tensor]) -> Tensor:
        whole = _widened(of(own[0]), contributing, weights)
        means = [_widened(of(one), rows, weights) for rows, one in zip(micro_batches, own[1:], strict=True)]
        total = torch.stack(means).sum(dim=0) / len(means) if means else whole
        return torch.where(whole != 0, weights * total / torch.where(whole != 0, whole, 1.0), 0.0)

    return replace(
        plan,
        terms={n: replace(t, weights=changed(t.weights, _weights("terms", n))) for n, t in plan.terms.items()},
        divergences={
            n: replace(t, weights=changed(t.weights, _weights("divergences", n))) for n, t in plan.divergences.items()
        },
        penalties={n: replace(t, scale=changed(t.scale, _weights("penalties", n))) for n, t in plan.penalties.items()},
    )


def rescaled(algorithm: Algorithm, batch: StepBatch, plan: Plan, micro_batches: Sequence[Tensor]) -> Plan:
    """The plan with advantages (R - mean R of the group)/(std of these differences in the micro-batch + epsilon).

    The mean is still the group's. Terms whose advantage has no standard deviation are unchanged.
    """
    terms = dict(plan.terms)
    for name, planned in plan.terms.items():
        advantage = algorithm.terms[name].estimator.advantage
        part, known = scaled(advantage), planned.estimator.advantage
        if part is None or not isinstance(known, Precomputed):
            continue
        centred = cast(Component, rewritten(advantage, _centred))
        values, differences = known.values.clone(), centred(centred.view(batch.columns))
        for rows in micro_batches:
            among = rows if part.baseline == "group" else rows[~batch.columns.is_demonstration[rows]]
            deviation = _deviation(differences[among, 0], part.unbiased)
            values[rows] = torch.where(deviation > 0, differences[rows] / (deviation + part.epsilon), 0.0)
        terms[name] = replace(planned, estimator=replace(planned.estimator, advantage=Precomputed(values)))
    return replace(plan, terms=terms)


def scaled(advantage: Component) -> GroupRelative | None:
    """The part of an advantage that divides by the standard deviation of the group; None if there is none."""
    parts = (part for _, part in walk(advantage, "advantage"))
    return next((part for part in parts if isinstance(part, GroupRelative) and part.normalize_std), None)


def _weights(kind: str, name: str) -> Callable[[Plan], Tensor]:
    """A function from a plan to the weights of a term or regularizer of it."""
    return lambda plan: getattr(getattr(plan, kind)[name], "scale" if kind == "penalties" else "weights")


def _widened(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Values of some rows, which may be shorter, at their place in a tensor of zeros."""
    placed = torch.zeros_like(like)
    placed[rows, : values.shape[1]] = values.to(like.dtype)
    return placed


def _centred(part: Component) -> Component:
    return replace(part, normalize_std=False) if isinstance(part, GroupRelative) else part


def _deviation(values: Tensor, unbiased: bool) -> Tensor:
    number = max(len(values) - int(unbiased), 1)
    return ((values - values.mean()).square().sum() / number).sqrt() if len(values) else torch.zeros(())
