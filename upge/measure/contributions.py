"""What each prompt contributes to the batches of a pool, for any number of algorithms, from few gradients.

Every part of every algorithm is Σ_t w_t ∇log π(y_t) on each trajectory. Most of these weights are alike but for a
factor: on-policy a group-relative advantage is one number per response. So each direction w/max|w| is differentiated
once for a response, whoever asks for it, and an algorithm is a sparse table of factors:

    contribution of prompt q in round r = Σ_{its trajectories and directions} factor · ∇ Σ_t direction_t·log π_t.

Nothing here knows which algorithm asks: what is alike is found in the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.measure.pool import Columns, Pool, batches, pair_of
from upge.measure.scores import Pair, Request, Scores
from upge.train.sample import Trajectory
from upge.trajectories import Trajectories
from upge.views import SUCCESS_REWARD

#: Directions whose entries differ by less are the same: beyond it are only rounding errors of the weights.
_SAME = 1e-7


class Directions:
    """The gradients that are asked for, each once."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._known: dict[Pair, list[tuple[int, Tensor]]] = {}

    def find(self, pair: Pair, weights: Float[Tensor, "t"], entropy: Float[Tensor, "t"] | None) -> tuple[int, float]:
        """(number of the gradient, factor) of Σ_t weights_t·∇log π_t + entropy_t·∇H_t, not all of them 0."""
        zeros = torch.zeros_like(weights)
        both = torch.cat([weights, zeros if entropy is None else entropy])
        factor = float(both[both.abs().argmax()])
        direction = both / factor
        known = self._known.setdefault(pair, [])
        for number, other in known:
            if bool((direction - other).abs().max() < _SAME):
                return number, factor
        known.append((len(self.requests), direction))
        by_entropies = direction[len(weights) :]
        through = by_entropies if bool((by_entropies != 0).any()) else None
        self.requests.append(Request(pair, direction[: len(weights)], through))
        return len(self.requests) - 1, factor


@dataclass
class Entries:
    """A sparse matrix of factors: which gradient, in which cell prompt·R + round."""

    cells: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def dense(self, shape: tuple[int, int], gradients: Float[Tensor, "g k"]) -> Float[Tensor, "M R k"]:
        """[M, R, k] the contributions."""
        cells = shape[0] * shape[1]
        factors = torch.tensor(self.factors, dtype=gradients.dtype)
        places = torch.tensor([self.cells, self.gradients], dtype=torch.long).reshape(2, -1)
        matrix = torch.sparse_coo_tensor(places, factors, (cells, len(gradients)), check_invariants=True)
        return torch.sparse.mm(matrix, gradients).reshape(*shape, -1)


@dataclass(frozen=True)
class Estimator:
    """An algorithm on a pool: the entries of its parts, and what each part learns from."""

    name: str
    parts: Mapping[str, Entries]
    sources: Mapping[str, str]

    def contributions(
        self, pool: Pool, gradients: Float[Tensor, "g k"], parts: Sequence[str] | None = None
    ) -> Float[Tensor, "M R k"]:
        """[M, R, k] of some parts together, by default of all: the estimate of a batch is the sum over its prompts."""
        chosen = [self.parts[name] for name in (self.parts if parts is None else parts)]
        joined = Entries(
            [c for one in chosen for c in one.cells],
            [g for one in chosen for g in one.gradients],
            [f for one in chosen for f in one.factors],
        )
        return joined.dense((pool.prompts, pool.rounds), gradients)


def estimator(
    algorithm: Algorithm, pool: Pool, columns: Mapping[Pair, Columns], directions: Directions, step: int = 0
) -> Estimator:
    """The algorithm's estimates on all batches of the pool, each planned whole as training plans it."""
    known = sources(algorithm)
    parts = {name: Entries() for name in known}
    for number, members, batch in batches(pool, algorithm, columns, step):
        for name, found in slopes(algorithm, batch).items():
            active = (found.by_logprobs != 0).any(dim=1)
            if found.by_entropies is not None:
                active |= (found.by_entropies != 0).any(dim=1)
            for row in active.nonzero()[:, 0].tolist():
                length, trajectory = len(members[row].response_ids), members[row]
                entropy = None if found.by_entropies is None else found.by_entropies[row, :length]
                place = directions.find(pair_of(trajectory), found.by_logprobs[row, :length], entropy)
                parts[name].cells.append(trajectory.group * pool.rounds + number)
                parts[name].gradients.append(place[0])
                parts[name].factors.append(place[1])
    return Estimator(algorithm.name, parts, known)


def gradients(scores: Scores, requests: Sequence[Request], done=lambda number: None) -> Float[Tensor, "g k"]:
    """[g, k] the gradients of all requests; `done` is told how many have been added."""
    found: Tensor | None = None
    for members, values in scores.gradients(requests):
        if found is None:
            found = torch.empty(len(requests), scores.width, dtype=values.dtype)
        found[members] = values.cpu()
        done(len(members))
    return torch.zeros(0, scores.width) if found is None else found


def true_gradient(
    scores: Scores, groups: Sequence[Sequence[Sequence[Trajectory]]], done=lambda number: None
) -> Float[Tensor, "M H k"]:
    """[M, H, k] an unbiased estimate of each prompt's ∇E[R] from each of its H independent parts.

    1/n Σ_i (R_i - mean of the other R)·∇log π(y_i), the leave-one-out estimate over whole responses.

    Args:
        groups: [M][H] at least two rollouts each, of the policy itself.
        done: is told how many of the rollouts have been dealt with.
    """
    width, parts = scores.width, len(groups[0])
    weights: dict[Pair, dict[int, float]] = {}
    for cell, rollouts in enumerate(group for own in groups for group in own):
        mean, count = sum(t.reward for t in rollouts) / len(rollouts), len(rollouts)
        for rollout in rollouts:
            advantage = (rollout.reward - mean) / (count - 1)
            if advantage != 0:
                mine = weights.setdefault(pair_of(rollout), {})
                mine[cell] = mine.get(cell, 0.0) + advantage
    pairs = list(weights)
    requests = [Request(pair, torch.ones(len(pair[1]), dtype=torch.float64)) for pair in pairs]
    total = torch.zeros(len(groups) * parts, width)
    # What is not needed again is not kept: there are as many gradients as rollouts.
    for members, values in scores.gradients(requests):
        total = total.to(values.dtype)
        for number, gradient in zip(members, values.cpu(), strict=True):
            for cell, weight in weights[pairs[number]].items():
                total[cell].add_(gradient, alpha=weight)
        done(len(members))
    return total.reshape(len(groups), parts, width)


def pass_rate(rollouts: Sequence[Trajectory]) -> float:
    """The share of successes."""
    return sum(t.reward > SUCCESS_REWARD for t in rollouts) / len(rollouts)


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
