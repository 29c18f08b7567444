"""Trajectories and tokens of a step, at most: what the configuration allows, not what a model will do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.planning.machine import counted
from upge.algorithm import Algorithm
from upge.train.config import RunConfig


@dataclass(frozen=True)
class Traffic:
    """
    Attributes:
        rollouts: sampled in a step, over all ranks.
        given: demonstrations, or the sides of preference pairs, beside them, if every prompt has as many as it may.
        longest: tokens of a prompt and a response.
        updates: optimizer updates in a step.
        ranks: processes.
        block: trajectories that must stay in one micro-batch.
        budget: optimizer.micro_batch_tokens.
        epochs: passes over a step's batch.
    """

    rollouts: int
    given: int
    longest: int
    updates: int
    ranks: int
    block: int
    budget: int
    epochs: int

    @classmethod
    def of(cls, algorithm: Algorithm, config: RunConfig, ranks: int) -> Traffic:
        """That of a run's step with this algorithm. `data_policy.demonstrations=0`, all of them, counts as one."""
        needs, prompts = algorithm.step_needs, config.prompts_per_step
        each = 2 if needs.preference_pairs else max(config.data_policy.demonstrations, 1) if needs.demonstrations else 0
        rollouts = prompts * config.group_size if needs.rollouts else 0
        members = each + (config.group_size if needs.rollouts else 0)
        return cls(
            rollouts=rollouts,
            given=prompts * each,
            longest=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            updates=config.optimizer.mini_batches * config.optimizer.epochs,
            ranks=ranks,
            block=members if algorithm.reach == "group" else 1,
            budget=config.optimizer.micro_batch_tokens,
            epochs=config.optimizer.epochs,
        )

    @property
    def trajectories(self) -> int:
        """Of a step, over all ranks."""
        return self.rollouts + self.given

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks, if every response is as long as it may be."""
        return self.trajectories * self.longest

    @property
    def tokens_per_update(self) -> int:
        """On one rank, likewise."""
        return math.ceil(self.tokens * self.epochs / self.updates / self.ranks)

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch on one rank. What must stay together does so beyond the budget, too."""
        return max(self.block * self.longest, min(self.budget, self.tokens_per_update))

    @property
    def micro_batches(self) -> int:
        """Of one update on one rank, if every response is as long as it may be."""
        fitting = max(self.budget // (self.block * self.longest), 1) * self.block
        rows = math.ceil(self.trajectories * self.epochs / self.updates / self.ranks)
        return math.ceil(rows / fitting)

    def __str__(self) -> str:
        sampled = math.ceil(self.rollouts / self.ranks)
        parts = [
            f"at most {self.trajectories:,} trajectories: {self.rollouts:,} rollouts, {self.given:,} given responses",
            f"at most {self.tokens:,} tokens, {self.longest:,} each; {math.ceil(self.tokens / self.ranks):,} a rank",
            f"sampled by a rank: {counted(sampled, 'response')}",
            f"{counted(self.updates, 'update')}; micro-batches of each on a rank: at most {self.micro_batches}",
        ]
        return "\n".join(parts)
