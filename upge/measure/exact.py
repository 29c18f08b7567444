"""The same figures without sampling: on a policy of a few responses, whose every batch is added up.

The batches are those of `upge.theory`, one prompt each: every multiset of rollouts with every demonstration, weighted
by its probability. What the instrument says of a sample of them must agree within its intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.measure.contributions import Slopes, slopes
from upge.theory.draws import Evaluator, Row, Setting, all_groups, check


@dataclass(frozen=True)
class Exact:
    """What an algorithm, or a part of it, does on average: E g [D] and E‖g‖²."""

    mean: Float[Tensor, "D"]
    power: float


def exact(algorithm: Algorithm, setting: Setting, *, group_size: int = 3, demonstrations: int = 1) -> dict[str, Exact]:
    """Mean and power of the estimate on a batch of one prompt, of the whole by '' and of each part by its name.

    Raises:
        ConfigError: the setting lacks what the algorithm reads or learns from.
    """
    check(algorithm, setting, group_size, demonstrations)
    groups, _ = all_groups(algorithm, setting, group_size, demonstrations)
    evaluator = Evaluator(algorithm, setting)
    means: dict[str, Tensor] = {}
    powers: dict[str, float] = {}
    for rows, probability in groups:
        parts = estimates(evaluator, rows)
        for name, estimate in ({"": sum(parts.values())} | parts).items():
            means[name] = means.get(name, torch.zeros_like(estimate)) + probability * estimate
            powers[name] = powers.get(name, 0.0) + probability * float(estimate.square().sum())
    return {name: Exact(mean, powers[name]) for name, mean in means.items()}


def estimates(evaluator: Evaluator, rows: tuple[Row, ...]) -> dict[str, Float[Tensor, "D"]]:
    """Each part's estimate on the batch of one group, as a gradient by the policy's table."""
    batch = evaluator.batch([rows])
    batch = dataclasses.replace(batch, state=evaluator.algorithm.initial_state())
    number = torch.tensor([row[0] for row in rows])
    found: Mapping[str, Slopes] = slopes(evaluator.algorithm, batch)
    gradients = {}
    for name, one in found.items():
        gradient = torch.einsum("bt,btpv->pv", one.by_logprobs, evaluator.scores[number])
        if one.by_entropies is not None:
            gradient = gradient + torch.einsum("bt,btpv->pv", one.by_entropies, evaluator.entropy_scores[number])
        gradients[name] = gradient.flatten()
    return gradients
