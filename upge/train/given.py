"""The trajectories of a step that come from the data set: demonstrations and preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upge.data import Example
from upge.needs import Needs
from upge.train.config import RunConfig
from upge.train.prompt_order import demonstration_choice
from upge.train.sample import Trajectory, has_pair
from upge.verify import Reward


class GivenTrajectories:
    """Makes the trajectories that the data set has for a prompt.

    Args:
        config: the run's settings.
        needs: the algorithm's needs.
        examples: the training set.
        rewards: verifier → how it rewards; empty if the run has no verifiers.
    """

    def __init__(
        self, config: RunConfig, needs: Needs, examples: Sequence[Example], rewards: Mapping[str, Reward]
    ) -> None:
        self.config, self.needs, self.examples, self.rewards = config, needs, examples, rewards

    def of_prompt(self, group: int, index: int, step: int) -> list[Trajectory]:
        """The prompt's demonstrations, or its pair: the first demonstration (chosen) and the rejected response."""
        example = self.examples[index]
        if self.needs.preference_pairs and example.rejected_ids is not None and has_pair(example):
            chosen = self._demonstration(index, group, example, 0)
            rejected = replace(chosen, response_ids=tuple(example.rejected_ids), preference=-1)
            rejected = replace(rejected, **self._given_reward(index, best=False))
            return [replace(chosen, preference=1), rejected]
        return self.demonstrations(group, index, step) if self.needs.demonstrations else []

    def demonstrations(self, group: int, index: int, step: int) -> list[Trajectory]:
        """The demonstrations of a prompt that this step uses."""
        example, wanted = self.examples[index], self.config.data_policy.demonstrations
        count = len(example.demonstrations)
        if wanted == 0 or wanted >= count:
            return [self._demonstration(index, group, example, choice) for choice in range(count)]
        first = demonstration_choice(step, index, count, self.config.seed)
        return [self._demonstration(index, group, example, (first + i) % count) for i in range(wanted)]

    def _demonstration(self, index: int, group: int, example: Example, choice: int) -> Trajectory:
        return Trajectory(
            example=index,
            group=group,
            prompt_ids=example.prompt_ids,
            response_ids=tuple(example.demonstrations[choice]),
            is_demonstration=True,
            pass_threshold=self.config.verify.pass_threshold,
            success=self.config.verify.success,
            **self._given_reward(index, best=True),
        )

    def _given_reward(self, index: int, best: bool) -> dict[str, Any]:
        """The fields `reward` and `rewards` of a right or a wrong response from the data set."""
        reward = self.reward(index)
        if reward is None:
            return {"reward": float(best)}
        verdict = reward.best() if best else reward.worst()
        return {"reward": verdict.reward, "rewards": reward.named(verdict)}

    def reward(self, index: int) -> Reward | None:
        """How responses to this prompt are rewarded; None if the run has no verifiers."""
        return self.rewards.get(self.examples[index].problem.verifier or self.config.verify.verifier)


def demonstration_metrics(
    trajectories: Sequence[Trajectory], examples: Sequence[Example], stop_token_ids: Sequence[int]
) -> dict[str, float]:
    """The share of a step's prompts whose demonstrations were all dropped, and of its demonstrations that were cut.

    Dropped demonstrations exceed the length limit. A demonstration counts as cut if it does not end with a stop token;
    the second metric is absent if none was cut.
    """
    chosen = [examples[index] for index in {t.example for t in trajectories}]
    if not chosen:
        return {}
    dropped = sum(bool(example.problem.demonstrations) and not example.demonstrations for example in chosen)
    ends = [t.response_ids[-1:] for t in trajectories if t.is_demonstration]
    cut = sum(not end or end[0] not in stop_token_ids for end in ends)
    metrics = {"demonstrations_dropped_share": dropped / len(chosen)}
    return metrics | ({"demonstrations_cut_share": cut / len(ends)} if cut else {})
