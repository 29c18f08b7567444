"""How much an algorithm learns from a question's rollouts and how much from a demonstration, as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.pipeline import Pipeline
from upge.trajectories import Trajectories

#: The token probability at which weights are taken that depend on it, and the entropy that goes with it (two tokens
#: that are equally likely).
PROBABILITY, ENTROPY = 0.5, math.log(2)


@dataclass(frozen=True)
class Balance:
    """Σ_tokens |weight|, the number in front of ∇log π_θ, of one question, times the number of questions of the update.

    Attributes:
        rollouts: of the rollouts of a question that `right` of `group_size` have solved.
        demonstration: of that question's demonstration; where the algorithm takes none there, of the demonstration of
            a question that no rollout has solved.
        tokens: the length of all these responses.
    """

    rollouts: float
    demonstration: float
    right: int
    group_size: int
    tokens: int

    @property
    def ratio(self) -> float | None:
        """Rollouts over demonstration; None where one of them teaches nothing."""
        return self.rollouts / self.demonstration if self.rollouts and self.demonstration else None

    def __str__(self) -> str:
        if self.ratio is None:
            sources = [n for n, w in (("rollouts", self.rollouts), ("demonstrations", self.demonstration)) if w]
            return f"a step learns from {sources[0]} alone" if sources else "nothing to learn from such a question"
        return (
            f"rollouts : demonstration = {self.rollouts:.4g} : {self.demonstration:.4g} = {self.ratio:.4g}\n"
            f"(Σ|weight| of a question with {self.right} of {self.group_size} rollouts right, {self.tokens:,} tokens a "
            f"response, probability {PROBABILITY:g} and entropy {ENTROPY:.2f} a token)"
        )


def balance(algorithm: Algorithm, group_size: int, tokens: int) -> Balance:
    """The balance of an algorithm at its first step.

    Args:
        group_size: rollouts per question, of which half are right, rounded down.
        tokens: length of every response.
    """
    right = group_size // 2
    rewards = [1.0] * right + [0.0] * (group_size - right) + [1.0]
    rewards += [0.0] * group_size + [1.0]
    batch = _columns(torch.tensor(rewards), group_size + 1, tokens, algorithm.initial_state())
    # Without the kind of trajectories that the algorithm's steps have none of.
    needs = algorithm.step_needs
    there = torch.where(batch.is_demonstration, needs.demonstrations, needs.rollouts).nonzero()[:, 0]
    own = {"logprobs": batch.logprobs[there], "entropies": batch.entropies[there], "row": torch.arange(len(there))}
    weights = torch.zeros(len(rewards), dtype=torch.float64)
    weights[there] = algorithm.estimate(batch.select(there, **own)).weights.double().abs().sum(dim=1)
    rows = weights.view(2, group_size + 1) * 2
    demonstration = rows[0, -1] if rows[0, -1] else rows[1, -1]
    return Balance(float(rows[0, :-1].sum()), float(demonstration), right, group_size, tokens)


def balances(algorithm: Algorithm | Pipeline, group_size: int, tokens: int) -> dict[str, Balance]:
    """The balance of each stage by its name. An algorithm that learns from preference pairs has none."""
    stages = Pipeline.of(algorithm).stages
    plain = {name: stage.algorithm for name, stage in stages.items() if not stage.algorithm.needs.preference_pairs}
    return {name: balance(one, group_size, tokens) for name, one in plain.items()}


def _columns(rewards: Tensor, size: int, tokens: int, state: Mapping[str, float]) -> Trajectories:
    """Two questions of `size` trajectories each, the last of which is the demonstration; strictly on-policy."""
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
