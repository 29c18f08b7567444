"""What a run records about each step: metrics, prompts and, every N steps, responses and tokens with large weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upge.data import Example, Prompting
from upge.train.config import RunConfig
from upge.train.diagnostics import Diagnostics, TopTrajectory, merged, token_line
from upge.train.folder import RunFolder
from upge.train.metrics import ActiveTrajectories
from upge.train.sample import Trajectory


class Recorder:
    """Decides what is measured in a step, and writes it to the run's folder; only the main rank writes.

    Args:
        config: of the run.
        examples: the training set.
        prompting: decodes responses.
        folder: of the run.
    """

    def __init__(self, config: RunConfig, examples: Sequence[Example], prompting: Prompting, folder: RunFolder) -> None:
        self.config, self.examples, self.prompting, self.folder = config, examples, prompting, folder

    def diagnostics(self, step: int) -> Diagnostics:
        """What to measure in a step, counted from 1; the same on every rank."""
        config = self.config
        return Diagnostics(self._due(step, config.log_rollouts), self._due(step, config.diagnose.gradients_every))

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step in (1, self.config.steps))

    def record(self, metrics: Mapping[str, float], active: ActiveTrajectories, tops: Sequence[TopTrajectory]) -> None:
        """Writes the lines of a step.

        Args:
            metrics: the step's line of metrics.jsonl.
            active: the step's trajectories, and which of them its updates learned from.
            tops: those of all ranks.
        """
        step = int(metrics["step"])
        self.folder.append("metrics.jsonl", metrics)
        self.folder.append("prompts.jsonl", *({"step": step, **line} for line in active.prompt_lines(self.examples)))
        if self.diagnostics(step).top_tokens:
            self.folder.write_rows("rollouts", step, self._response_lines(active.trajectories))
            lines = (token_line(top, self.examples, self.prompting.read) for top in merged(tops))
            self.folder.write_rows("tokens", step, lines)

    def _response_lines(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
        """Lines of rollouts/step_*.jsonl; docs/metrics.md lists their fields."""
        texts = self.prompting.decode([t.response_ids for t in trajectories])
        lines = []
        for trajectory, text in zip(trajectories, texts, strict=True):
            problem = self.examples[trajectory.example].problem
            lines.append(
                {
                    "index": trajectory.index,
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
        return lines
