"""The exact mean and power of an estimator, on a policy with so few responses that every batch can be enumerated.

The batches are those of `upge.theory`, with one prompt each: every multiset of rollouts with every multiset of
demonstrations, weighted by its probability. Measurements on a sample of them must agree within their intervals.

Legend: B trajectories of T tokens; D = P·V numbers of a gradient, for a table of P prefixes and V tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.measure.contributions import slopes
from upge.theory.draws import Evaluator, Row, Setting, all_groups, check


@dataclass(frozen=True)
class Exact:
    """The exact moments of the estimate g of an algorithm, or of a part of it.

    Attributes:
        mean: [D] E g.
        power: E‖g‖².
    """

    mean: Float[Tensor, "D"]
    power: float


def exact(algorithm: Algorithm, setting: Setting, *, group_size: int = 3, demonstrations: int = 1) -> dict[str, Exact]:
    """Mean and power of the estimate on a batch of one prompt.

    Args:
        algorithm: the algorithm.
        setting: the policies, the reward and the values that batches are made from.
        group_size: rollouts per batch, drawn independently.
        demonstrations: demonstrations per batch, drawn independently.

    Returns:
        '' → of the whole algorithm, and name of a part → of that part.

    Raises:
        ConfigError: the setting lacks something that the algorithm reads or learns from.
    """
    check(algorithm, setting, group_size, demonstrations)
    groups, _ = all_groups(algorithm, setting, group_size, demonstrations)
    evaluator = Evaluator(algorithm, setting)
    means: dict[str, Tensor] = {}
    powers: dict[str, float] = {}
    for rows, probability in groups:
        parts = estimates(evaluator, rows)
        whole = sum(parts.values(), torch.zeros(()))
        for name, estimate in ({"": whole} | parts).items():
            means[name] = means.get(name, torch.zeros_like(estimate)) + probability * estimate
            powers[name] = powers.get(name, 0.0) + probability * float(estimate.square().sum())
    return {name: Exact(mean, powers[name]) for name, mean in means.items()}


def estimates(evaluator: Evaluator, rows: tuple[Row, ...]) -> dict[str, Float[Tensor, "D"]]:
    """Each part's estimate on the batch of one group, as a gradient with respect to the policy's table."""
    batch = evaluator.batch([rows])
    batch = dataclasses.replace(batch, state=evaluator.algorithm.initial_state())
    number = torch.tensor([row[0] for row in rows])
    gradients: dict[str, Tensor] = {}
    for name, slope in slopes(evaluator.algorithm, batch).items():
        gradient = torch.einsum("bt,btpv->pv", slope.by_logprobs, evaluator.scores[number])
        if slope.by_entropies is not None:
            gradient = gradient + torch.einsum("bt,btpv->pv", slope.by_entropies, evaluator.entropy_scores[number])
        gradients[name] = gradient.flatten()
    return gradients
