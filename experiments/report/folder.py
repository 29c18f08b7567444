"""What a run recorded: its folder, finished or interrupted, and the table of its accuracy before and after training.

The numbers of the table come from two lines of evaluations.jsonl. `accuracy_rows` computes the rows once for the
terminal (`print_table`) and the HTML report, so that the two cannot disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from experiments.grid import plain_table
from upge.errors import DataError, UserError


@dataclass(frozen=True)
class RunFolder:
    """The data that a report shows; `notes` are sentences on what was left out or is unusual."""

    path: Path
    config: dict
    config_text: str
    run: dict
    metrics: tuple[dict, ...]
    evaluations: tuple[dict, ...]
    rollouts: tuple[dict, ...]
    rollouts_step: int | None
    prompts: tuple[dict, ...]
    tokens: tuple[dict, ...]
    tokens_step: int | None
    notes: tuple[str, ...]


def read_run(run_dir: str | Path) -> RunFolder:
    """Read the folder of a run.

    Unreadable lines, such as half a line of an interrupted run, are left out with a note. If several lines have the
    same step, as after a resumed run, the last one counts.

    Raises:
        UserError: the folder does not exist, or has no config.yaml or metrics.jsonl.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give the folder of a run, the one that holds metrics.jsonl")
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"{path} is not the folder of a run: {' and '.join(missing)} not found in it; "
            "give the folder that was named as output= of the run"
        )
    notes: list[str] = []
    config, config_text = _read_config(path / "config.yaml")
    metrics = _by_step(_read_lines(path / "metrics.jsonl", notes))
    evaluations = _by_step(_read_lines(path / "evaluations.jsonl", notes))
    rollouts_step, rollouts = _newest(path / "rollouts", notes)
    tokens_step, tokens = _newest(path / "tokens", notes)
    prompts = _prompts(_read_lines(path / "prompts.jsonl", notes))
    notes += _state_of_run(config, metrics, evaluations)
    run = _read_run_json(path / "run.json", notes)
    recorded = (config, config_text, run, metrics, evaluations, rollouts, rollouts_step, prompts, tokens, tokens_step)
    return RunFolder(path, *recorded, tuple(notes))


def _read_config(path: Path) -> tuple[dict, str]:
    text = path.read_text(encoding="utf-8")
    try:
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{path}: not readable as YAML ({first_line}); restore the file that the run wrote") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: found {type(config).__name__}, expected keys and values as a run writes them")
    return config, text


def _read_run_json(path: Path, notes: list[str]) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("run.json is missing: versions and command line are unknown.")
        return {}
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    notes.append("run.json could not be read: versions and command line are unknown.")
    return {}


def _read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a JSON Lines file; empty for a missing file."""
    if not path.is_file():
        return []
    records, lines = [], path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            why = "is incomplete: the run was interrupted there" if position == len(lines) else "is not readable"
            notes.append(f"Line {position} of {path.name} {why}; it is left out.")
    return records


def _by_step(records: list[dict]) -> tuple[dict, ...]:
    steps = {record["step"]: record for record in records if number(record.get("step")) is not None}
    return tuple(steps[step] for step in sorted(steps))


def _prompts(records: list[dict]) -> tuple[dict, ...]:
    """The complete lines of prompts.jsonl, by step; runs of earlier versions have none."""
    numbers = ("step", "prompt", "rollouts", "successes")
    whole = [one for one in records if all(isinstance(one.get(key), int) for key in numbers) and "learned" in one]
    return tuple(sorted(whole, key=lambda one: one["step"]))


def _newest(folder: Path, notes: list[str]) -> tuple[int | None, tuple[dict, ...]]:
    """The step and the lines of the newest file of a folder that has lines."""
    for path in sorted(folder.glob("step_*.jsonl"), reverse=True):
        if records := _read_lines(path, notes):
            digits = path.stem.removeprefix("step_")
            return int(digits) if digits.isdigit() else None, tuple(records)
    return None, ()


def _state_of_run(config: dict, metrics: tuple[dict, ...], evaluations: tuple[dict, ...]) -> list[str]:
    notes, planned = [], number(config.get("steps"))
    last = metrics[-1]["step"] if metrics else 0
    if not metrics:
        notes.append("No training step was recorded, so there are no plots of training.")
    elif planned is not None and last < planned:
        notes.append(f"The run ended at step {last} of {planned:.0f} planned.")
    if metrics and evaluations and evaluations[-1]["step"] < last:
        notes.append(f"The last evaluation is from step {evaluations[-1]['step']}, before the last step, {last}.")
    skipped = max((number(line.get("skipped_updates")) or 0 for line in metrics), default=0)
    if skipped:
        notes.append(f"Updates were skipped because of non-finite values: {skipped:.0f} is the highest count logged.")
    return notes


@dataclass(frozen=True)
class Change:
    """One accuracy, a share of problems in [0, 1], before and after training; None where it was not measured."""

    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After minus before, or None when one of them is missing."""
        return None if self.before is None or self.after is None else self.after - self.before

    def percents(self) -> tuple[str, str, str]:
        """Before, after and the signed difference in percent with one decimal; a dash stands for a missing number."""
        before, after = ("–" if value is None else f"{100 * value:.1f}" for value in (self.before, self.after))
        return before, after, "" if self.difference is None else f"{100 * self.difference:+.1f}"


@dataclass(frozen=True)
class Row:
    """A difficulty level: how many problems it has and the change of each measure, in the order of `measures`."""

    level: str
    problems: int | None
    changes: tuple[Change, ...]


def measures(*evaluations: Mapping) -> tuple[str, ...]:
    """The accuracies that these evaluation lines hold, in reading order: greedy, pass@k, mean@k."""
    names = {key: None for line in evaluations for _, scores in _levels(line) for key in scores}
    kinds = ("greedy", "pass@", "mean@")
    return tuple(key for kind in kinds for key in names if key.startswith(kind))


def accuracy_rows(before: Mapping, after: Mapping) -> list[Row]:
    """A row for each difficulty level of either evaluation line, in their order, and last the row of all problems."""
    old, new = dict(_levels(before)), dict(_levels(after))
    names = [name for name in {**old, **new} if name != "all"]
    names += ["all"] if "all" in old or "all" in new else []
    rows = []
    for name in names:
        was, now = old.get(name, {}), new.get(name, {})
        changes = tuple(Change(number(was.get(key)), number(now.get(key))) for key in measures(before, after))
        rows.append(Row(name, now.get("problems", was.get("problems")), changes))
    return rows


def print_table(before: Mapping, after: Mapping, console: Console | None = None) -> None:
    """Prints the change of every measure per level, within 80 columns for level names of up to 10 characters.

    `before` and `after` are lines of evaluations.jsonl; an empty mapping stands for an evaluation that never happened.
    The table goes to `console`, by default standard output, and is plain text if that is not a terminal.
    """
    console = console or Console(highlight=False)
    ascii_only = console.options.ascii_only
    arrow = "->" if ascii_only else "→"
    title = f"Accuracy in %, step {before.get('step', '?')} {arrow} step {after.get('step', '?')}, and the difference"
    table = plain_table(title)
    table.add_column("level", overflow="fold", min_width=8)
    table.add_column("n", justify="right", no_wrap=True)
    for name in measures(before, after):
        table.add_column(name, justify="right", no_wrap=True)
    for row in accuracy_rows(before, after):
        cells = [_cell(change, arrow, ascii_only) for change in row.changes]
        problems = "" if row.problems is None else str(row.problems)
        if row.level == "all" and table.row_count:
            table.add_section()
        table.add_row(row.level, problems, *cells, style="bold" if row.level == "all" else "")
    console.print(table)


def number(value: object) -> float | None:
    """`value` as a finite float, or None when it is missing, not a number, infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _levels(line: Mapping) -> Iterator[tuple[str, Mapping]]:
    yield from line.get("levels", {}).items()
    if "all" in line:
        yield "all", line["all"]


def _cell(change: Change, arrow: str, ascii_only: bool) -> str:
    before, after, difference = change.percents()
    cell = f"{before} {arrow} {after:>5} {difference:>5}"
    return cell.replace("–", "-") if ascii_only else cell
