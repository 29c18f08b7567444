"""The trajectories of a step as they are collected, and the batch of columns that is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upge.data import Example
from upge.needs import Needs
from upge.prompt_memory import PromptColumns, Remembered
from upge.trajectories import Trajectories
from upge.verify import NamedReward
from upge.views import PASS_THRESHOLD

#: (prompt_ids, response_ids): the part of a trajectory that models read.
TokenIds = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of a step: a rollout, a demonstration, or the rejected side of a preference pair.

    Attributes:
        example: index of its example in the training set.
        group: index of its prompt within the step.
        prompt_ids, response_ids: the tokens.
        reward: the verifier's reward; for a demonstration the largest that the verifier gives, for a rejected response
            the smallest.
        is_demonstration: True for everything that comes from the data set.
        sampler_logprobs: log-probs of the sampled tokens, as the inference engine reported them; None for everything
            that comes from the data set.
        behavior_logprobs: the trainer's log-probs of the response's tokens under the policy that sampled them; None if
            that is the current policy.
        sampled_step: the step, from 0, that sampled a replayed rollout; None for trajectories of this step.
        prefix_tokens: number of tokens of a demonstration that a rollout's response begins with.
        hint_tokens: number of tokens of a demonstration at the end of a rollout's prompt.
        remembered: what is known of its prompt from earlier steps; None if no part reads it.
        finished: False if the response was cut off at the length limit.
        extracted: the answer that the verifier read in a rollout; None if it found none or does not report it.
        status: the status of the verification: 'ok', 'timeout' or 'error'; 'demonstration' if nothing was verified.
        detail: the reason for a timeout or an error.
        rewards: the individual reward of each verifier that `reward` combines; empty if no verifier is known.
        pass_threshold: a rollout counts as a success above this reward; the same for a whole step.
        success: the name of the reward that decides on success; empty = `reward`; the same for a whole step.
        teacher_prompt_ids: the prompt that the teacher reads in place of the policy's; None = the same.
        preference: +1 for the chosen side of a pair, -1 for the rejected one, 0 for neither.
        index: its place in the step, from 0 and the same on every rank. It is the trajectory's row in the step's batch
            and identifies it in metrics and in the lines of rollouts/ and tokens/.
    """

    example: int
    group: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    is_demonstration: bool
    sampler_logprobs: tuple[float, ...] | None = None
    finished: bool = True
    status: str = "demonstration"
    extracted: str | None = None
    preference: int = 0
    index: int = 0
    detail: str = ""
    rewards: tuple[NamedReward, ...] = ()
    pass_threshold: float = PASS_THRESHOLD
    success: str = ""
    teacher_prompt_ids: tuple[int, ...] | None = None
    prefix_tokens: int = 0
    hint_tokens: int = 0
    remembered: Remembered | None = None
    behavior_logprobs: tuple[float, ...] | None = None
    sampled_step: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the trajectory counts as a success."""
        deciding = (one.reward for one in self.summands if one.name == self.success)
        return next(deciding, self.reward) > self.pass_threshold

    @property
    def summands(self) -> tuple[NamedReward, ...]:
        """The rewards that `reward` is a sum of; empty if it is the reward of one verifier."""
        return () if [one.weight for one in self.rewards] == [1.0] else self.rewards

    @property
    def is_replayed(self) -> bool:
        """Whether an earlier step sampled the trajectory."""
        return self.sampled_step is not None

    @property
    def is_fresh(self) -> bool:
        """Whether the trajectory is a rollout that this step sampled."""
        return not self.is_demonstration and not self.is_replayed

    @property
    def guiding_tokens(self) -> int:
        """The number of tokens of a demonstration that a rollout continues, in prompt or response."""
        return self.prefix_tokens + self.hint_tokens

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The response as the verifier reads it, including demonstration tokens at its start or at the prompt's end."""
        return self.prompt_ids[len(self.prompt_ids) - self.hint_tokens :] + self.response_ids

    @property
    def ids(self) -> TokenIds:
        """Prompt and response."""
        return self.prompt_ids, self.response_ids

    @property
    def teacher_ids(self) -> TokenIds:
        """The prompt as the teacher reads it, and the response."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids, self.response_ids


def indexed(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The trajectories of a step, in order, each with its `index`."""
    return [replace(trajectory, index=index) for index, trajectory in enumerate(trajectories)]


def has_pair(example: Example) -> bool:
    """True if the example has both sides of a preference pair."""
    return bool(example.demonstrations) and example.rejected_ids is not None


def usable(examples: Sequence[Example], needs: Needs) -> list[int]:
    """Indices of the examples that an algorithm with these needs can learn from.

    These are all examples if the algorithm learns from rollouts. Otherwise they are the examples that have a
    demonstration or a preference pair, whichever it needs.
    """

    def is_usable(example: Example) -> bool:
        demonstrated = needs.demonstrations and bool(example.demonstrations)
        return needs.rollouts or demonstrated or (needs.preference_pairs and has_pair(example))

    return [i for i, example in enumerate(examples) if is_usable(example)]


def assemble(trajectories: Sequence[Trajectory], step: int) -> Trajectories:
    """The batch of B trajectories without log-probs of the policy, after `step` training steps.

    Rewards are float64, so that counts and means over them are exact.
    """
    lengths = torch.tensor([len(t.response_ids) for t in trajectories], dtype=torch.int64)
    width = int(lengths.max()) if len(trajectories) else 1
    mask = torch.arange(width) < lengths[:, None]
    prefixes, hints = (
        torch.tensor([getattr(t, name) for t in trajectories], dtype=torch.int64)
        for name in ("prefix_tokens", "hint_tokens")
    )
    return Trajectories(
        **_memory_columns(trajectories),
        logprobs=None,
        response_mask=mask,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        group=torch.tensor([t.group for t in trajectories], dtype=torch.int64),
        is_demonstration=torch.tensor([t.is_demonstration for t in trajectories], dtype=torch.bool),
        is_demonstration_token=torch.arange(width) < prefixes[:, None],
        is_guided=torch.tensor([t.guiding_tokens > 0 for t in trajectories], dtype=torch.bool),
        is_replayed=torch.tensor([t.is_replayed for t in trajectories], dtype=torch.bool),
        finished=torch.tensor([t.finished for t in trajectories], dtype=torch.bool),
        sampler_logprobs=_column([t.sampler_logprobs for t in trajectories], trajectories, mask),
        behavior_logprobs=_column([t.behavior_logprobs for t in trajectories], trajectories, mask),
        preference=torch.tensor([t.preference for t in trajectories], dtype=torch.int64),
        step=step,
        total_lengths=lengths + hints if bool(hints.any()) else None,
        pass_threshold=trajectories[0].pass_threshold if trajectories else PASS_THRESHOLD,
        succeeded=_succeeded(trajectories),
        **_named_rewards(trajectories),
    )


def _memory_columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Columns [B] of what is remembered of the trajectories' prompts; empty if some have no such record."""
    remembered = [t.remembered for t in trajectories if t.remembered is not None]
    if len(remembered) < len(trajectories) or not trajectories:
        return {}
    return PromptColumns.of(remembered).named()


def _succeeded(trajectories: Sequence[Trajectory]) -> Tensor | None:
    """[B] True for successes; None if `reward` alone decides."""
    if not any(t.success for t in trajectories):
        return None
    return torch.tensor([t.passed for t in trajectories], dtype=torch.bool)


def _named_rewards(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """The columns `named_rewards` and `reward_weights`; empty if the trajectories differ in names or weights."""
    weights = [{one.name: one.weight for one in t.rewards} for t in trajectories]
    if not weights or any(other != weights[0] for other in weights):
        return {}
    rows = [{one.name: one.reward for one in t.rewards} for t in trajectories]
    named = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in weights[0]}
    return {"named_rewards": named, "reward_weights": weights[0]}


def _column(
    values: Sequence[tuple[float, ...] | None], trajectories: Sequence[Trajectory], mask: Tensor
) -> Tensor | None:
    """[B, T] values of the last tokens of responses, zero elsewhere; None if no trajectory has values."""
    if all(of_tokens is None for of_tokens in values):
        return None
    column = torch.zeros(mask.shape)
    for row, (of_tokens, trajectory) in enumerate(zip(values, trajectories, strict=True)):
        if of_tokens is not None:
            end = len(trajectory.response_ids)
            column[row, end - len(of_tokens) : end] = torch.tensor(of_tokens)
    return column
