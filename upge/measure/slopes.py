"""What an algorithm puts in front of each token's ∇log π (and ∇H) on a batch, part by part."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.trajectories import Trajectories

#: The name of the part that holds all that is added and is no product: KL, entropy.
PENALTIES = "regularizers"


class Slopes(NamedTuple):
    """One part of an estimate in the direction of ascent: Σ_t by_logprobs_t·∇log π_t + by_entropies_t·∇H_t.

    Each [B, T]; `by_entropies` is None where no gradient flows through the entropies.
    """

    by_logprobs: Float[Tensor, "B T"]
    by_entropies: Float[Tensor, "B T"] | None = None


def slopes(algorithm: Algorithm, batch: Trajectories) -> dict[str, Slopes]:
    """The parts of the algorithm's estimate on the whole batch: its terms by name, and `PENALTIES` where it has any.

    They add up to minus the gradient of `algorithm.estimate(batch).loss` by log-probs and entropies.

    Args:
        batch: with `logprobs` and `entropies`, of which no gradient is needed, and every column that the parts read.
    """
    leaves = [values.detach().requires_grad_() for values in (batch.logprobs, batch.entropies)]
    estimate = algorithm.estimate(dataclasses.replace(batch, logprobs=leaves[0], entropies=leaves[1]))
    found = {name: Slopes(factors.weights.detach()) for name, factors in estimate.terms.items()}
    if not estimate.penalties:
        return found
    slope = torch.autograd.grad(estimate.loss, leaves, allow_unused=True)
    by_logprobs, by_entropies = (
        torch.zeros_like(leaf) if one is None else -one for one, leaf in zip(slope, leaves, strict=True)
    )
    rest = by_logprobs - estimate.weights
    through = by_entropies if bool((by_entropies != 0).any()) else None
    return found | {PENALTIES: Slopes(torch.where(rest.abs() > 1e-12 * by_logprobs.abs(), rest, 0.0), through)}


def sources(algorithm: Algorithm) -> dict[str, str]:
    """Part → what it learns from: 'rollouts', 'demonstrations', 'all' or 'preference_pairs'; of several regularizers
    with different sources 'all'."""
    found = {name: term.source for name, term in algorithm.terms.items()}
    penalised = {one.source for one in algorithm.regularizers.values() if one.coefficient != 0}
    if penalised:
        found[PENALTIES] = penalised.pop() if len(penalised) == 1 else "all"
    return found
