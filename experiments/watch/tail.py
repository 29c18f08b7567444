"""Reads the files of a run while it writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.grid import number
from upge.train.files import read_lines

#: Title of a column → metric.
COLUMNS = {
    "reward": "reward/mean",
    "passed": "pass_rate",
    "loss": "loss",
    "grad norm": "grad_norm",
    "entropy": "entropy",
    "tokens": "response_length",
    "s/step": "time/total",
}


class Tail:
    """The lines of a JSON Lines file that have been added since the last look.

    A run that continues from a checkpoint replaces the file by a shorter one, which is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._offset = path, 0, 0

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """The new complete lines, and whether they are all lines of a file that was replaced."""
        try:
            state = self._path.stat()
        except FileNotFoundError:
            return [], False
        is_other = bool(self._file) and (state.st_ino != self._file or state.st_size < self._offset)
        self._file, self._offset = state.st_ino, 0 if is_other else self._offset
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = [line for text in whole.splitlines() if (line := _parsed(text)) is not None]
        return lines, is_other


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class Run:
    """What is known of a run.

    Attributes:
        steps: the number of steps that it will have; None = unknown.
        lines: the metrics of its steps.
    """

    def __init__(self, folder: Path, steps: int | None) -> None:
        self.folder, self.steps, self.lines = folder, steps, list[dict[str, Any]]()
        self._tail = Tail(folder / "metrics.jsonl")

    def look(self) -> list[dict[str, Any]]:
        """Read what is new; return the lines of new steps."""
        new, is_other = self._tail.new()
        self.lines = [*([] if is_other else self.lines), *new]
        return new

    @property
    def ending(self) -> str:
        """How the run ended; empty while it runs."""
        try:
            record = json.loads((self.folder / "exit.json").read_text("utf-8"))
            return f"the run ended with exit code {record['code']}: {record['reason']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def summary(self) -> str:
        """Step, time left, the last evaluation and the alarms."""
        parts = [self._place(), self._evaluation(), self._alarms()]
        return "; ".join(filter(None, parts))

    def _place(self) -> str:
        if not self.lines:
            return "no step yet"
        step = self.lines[-1]["step"]
        of = f"step {step}" + (f" of {self.steps}" if self.steps else "")
        seconds = [value for line in self.lines[-20:] if (value := number(line.get("time/total"))) is not None]
        if not seconds or not self.steps or step >= self.steps:
            return of
        left = sum(seconds) / len(seconds) * (self.steps - step)
        return f"{of}, about {duration(left)} left without evaluations"

    def _evaluation(self) -> str:
        path = self.folder / "evaluations.jsonl"
        lines = read_lines(path) if path.is_file() else []
        if not lines or not isinstance(lines[-1].get("all"), Mapping):
            return ""
        scores = {name: number(value) for name, value in lines[-1]["all"].items() if name != "problems"}
        told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)
        return f"evaluation of step {lines[-1]['step']}: {told}"

    def _alarms(self) -> str:
        path = self.folder / "alarms.jsonl"
        lines = read_lines(path) if path.is_file() else []
        return "alarms: " + ", ".join(f"{one.get('alarm')} (step {one['step']})" for one in lines) if lines else ""


def cells(line: Mapping[str, Any]) -> list[str]:
    """The step and the columns of a line of metrics.jsonl."""
    values = [number(line.get(metric)) for metric in COLUMNS.values()]
    return [str(line["step"]), *("-" if value is None else f"{value:.4g}" for value in values)]


def duration(seconds: float) -> str:
    """A time such as '12 min', in the largest unit of which it has at least two."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
