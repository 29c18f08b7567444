"""Reads the folder of a run, finished or interrupted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from experiments.grid import number
from upge.errors import DataError, UserError
from upge.rollout.noise import NoiseConfig
from upge.train.faults import NONE
from upge.train.files import UNREADABLE
from upge.train.folder import check_format, step_of

#: The highest step of a run without a readable number of steps.
LAST_STEP = 10**9
#: The largest number that is drawn; matplotlib computes products of the numbers on an axis.
LARGEST = 1e100
#: The most rollouts to a prompt.
LARGEST_GROUP = 10**6
#: The scores of a level that the report shows.
_SCORE = re.compile(r"greedy|(pass|mean)@\d+|problems")


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

    @property
    def fault(self) -> str:
        """The fault on purpose of the run; 'none' without one."""
        return str(self.config.get("fault") or NONE)


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
    run, of_run = _read_run_json(path / "run.json")
    check_format(path, run)
    config, config_text = _read_config(path / "config.yaml")
    alarms, of_alarms = _read_lines(path / "alarms.jsonl")
    rollouts_step, rollouts, of_rollouts = _newest(path / "rollouts")
    tokens_step, tokens, of_tokens = _newest(path / "tokens")
    last = min(number(config.get("steps")) or LAST_STEP, LAST_STEP)
    (lines, of_lines), (measured, of_measured), (drawn, of_drawn) = (
        _steps_up_to(last, path / f"{name}.jsonl") for name in ("metrics", "evaluations", "prompts")
    )
    large = {key for line in lines for key, value in line.items() if _is_too_large(value)}
    metrics = _by_step([{key: _drawable(value) for key, value in line.items()} for line in lines])
    evaluations, prompts = _by_step([*map(_evaluation, measured)]), _prompts(drawn)
    notes = [f"Alarm at step {one['step']}: {one['problem']}." for one in alarms if {"step", "problem"} <= set(one)]
    notes += [*of_alarms, *of_lines, *of_measured, *of_rollouts, *of_tokens, *of_drawn]
    notes += [f"Values beyond {LARGEST:g} are left out of the plots: {', '.join(sorted(large))}."] if large else []
    notes += [*_state_of_run(config, metrics, evaluations), *_noise(lines), *of_run]
    recorded = (config, config_text, run, metrics, evaluations, rollouts, rollouts_step, prompts, tokens, tokens_step)
    return RunFolder(path, *recorded, tuple(notes))


def _read_config(path: Path) -> tuple[dict, str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except UNREADABLE as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not readable as YAML ({first_line}); restore the file that the run wrote") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: found {type(config).__name__}, expected keys and values as a run writes them")
    return config, text


def _read_run_json(path: Path) -> tuple[dict, list[str]]:
    """The content, and a note if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ["run.json is missing: versions and command line are unknown."]
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content, []
    return {}, ["run.json could not be read: versions and command line are unknown."]


def _read_lines(path: Path) -> tuple[list[dict], list[str]]:
    """The objects of a JSON Lines file, none if it is missing, and notes about lines that are left out."""
    if not path.is_file():
        return [], []
    records, notes, lines = [], [], path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            why = "is incomplete: the run was interrupted there" if position == len(lines) else "is not readable"
            notes.append(f"Line {position} of {path.name} {why}; it is left out.")
    return records, notes


def _steps_up_to(last: float, path: Path) -> tuple[list[dict], list[str]]:
    """The objects of a JSON Lines file that belong to a step of the run, and notes about lines that are left out."""
    records, notes = _read_lines(path)
    kept = [record for record in records if type(record.get("step")) is int and 0 <= record["step"] <= last]
    if len(kept) < len(records):
        notes.append(f"{len(records) - len(kept)} lines of {path.name} are of no step up to {last:.0f}; left out.")
    return kept, notes


def _is_too_large(value: object) -> bool:
    return isinstance(value, int | float) and LARGEST < abs(value) < math.inf


def _drawable(value: object) -> object:
    """A number that an axis can show, or any other value; None for other numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if abs(value) < 1 / LARGEST:
        return 0
    return value if abs(value) <= LARGEST else None


def _evaluation(record: dict) -> dict:
    """A line of evaluations.jsonl with the scores that the report shows."""
    levels = record.get("levels")
    levels = {str(name): _scores(one) for name, one in levels.items()} if isinstance(levels, dict) else {}
    whole = {"all": _scores(record["all"])} if "all" in record else {}
    return {**record, "levels": levels, **whole}


def _scores(scores: object) -> dict:
    known = scores.items() if isinstance(scores, dict) else ()
    return {name: _drawable(value) for name, value in known if _SCORE.fullmatch(name)}


def _by_step(records: list[dict]) -> tuple[dict, ...]:
    steps = {record["step"]: record for record in records}
    return tuple(steps[step] for step in sorted(steps))


def _prompts(records: list[dict]) -> tuple[dict, ...]:
    """The complete lines of prompts.jsonl, by step; runs of earlier versions have none."""
    numbers = ("step", "prompt", "rollouts", "successes")
    whole = [one for one in records if all(isinstance(one.get(key), int) for key in numbers)]
    whole = [one for one in whole if isinstance(one.get("learned"), str)]
    whole = [one for one in whole if 0 <= one["successes"] <= one["rollouts"] <= LARGEST_GROUP]
    return tuple(sorted(whole, key=lambda one: one["step"]))


def _newest(folder: Path) -> tuple[int | None, tuple[dict, ...], list[str]]:
    """The step and the lines of the newest file of a folder that has lines, and notes about lines that are left out."""
    notes: list[str] = []
    for path in sorted(folder.glob("step_*.jsonl"), reverse=True):
        records, more = _read_lines(path)
        notes += more
        if records:
            return step_of(path.stem), tuple(records), notes
    return None, (), notes


def _noise(lines: list[dict]) -> list[str]:
    """A note on the noise of the sampler, by the metrics of the last step that has any."""
    for line in reversed(lines):
        values = {name: number(line.get(f"noise/{name}")) for name in NoiseConfig.__dataclass_fields__}
        if None not in values.values():
            told = ", ".join(f"{name}={value:g}" for name, value in values.items())
            return [f"The sampler of training rollouts differed from the trainer on purpose: rollout.noise, {told}."]
    return []


def _state_of_run(config: dict, metrics: tuple[dict, ...], evaluations: tuple[dict, ...]) -> list[str]:
    notes, planned = [], number(config.get("steps"))
    last = metrics[-1]["step"] if metrics else 0
    if not metrics:
        notes.append("No training step was recorded, so there are no plots of training.")
    elif planned is not None and last < planned:
        notes.append(f"The last recorded step is {last} of {planned:.0f} planned.")
    if metrics and evaluations and evaluations[-1]["step"] < last:
        notes.append(f"The last evaluation is from step {evaluations[-1]['step']}, before the last step, {last}.")
    skipped = max((number(line.get("skipped_updates")) or 0 for line in metrics), default=0)
    if skipped:
        notes.append(f"Updates were skipped because of non-finite values: {skipped:.0f} is the highest count logged.")
    # JSON has no NaN and infinity; a run writes null for them.
    gaps = Counter(name for line in metrics for name, value in line.items() if value is None)
    if gaps:
        counts = ", ".join(f"{name} ({count} of {len(metrics)} steps)" for name, count in gaps.most_common())
        notes.append(f"Values that are NaN or infinite are gaps in the plots: {counts}.")
    return notes
