"""The ratio of an algorithm's weight on a prompt's rollouts to its weight on a demonstration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.pipeline import Pipeline
from upge.trajectories import Trajectories

#: Token probability and entropy at which weights that depend on them are evaluated (two equally likely tokens).
PROBABILITY, ENTROPY = 0.5, math.log(2)


@dataclass(frozen=True)
class Balance:
    """Σ_tokens |weight| of one prompt, times the number of prompts in the update.

    The weight is the factor of ∇log π_θ.

    Attributes:
        rollouts: the sum over the rollouts of a prompt.
        demonstration: the sum over that prompt's demonstration; if the algorithm does not use it there, over the
            demonstration of a prompt that no rollout has solved.
        right: the number of the prompt's rollouts that are right.
        tokens: the length of each of these responses.
    """

    rollouts: float
    demonstration: float
    right: int
    group_size: int
    tokens: int

    @property
    def ratio(self) -> float | None:
        """Rollouts over demonstration; None if one of them is zero."""
        return self.rollouts / self.demonstration if self.rollouts and self.demonstration else None

    def __str__(self) -> str:
        if self.ratio is None:
            sources = [n for n, w in (("rollouts", self.rollouts), ("demonstrations", self.demonstration)) if w]
            return f"a step learns from {sources[0]} alone" if sources else "a step learns nothing from such a prompt"
        return (
            f"rollouts : demonstration = {self.rollouts:.4g} : {self.demonstration:.4g} = {self.ratio:.4g}\n"
            f"(Σ|weight| of a prompt with {self.right} of {self.group_size} rollouts right, {self.tokens:,} tokens per "
            f"response, probability {PROBABILITY:g} and entropy {ENTROPY:.2f} per token)"
        )


def balance(algorithm: Algorithm, group_size: int, tokens: int) -> Balance:
    """The balance of an algorithm at its first step.

    Args:
        group_size: rollouts per prompt, of which half are right, rounded down.
        tokens: length of every response.
    """
    right = group_size // 2
    rewards = [1.0] * right + [0.0] * (group_size - right) + [1.0]
    rewards += [0.0] * group_size + [1.0]
    batch = _columns(torch.tensor(rewards), group_size + 1, tokens, algorithm.initial_state())
    # Leave out the kind of trajectories that the algorithm's steps do not have.
    needs = algorithm.step_needs
    there = torch.where(batch.is_demonstration, needs.demonstrations, needs.rollouts).nonzero()[:, 0]
    own = {"logprobs": batch.logprobs[there], "entropies": batch.entropies[there], "row": torch.arange(len(there))}
    weights = torch.zeros(len(rewards), dtype=torch.float64)
    weights[there] = algorithm.estimate(batch.select(there, **own)).weights.double().abs().sum(dim=1)
    rows = weights.view(2, group_size + 1) * 2
    demonstration = rows[0, -1] if rows[0, -1] else rows[1, -1]
    return Balance(float(rows[0, :-1].sum()), float(demonstration), right, group_size, tokens)


def balances(algorithm: Algorithm | Pipeline, group_size: int, tokens: int) -> dict[str, Balance]:
    """The balance of each stage by its name, without stages that learn from preference pairs."""
    stages = Pipeline.of(algorithm).stages
    plain = {name: stage.algorithm for name, stage in stages.items() if not stage.algorithm.needs.preference_pairs}
    return {name: balance(one, group_size, tokens) for name, one in plain.items()}


def _columns(rewards: Tensor, size: int, tokens: int, state: Mapping[str, float]) -> Trajectories:
    """Two prompts of `size` trajectories each, the last of which is the demonstration; strictly on-policy."""
    count = len(rewards)
    logprobs = torch.full((count, tokens), math.log(PROBABILITY))
    places = torch.arange(count)
    return Trajectories(
        logprobs=logprobs,
        response_mask=torch.ones(count, tokens, dtype=torch.bool),
        rewards=rewards,
        group=places // size,
        is_demonstration=places % size == size - 1,
        behavior_logprobs=logprobs,
        sampler_logprobs=logprobs,
        reference_logprobs=logprobs,
        values=torch.zeros(count, tokens),
        entropies=torch.full((count, tokens), ENTROPY),
        preference=torch.zeros(count, dtype=torch.long),
        state=state,
    )
