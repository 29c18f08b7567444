"""One response of a step, and the batch that many of them make before the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upge.data import Example
from upge.trajectories import Trajectories


@dataclass(frozen=True)
class Trajectory:
    """One response of the step: a rollout, a demonstration or the rejected side of a pair.

    Attributes:
        example: index of its prompt in the training set.
        group: index of its prompt within the step.
        is_demonstration: True for all that comes from the data set.
        sampler_logprobs: as the inference engine reported them; None for a demonstration.
        finished: False if the response was cut at the length limit.
        status: of the verification: 'ok', 'timeout' or 'error'; 'demonstration' where nothing was verified.
        preference: +1 for the chosen side of a pair, -1 for the rejected one, 0 for neither.
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
    preference: int = 0


def has_pair(example: Example) -> bool:
    """True if the example has both sides of a preference pair."""
    return bool(example.demonstrations) and example.rejected_ids is not None


def usable(examples: Sequence[Example], needs: Any) -> list[int]:
    """Indices of the examples from which something can be learned: all where the algorithm has rollouts, else those
    with a demonstration or a pair, whichever it `needs`."""
    return [
        i
        for i, example in enumerate(examples)
        if needs.rollouts
        or (needs.demonstrations and example.demonstrations)
        or (needs.preference_pairs and has_pair(example))
    ]


def assemble(trajectories: Sequence[Trajectory], step: int) -> Trajectories:
    """The batch without log-probs: what can be known before the forward pass. Float64, for exact counts."""
    lengths = torch.tensor([len(t.response_ids) for t in trajectories], dtype=torch.int64)
    width = int(lengths.max()) if len(trajectories) else 1
    mask = torch.arange(width) < lengths[:, None]
    return Trajectories(
        logprobs=None,
        response_mask=mask,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
        group=torch.tensor([t.group for t in trajectories], dtype=torch.int64),
        is_demonstration=torch.tensor([t.is_demonstration for t in trajectories], dtype=torch.bool),
        sampler_logprobs=_sampler_column(trajectories, mask),
        preference=torch.tensor([t.preference for t in trajectories], dtype=torch.int64),
        step=step,
    )


def _sampler_column(trajectories: Sequence[Trajectory], mask: Tensor) -> Tensor | None:
    """[B, T]; zero for demonstrations, which no engine sampled; None without rollouts."""
    if all(t.sampler_logprobs is None for t in trajectories):
        return None
    column = torch.zeros(mask.shape)
    for row, trajectory in enumerate(trajectories):
        if trajectory.sampler_logprobs is not None:
            column[row, : len(trajectory.sampler_logprobs)] = torch.tensor(trajectory.sampler_logprobs)
    return column
