"""The contributions of each prompt to the batches of a pool, for any number of algorithms, from few gradients.

Every part of every algorithm is Σ_t w_t ∇log π(y_t) on each trajectory, or on a support beyond the sampled token
Σ_t Σ_v k_tv ∇log π(v|t). Most of these weights differ only by a factor: on-policy, a group-relative advantage is one
number per response. Each distinct direction w/max|w| of a response is therefore differentiated once for all algorithms,
and an algorithm is a sparse matrix of factors:

    contribution of prompt q in round r = Σ_{its trajectories and directions} factor · ∇ Σ_t direction_t·log π_t.

Equal directions are recognized by their numbers alone, so this module does not depend on any particular algorithm.

Legend: M, R and H as in `upge.measure.pool`; B trajectories of T tokens; t tokens of one response; g gradients of k
numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.candidates import SupportCoefficients
from upge.measure.pool import Columns, Pool, batches, pair_of
from upge.measure.scores import Pair, Request, Scores
from upge.train.sample import Trajectory
from upge.trajectories import Trajectories

#: Directions whose entries differ by less count as equal; the weights' rounding errors are below it.
_SAME = 1e-7


class Directions:
    """The distinct gradients that a measurement needs, in `requests`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._known: dict[tuple[Pair, tuple[bool, ...]], list[tuple[int, Tensor]]] = {}

    def find(self, wanted: Request) -> tuple[int, float]:
        """Register a gradient, whose coefficients are not all 0, unless it is a multiple of a known one.

        Returns:
            (index in `requests`, factor): the gradient is that of the request times the factor.
        """
        given = torch.cat([one.flatten() for one in wanted[1:] if isinstance(one, Tensor)])
        factor = float(given[given.abs().argmax()])
        direction, kind = given / factor, tuple(one is None for one in wanted[1:])
        known = self._known.setdefault((wanted.pair, kind), [])
        for number, other in known:
            if bool((direction - other).abs().max() < _SAME):
                return number, factor
        known.append((len(self.requests), direction))
        scaled = (None if one is None else one / factor for one in wanted[1:])
        self.requests.append(Request(wanted.pair, *scaled))  # pyright: ignore[reportArgumentType]
        return len(self.requests) - 1, factor


@dataclass
class Entries:
    """A sparse matrix of factors, as parallel lists.

    Attributes:
        cells: prompt·R + round of each entry.
        gradients: the index of its gradient.
        factors: its factor.
    """

    cells: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def dense(self, shape: tuple[int, int], gradients: Float[Tensor, "g k"]) -> Float[Tensor, "M R k"]:
        """The contributions, for `shape` = (M, R) and the gradients that the entries refer to."""
        cells = shape[0] * shape[1]
        factors = torch.tensor(self.factors, dtype=gradients.dtype)
        places = torch.tensor([self.cells, self.gradients], dtype=torch.long).reshape(2, -1)
        matrix = torch.sparse_coo_tensor(places, factors, (cells, len(gradients)), check_invariants=True)
        return torch.sparse.mm(matrix, gradients).reshape(*shape, -1)


@dataclass(frozen=True)
class Estimator:
    """An algorithm on a pool.

    Attributes:
        parts: the entries of each part: a term, or all regularizers together (`PENALTIES`).
        sources: the trajectories that each part learns from, see `sources`.
    """

    name: str
    parts: Mapping[str, Entries]
    sources: Mapping[str, str]

    def contributions(
        self, pool: Pool, gradients: Float[Tensor, "g k"], parts: Sequence[str] | None = None
    ) -> Float[Tensor, "M R k"]:
        """The contribution of each prompt in each round, of some parts or of all (None).

        The estimate of a batch is the sum over its prompts. `gradients` are those of all requests.
        """
        entries = [self.parts[name] for name in (self.parts if parts is None else parts)]
        joined = Entries(
            [c for one in entries for c in one.cells],
            [g for one in entries for g in one.gradients],
            [f for one in entries for f in one.factors],
        )
        return joined.dense((pool.prompts, pool.rounds), gradients)


def estimator(
    algorithm: Algorithm, pool: Pool, columns: Mapping[Pair, Columns], directions: Directions, step: int = 0
) -> Estimator:
    """An algorithm's estimates on all batches of a pool, each planned on the whole batch as in training.

    Args:
        columns: as for `upge.measure.pool.batches`.
        directions: receives the gradients that the estimates need.
        step: number of training steps before the batches, for schedules.
    """
    sources_of_parts = sources(algorithm)
    parts = {name: Entries() for name in sources_of_parts}
    for number, members, batch in batches(pool, algorithm, columns, step):
        for name, slope in slopes(algorithm, batch).items():
            for row in slope.active.nonzero()[:, 0].tolist():
                trajectory = members[row]
                index, factor = directions.find(slope.request(pair_of(trajectory), row))
                parts[name].cells.append(trajectory.group * pool.rounds + number)
                parts[name].gradients.append(index)
                parts[name].factors.append(factor)
    return Estimator(algorithm.name, parts, sources_of_parts)


def gradients(
    scores: Scores, requests: Sequence[Request], done: Callable[[int], object] = lambda number: None
) -> Float[Tensor, "g k"]:
    """The gradients of all requests; `done` is called after each batch of gradients with their number."""
    rows: Tensor | None = None
    for members, values in scores.gradients(requests):
        if rows is None:
            rows = torch.empty(len(requests), scores.width, dtype=values.dtype)
        rows[members] = values.cpu()
        done(len(members))
    return torch.zeros(0, scores.width) if rows is None else rows


def true_gradient(
    scores: Scores,
    groups: Sequence[Sequence[Sequence[Trajectory]]],
    done: Callable[[int], object] = lambda number: None,
) -> Float[Tensor, "M H k"]:
    """[M, H, k] an unbiased estimate of each prompt's ∇E[R] from each of its H independent parts.

    It is the leave-one-out estimate over whole responses: 1/n Σ_i (R_i - mean of the other R)·∇log π(y_i).

    Args:
        groups: [M][H] at least two rollouts each, sampled from the policy itself.
        done: called after each batch of gradients with its number of gradients.
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
    # Each gradient is added and discarded: there are as many gradients as rollouts.
    for members, values in scores.gradients(requests):
        total = total.to(values.dtype)
        for number, gradient in zip(members, values.cpu(), strict=True):
            for cell, weight in weights[pairs[number]].items():
                total[cell].add_(gradient, alpha=weight)
        done(len(members))
    return total.reshape(len(groups), parts, width)


def pass_rate(rollouts: Sequence[Trajectory]) -> float:
    """The fraction of the rollouts that succeed."""
    return sum(t.passed for t in rollouts) / len(rollouts)


#: The name of the part that consists of all additive regularizers: KL, entropy.
PENALTIES = "regularizers"


class Slopes(NamedTuple):
    """One part of an estimate, in the direction of ascent.

    It is Σ_t (by_logprobs_t·∇log π_t + by_entropies_t·∇H_t + Σ_v by_vocabulary_tv·∇log π(v|t)).

    Attributes:
        by_logprobs: [B, T] the coefficients of ∇log π.
        by_entropies: [B, T] the coefficients of ∇H; None if no gradient flows through the entropies.
        by_vocabulary: [B, T, V] those of all tokens of the vocabulary; None on the sampled token alone.
    """

    by_logprobs: Float[Tensor, "B T"]
    by_entropies: Float[Tensor, "B T"] | None = None
    by_vocabulary: Float[Tensor, "B T V"] | None = None

    @property
    def active(self) -> Bool[Tensor, "B"]:
        """[B] True for the trajectories with a coefficient that is not 0."""
        return torch.stack([(one != 0).flatten(1).any(dim=1) for one in self if one is not None]).any(dim=0)

    def request(self, pair: Pair, row: int) -> Request:
        """The gradient of one trajectory; coefficients through entropies that are all 0 are left out."""
        length = len(pair[1])
        first, *rest = (None if one is None else one[row, :length] for one in self)
        assert first is not None
        return Request(pair, first, *(one if one is not None and bool((one != 0).any()) else None for one in rest))


def slopes(algorithm: Algorithm, batch: Trajectories) -> dict[str, Slopes]:
    """The parts of the algorithm's estimate on a whole batch: its terms by name, and `PENALTIES` if there are any.

    They add up to minus the gradient of `algorithm.estimate(batch).loss` with respect to log-probs, entropies and the
    policy's distributions.

    Args:
        batch: with `logprobs` and `entropies`, which need no gradient, and every column that the algorithm's parts
            read; with `distributions` if it has a term on a support other than the sampled token.
    """
    assert batch.logprobs is not None and batch.entropies is not None
    leaves = [values.detach().requires_grad_() for values in (batch.logprobs, batch.entropies)]
    estimate = algorithm.estimate(dataclasses.replace(batch, logprobs=leaves[0], entropies=leaves[1]))
    parts = {name: Slopes(factors.weights.detach()) for name, factors in estimate.terms.items()}
    for name, coefficients in estimate.on_support.items():
        parts[name] = Slopes(torch.zeros_like(batch.logprobs), by_vocabulary=_by_vocabulary([coefficients], batch))
    if not estimate.penalties:
        return parts
    slope = torch.autograd.grad(estimate.loss, leaves, allow_unused=True)
    by_logprobs, by_entropies = (
        torch.zeros_like(leaf) if one is None else -one for one, leaf in zip(slope, leaves, strict=True)
    )
    rest = by_logprobs - estimate.weights
    through = by_entropies if bool((by_entropies != 0).any()) else None
    rest = torch.where(rest.abs() > 1e-12 * by_logprobs.abs(), rest, 0.0)
    divergences = list(estimate.divergences.values())
    return parts | {PENALTIES: Slopes(rest, through, _by_vocabulary(divergences, batch) if divergences else None)}


def _by_vocabulary(coefficients: Sequence[SupportCoefficients], batch: Trajectories) -> Float[Tensor, "B T V"]:
    """[B, T, V] the derivatives of the objectives of `coefficients` with respect to the policy's log-probs."""
    assert batch.distributions is not None
    policy = batch.distributions.policy.detach().requires_grad_()
    given = batch.distributions._replace(policy=policy).at(batch.response_mask)
    losses = torch.stack([one.loss(given) for one in coefficients])
    return -torch.autograd.grad(losses.sum(), policy)[0]


def sources(algorithm: Algorithm) -> dict[str, str]:
    """The source of each part: 'rollouts', 'demonstrations', 'all' or 'preference_pairs'.

    Regularizers with different sources have the source 'all' together.
    """
    by_part: dict[str, str] = {name: term.source for name, term in algorithm.terms.items()}
    penalized = {one.source for one in algorithm.regularizers.values() if one.coefficient != 0}
    if penalized:
        by_part[PENALTIES] = penalized.pop() if len(penalized) == 1 else "all"
    return by_part
