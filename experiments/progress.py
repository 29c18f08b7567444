"""A run's progress in the terminal: one bar with the figures that matter, and a line per evaluation."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """A context manager around training; does nothing if not `enabled`."""

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        self.enabled = enabled
        # In a log file a bar that is redrawn twice a second would be thousands of lines.
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=steps, initial=done, unit="step", disable=not enabled, mininterval=interval, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def step(self, metrics: dict[str, Any]) -> None:
        """One training step is done."""
        shown = {"reward": metrics.get("reward/mean"), "demos": metrics.get("gate/demonstration_share")}
        shown |= {"grad": metrics.get("grad_norm"), "loss": metrics.get("loss") if shown["reward"] is None else None}
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items() if v is not None}, refresh=False)
        self._bar.update()

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation is done."""
        k, figures = line["samples"], line["all"]
        text = f"step {line['step']}: greedy {figures['greedy']:.3f}, pass@{k} {figures[f'pass@{k}']:.3f}, "
        text += f"mean@{k} {figures[f'mean@{k}']:.3f} on {figures['problems']} problems"
        tqdm.write(f"{text} ({line['time']:.0f} s)")
