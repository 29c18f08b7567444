"""Which of a step's trajectories its updates learned from, as shares and prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from upge.data import Example
from upge.plan import Plan
from upge.train.packing import packed_length
from upge.train.trajectory import Trajectory
from upge.trajectories import SUCCESS_REWARD


@dataclass(frozen=True)
class Heard:
    """The part that each of a step's trajectories has in its updates; interleaved updates are not counted.

    Attributes:
        trajectories: of the step, B.
        counted: [B] those with a coefficient other than zero in some term: what the gates chose.
        kept: [B] those that can contribute to the gradient, the only ones that reach the model.
    """

    trajectories: Sequence[Trajectory]
    counted: Bool[Tensor, "B"]
    kept: Bool[Tensor, "B"]

    @staticmethod
    def of(trajectories: Sequence[Trajectory], cuts: Sequence[Tensor], plans: Sequence[Plan]) -> Heard:
        """From the plans of a step's updates; `cuts` are the rows that each update learns from."""
        counted, kept = (torch.zeros(len(trajectories), dtype=torch.bool) for _ in range(2))
        for rows, plan in zip(cuts, plans, strict=True):
            counted[rows], kept[rows] = plan.active, plan.contributing
        return Heard(trajectories, counted, kept)

    @property
    def demonstration_share(self) -> float:
        """Demonstrations among the trajectories that count."""
        chosen = [self.trajectories[row].is_demonstration for row in self.counted.nonzero()[:, 0].tolist()]
        return sum(chosen) / max(1, len(chosen))

    @property
    def no_signal_prompts(self) -> float:
        """Share of the prompts none of whose trajectories can contribute to the gradient."""
        heard = {self.trajectories[row].group for row in self.kept.nonzero()[:, 0].tolist()}
        return 1 - len(heard) / max(1, len({t.group for t in self.trajectories}))

    @property
    def skipped_tokens(self) -> float:
        """Share of the step's tokens, prompts included, whose trajectories have no weight in any update."""
        lengths = [packed_length(t.prompt_ids, t.response_ids) for t in self.trajectories]
        tokens = torch.tensor(lengths, dtype=torch.float64)
        return float(tokens[~self.kept].sum() / tokens.sum().clamp(min=1))

    def prompts(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """A line of prompts.jsonl for each of the step's prompts, see docs/metrics.md.

        Args:
            examples: the training set.
        """
        groups: dict[int, list[int]] = {}
        for row, trajectory in enumerate(self.trajectories):
            groups.setdefault(trajectory.group, []).append(row)
        for _, rows in sorted(groups.items()):
            members = [self.trajectories[row] for row in rows]
            problem = examples[members[0].example].problem
            rewards = [t.reward for t in members if not t.is_demonstration]
            yield {
                "prompt": members[0].example,
                "id": problem.id,
                "level": problem.level,
                "rollouts": len(rewards),
                "successes": sum(reward > SUCCESS_REWARD for reward in rewards),
                "gate": self._kinds(rows, self.counted),
                "learned": self._kinds(rows, self.counted & self.kept),
            }

    def _kinds(self, rows: Sequence[int], chosen: Tensor) -> str:
        """What the chosen of these rows are: 'rollouts', 'demonstrations', 'both' or 'nothing'."""
        found = {self.trajectories[row].is_demonstration for row in rows if bool(chosen[row])}
        if len(found) == 2:
            return "both"
        return "demonstrations" if True in found else "rollouts" if False in found else "nothing"
