"""What a run writes down about each step: its figures, its prompts, and now and then responses and heaviest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upge.data import Example, Prompting
from upge.train.config import RunConfig
from upge.train.folder import RunFolder
from upge.train.heard import Heard
from upge.train.tally import Tally
from upge.train.trajectory import Trajectory
from upge.train.witness import Watch, heaviest, token_line


class Journal:
    """Decides what is looked at in a step, and writes it to the run's folder; it writes on the main rank alone."""

    def __init__(self, config: RunConfig, examples: Sequence[Example], prompting: Prompting, folder: RunFolder) -> None:
        self.config, self.examples, self.prompting, self.folder = config, examples, prompting, folder

    def watch(self, step: int) -> Watch:
        """What to look at in a step, counted from 1; the same on every rank."""
        config = self.config
        return Watch(self._due(step, config.log_rollouts), self._due(step, config.diagnose.gradients_every))

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step in (1, self.config.steps))

    def record(self, metrics: dict[str, float], heard: Heard, tallies: Sequence[Tally]) -> None:
        """Writes a step down: `metrics` is its line, `tallies` those of all ranks."""
        step = int(metrics["step"])
        self.folder.append("metrics.jsonl", metrics)
        self.folder.append("prompts.jsonl", *({"step": step, **line} for line in heard.prompts(self.examples)))
        if self.watch(step).tokens:
            self.folder.write_rows("rollouts", step, self._responses(heard.trajectories))
            heavy = heaviest(one for tally in tallies for one in tally.heaviest)
            lines = (token_line(one, self.examples, self.prompting.read) for one in heavy)
            self.folder.write_rows("tokens", step, lines)

    def _responses(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
        texts = self.prompting.decode([t.response_ids for t in trajectories])
        found = []
        for trajectory, text in zip(trajectories, texts, strict=True):
            problem = self.examples[trajectory.example].problem
            found.append(
                {
                    "prompt": problem.prompt,
                    "response": text,
                    "answer": problem.answer,
                    "reward": trajectory.reward,
                    "level": problem.level,
                    "status": trajectory.status,
                    "is_demonstration": trajectory.is_demonstration,
                    "group": trajectory.group,
                    "tokens": len(trajectory.response_ids),
                    "finished": trajectory.finished,
                }
            )
        return found
