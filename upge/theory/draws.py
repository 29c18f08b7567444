"""Every batch that could be drawn, with its probability, and what an algorithm makes of each.

A group of n rollouts is one of finitely many multisets; order does not matter to any algorithm. Each draw is a batch of
its own, so that divisors which count tokens or trajectories are counted as in training.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.gates import Gate
from upge.theory.policy import (
    Reward,
    SoftmaxPolicy,
    exact_gradient,
    forward_kl_gradient,
    reverse_kl_gradient,
    rewards_of,
)
from upge.trajectories import Trajectories

#: A trajectory to be: number of its response, is it a demonstration, preference.
Row = tuple[int, bool, int]


@dataclass(frozen=True, eq=False)
class Setting:
    """Who samples, who shows how, and what is rewarded: everything that a batch is made from.

    Attributes:
        policy: π_θ, whose gradient is asked for.
        reward: [S], or a function of a response's tokens.
        behavior: π_old, whose log-probs fill `behavior_logprobs`; None = π_θ itself, strictly on-policy.
        sampler: who in truth drew the rollouts, and fills `sampler_logprobs`; None = the behaviour policy.
        expert: π_β, who wrote the demonstrations, each drawn independently; a demonstration has its own reward.
        frozen: fills `reference_logprobs`.
        values: [P] the critic's value of each prefix.
        step: training steps behind the batch, for schedules.
    """

    policy: SoftmaxPolicy
    reward: Reward
    behavior: SoftmaxPolicy | None = None
    sampler: SoftmaxPolicy | None = None
    expert: SoftmaxPolicy | None = None
    frozen: SoftmaxPolicy | None = None
    values: Float[Tensor, "P"] | None = None
    step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", rewards_of(self.policy, self.reward))
        for name in ("behavior", "sampler", "expert", "frozen"):
            other = getattr(self, name)
            if other is not None and other.responses is not self.policy.responses:
                raise ConfigError(f"{name}: its responses are not those of `policy`; give both the same sizes and end")

    @property
    def drawn_from(self) -> SoftmaxPolicy:
        """Whose samples the rollouts are."""
        return self.sampler or self.behavior or self.policy

    @property
    def objectives(self) -> dict[str, Tensor]:
        """What there is to climb, as exact gradients [P, V]: 'reward' ∇E_π[R], 'imitation' -∇KL(π_β‖π_θ) if there is an
        expert, 'proximity' -∇KL(π_θ‖π_frozen) if there is a frozen policy."""
        found = {"reward": exact_gradient(self.policy, self.reward)}
        if self.expert is not None:
            found["imitation"] = -forward_kl_gradient(self.policy, self.expert)
        if self.frozen is not None:
            found["proximity"] = -reverse_kl_gradient(self.policy, self.frozen)
        return found

    @property
    def columns(self) -> dict[str, Tensor]:
        """What a batch's columns hold for every response, [S, T], detached."""
        space, own = self.policy.responses, self.policy.token_logprobs.detach()
        columns = {"logprobs": own, "entropies": self.policy.token_entropies.detach()}
        # On-policy the column is there as well, equal to the current log-probs: some parts read it before these exist.
        columns["behavior_logprobs"] = (self.behavior or self.policy).token_logprobs.detach()
        if self.sampler is not None:
            columns["sampler_logprobs"] = self.sampler.token_logprobs.detach()
        if self.frozen is not None:
            columns["reference_logprobs"] = self.frozen.token_logprobs.detach()
        if self.values is not None:
            columns["values"] = self.values.double()[space.prefix]
        return columns


class Evaluator:
    """The gradient of one algorithm on batches of one setting."""

    def __init__(self, algorithm: Algorithm, setting: Setting) -> None:
        self.algorithm, self.setting, self.columns = algorithm, setting, setting.columns
        self.scores, self.entropy_scores = setting.policy.token_scores, setting.policy.entropy_scores
        self.mask = setting.policy.responses.mask

    def batch(self, groups: Iterable[tuple[Row, ...]]) -> Trajectories:
        """The trajectories of these groups; log-probs and entropies are leaves with a gradient."""
        listed = [(g, *row) for g, rows in enumerate(groups) for row in rows]
        group, number, is_demonstration, preference = (torch.tensor(column) for column in zip(*listed, strict=True))
        columns = {name: column[number] for name, column in self.columns.items()}
        for name in ("logprobs", "entropies"):
            columns[name].requires_grad_()
        return Trajectories(
            **columns,
            response_mask=self.mask[number],
            rewards=self.setting.reward[number],
            group=group,
            is_demonstration=is_demonstration,
            preference=preference if bool(preference.any()) else None,
            step=self.setting.step,
            row=None,
        )

    def gradient(self, groups: list[tuple[Row, ...]]) -> Float[Tensor, "P V"]:
        """Minus the gradient of the loss by the table: Σ (-∂loss/∂log π)·∇log π, and likewise through entropies."""
        batch = self.batch(groups)
        number = torch.tensor([row[0] for rows in groups for row in rows])
        loss = self.algorithm.estimate(batch).loss
        slopes = torch.autograd.grad(loss, (batch.logprobs, batch.entropies), allow_unused=True)
        total = torch.zeros_like(self.setting.policy.logits)
        for slope, scores in zip(slopes, (self.scores, self.entropy_scores), strict=True):
            if slope is not None:
                total -= torch.einsum("bt,btpv->pv", slope, scores[number])
        return total


def check(algorithm: Algorithm, setting: Setting, group_size: int, demonstrations: int) -> None:
    """Refuses a setting that lacks what the algorithm reads or learns from.

    Raises:
        ConfigError: naming it, and what to give.
    """
    needs = algorithm.needs
    if needs.demonstrations and setting.expert is None:
        raise ConfigError(f"{algorithm.name}: learns from demonstrations, but the setting has none; give `expert`")
    algorithm.check(
        group_size=group_size,
        demonstrations=demonstrations if needs.demonstrations else None,
        provided={*setting.columns, "preference"},
    )


def all_groups(
    algorithm: Algorithm, setting: Setting, group_size: int, demonstrations: int
) -> tuple[list[tuple[tuple[Row, ...], float]], float]:
    """Every group with its probability given that it is kept, and the probability that one is kept."""
    needs, space = algorithm.needs, range(len(setting.policy.responses))
    drawn = setting.drawn_from.probabilities.tolist()
    kinds: list[list[tuple[tuple[Row, ...], float]]] = []
    if needs.rollouts:
        kinds.append([(tuple((y, False, 0) for y in ys), p) for ys, p in multisets(drawn, group_size)])
    if needs.demonstrations:
        shown = setting.expert.probabilities.tolist()
        kinds.append([(tuple((y, True, 0) for y in ys), p) for ys, p in multisets(shown, demonstrations)])
    if needs.preference_pairs:
        reward = setting.reward.tolist()
        pairs = [(a, b) for a in space for b in space if reward[a] > reward[b]]
        kinds.append([(((a, True, 1), (b, True, -1)), 2 * drawn[a] * drawn[b]) for a, b in pairs])
    groups = []
    for members in itertools.product(*kinds):
        rows = tuple(row for member, _ in members for row in member)
        groups.append((rows, math.prod(p for _, p in members)))
    if algorithm.sampling is not None:
        groups = _kept(algorithm.sampling.gate, groups, Evaluator(algorithm, setting))
    accepted = sum(p for _, p in groups)
    if accepted <= 0:
        raise ConfigError(f"{algorithm.name}: no group can be drawn; give rewards that differ between responses")
    return [(rows, p / accepted) for rows, p in groups if p > 0], accepted


def _kept(gate: Gate, groups: list, evaluator: Evaluator) -> list:
    """The groups on whose rollouts the gate is open."""
    kept = []
    for rows, p in groups:
        batch = evaluator.batch([tuple(row for row in rows if not row[1])])
        if not bool(gate.closed(batch).all()):
            kept.append((rows, p))
    return kept


def multisets(probabilities: Sequence[float], n: int) -> Iterable[tuple[tuple[int, ...], float]]:
    """All multisets of n independent draws, as sorted numbers, with their probabilities; impossible ones left out."""
    possible = [y for y, p in enumerate(probabilities) if p > 0]
    for ys in itertools.combinations_with_replacement(possible, n):
        orders = math.factorial(n)
        for times in Counter(ys).values():
            orders //= math.factorial(times)
        yield ys, orders * math.prod(probabilities[y] for y in ys)
