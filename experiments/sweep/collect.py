"""Collects the results of a sweep's runs as the rows of runs.csv, and finds the best value of a key."""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.evaluate.folder import answer_notes as notes_of
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import COSTS, Planned, Sweep, text
from upge.errors import ConfigError
from upge.train.faults import NONE
from upge.train.files import read_json, read_lines

#: What to do about scores that cannot be read.
_FIX = "remove the file, and the same command writes it again from the samples"
#: Metrics that are drawn over the steps, with their titles and units.
CURVES = {
    "reward/mean": ("Reward", "mean per rollout"),
    "gate/demonstration_share": ("Demonstrations", "share of trajectories"),
    "entropy": ("Entropy", "nats per token"),
    "response_length": ("Response length", "tokens"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "gate/no_signal_prompts": ("Prompts without a signal", "share"),
}


def rows(folder: SweepFolder) -> list[dict[str, Any]]:
    """A row for every trained run; docs/sweep.md describes the columns."""
    return [_row(folder, planned) for planned in folder.sweep.runs if folder.is_trained(planned)]


def _row(folder: SweepFolder, planned: Planned) -> dict[str, Any]:
    """The results of one run; those of unfinished evaluations are absent."""
    path = folder.run(planned)
    point = {name: text(value) for name, value in planned.point.items()}
    row: dict[str, Any] = {"run": planned.slug, "label": planned.label, "seed": planned.seed, **point}
    row |= _totals(path) | _last_evaluation(path)
    for name in folder.sweep.config.evaluate:
        scores = folder.evaluation(planned, name) / "scores.json"
        if scores.is_file():
            row |= _scores(name, read_json(scores, _FIX))
    return row


def answer_notes(folder: SweepFolder) -> list[str]:
    """Sentences on evaluations in which most responses give the same answer."""
    notes = []
    for planned in folder.sweep.runs:
        for name in {*folder.sweep.config.evaluate} - {*folder.missing(planned)}:
            scores = read_json(folder.evaluation(planned, name) / "scores.json", _FIX)
            notes += [f"{planned.slug}, {note}" for note in notes_of(scores)]
    return sorted(notes)


def metric_curve(path: Path, metric: str) -> dict[int, float]:
    """Step → the value of a metric of a run, without values that are not finite."""
    return {line["step"]: line[metric] for line in _lines(path, "metrics") if finite(line.get(metric))}


def evaluation_curve(path: Path, measure: str) -> dict[int, float]:
    """Step → a measure of the evaluations during training, over all problems."""
    lines = _lines(path, "evaluations")
    return {line["step"]: overall[measure] for line in lines if measure in (overall := _overall(line["levels"]))}


def _lines(path: Path, name: str) -> list[dict[str, Any]]:
    file = path / f"{name}.jsonl"
    return read_lines(file) if file.is_file() else []


def measures(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> list[str]:
    """The columns for tables.

    They are those of `wanted` that some row has. If `wanted` is empty, they are the averages of the evaluations'
    benchmarks, or else the accuracies of the runs' own evaluations.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    if wanted:
        return [column for column in wanted if column in columns]
    chosen = [column for column in columns if column.endswith("/avg") and column.count("/") == 2]
    return chosen or [c for c in columns if c == "greedy" or c.startswith(("mean@", "pass@"))]


def measure_names(columns: Sequence[str]) -> dict[str, str]:
    """Column → its displayed name.

    This is EVALUATION/BENCHMARK/LEVEL/avg without "avg", and without the evaluation unless two of them have such a
    column.
    """
    short = {c: " ".join(p for p in c.split("/")[c.count("/") > 1 :] if p != "avg") for c in columns}
    often = Counter(short.values())
    return {c: name if often[name] == 1 else f"{c.split('/')[0]}: {name}" for c, name in short.items()}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line per run and a column per value."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_seed(rows: Iterable[Mapping[str, Any]], label: str, measure: str) -> dict[int, float]:
    """Seed → the value of a measure, for the runs with this label that have it."""
    return {row["seed"]: float(row[measure]) for row in rows if row["label"] == label and finite(row.get(measure))}


def cumulative_costs(path: Path) -> dict[int, dict[str, float]]:
    """Step → what a run has cost until its end, by the names of `COSTS`; all 0 at step 0."""
    total = dict.fromkeys(COSTS, 0.0)
    costs = {0: total}
    if not (lines := _lines(path, "metrics")):
        return costs
    config, run = OmegaConf.load(path / "config.yaml"), read_json(path / "run.json", _FIX)
    for line in lines:
        prompts = line.get("sampling/prompts", int(config.prompts_per_step))
        generated = (line.get("response_length") or 0.0) * prompts * int(config.group_size)
        computed = line.get("trained/computed_tokens") or 0.0
        step = {
            "updates": line.get("updates") or 0.0,
            "generated_tokens": generated,
            "trained_tokens": line.get("trained/tokens") or 0.0,
            "flops": run["parameters"] * (2 * generated + 6 * computed),
            "training_seconds": line.get("time/total") or 0.0,
        }
        total = {name: total[name] + step[name] for name in COSTS}
        costs[line["step"]] = total
    return costs


def _totals(path: Path) -> dict[str, Any]:
    """The costs of a run."""
    costs = cumulative_costs(path)
    total = costs[max(costs)]
    counts = {name: round(value) for name, value in total.items() if name != "training_seconds"}
    totals = {"steps": max(costs), **counts, "training_seconds": round(total["training_seconds"], 1)}
    fault = str(OmegaConf.load(path / "config.yaml").get("fault", NONE))
    return totals if fault == NONE else totals | {"fault": fault}


def _last_evaluation(path: Path) -> dict[str, float]:
    lines = _lines(path, "evaluations")
    if not lines:
        return {}
    levels = lines[-1]["levels"]
    own = {f"{level}/{name}": v for level, one in levels.items() for name, v in one.items() if name != "problems"}
    return _overall(levels) | own


def _overall(levels: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over all problems."""
    total = sum(one["problems"] for one in levels.values())
    names = [name for one in levels.values() for name in one if name != "problems"]
    return {
        name: sum(one["problems"] * one[name] for one in levels.values() if name in one) / total
        for name in dict.fromkeys(names)
    }


def _scores(name: str, scores: Mapping[str, Any]) -> dict[str, float]:
    """NAME/BENCHMARK/avg, NAME/BENCHMARK/pass@k, the same by LEVEL, and NAME/average GROUP/avg."""
    values: dict[str, float] = {}
    for benchmark, one in scores["benchmarks"].items():
        parts = {benchmark: one, **{f"{benchmark}/{level}": part for level, part in one["levels"].items()}}
        for place, part in parts.items():
            values[f"{name}/{place}/avg"] = part["avg"]["value"]
            if part["samples"] > 1:
                values |= {f"{name}/{place}/pass@{k}": one["value"] for k, one in part["pass_at"].items()}
    for group, one in scores["averages"].items():
        if len(one["benchmarks"]) > 1:
            values[f"{name}/average {group}/avg"] = one["avg"]["value"]
    return values


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def best_values(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Group → the value of `select.key` with the highest mean of `select.measure` over the seeds.

    A group is the variant and the other values of the grid. Of equal means the first value of the list wins, so list
    the more conservative value first.

    Raises:
        ConfigError: a run has no number in the column of the measure.
    """
    name, measure = sweep.config.select["key"], sweep.config.select["measure"]
    by_group: dict[str, dict[Any, list[float]]] = {}
    by_slug = {row["run"]: row for row in rows}
    for run in sweep.runs:
        value = by_slug.get(run.slug, {}).get(measure)
        if not finite(value):
            columns = sorted({column for row in rows for column, value in row.items() if finite(value)})
            raise ConfigError(f"select.measure: {run.slug} has no '{measure}'; there are {', '.join(columns)}")
        by_group.setdefault(group_of(run, name), {}).setdefault(run.point[name], []).append(float(value))
    # Summed exactly, so that equal means compare equal and the first value wins.
    means = {group: {v: math.fsum(all) / len(all) for v, all in values.items()} for group, values in by_group.items()}
    return {group: max(values, key=values.__getitem__) for group, values in means.items()}


def group_of(run: Planned, name: str) -> str:
    """The group of a run: its variant and the values of the grid's keys other than `name`."""
    others = [str(value) for key, value in run.point.items() if key != name]
    return ", ".join(filter(None, [run.variant, *others]))


def with_choices(sweep: Sweep, values: Mapping[str, Any]) -> Sweep:
    """The sweep with the chosen value in every run.

    A run takes the value of the group `choose.group`, or else of its variant, of the variant's name without what
    follows its last comma (then the one before), or of its algorithm.

    Raises:
        ConfigError: no value was chosen for a run.
    """
    name = sweep.config.choose["key"]
    runs = []
    for run in sweep.runs:
        group = sweep.config.choose.get("group")
        shorter = itertools.accumulate(run.variant.split(","), lambda head, part: f"{head},{part}")
        candidates = [str(group)] if group else [*reversed([*shorter]), str(run.keys.get("algo", ""))]
        own = next((candidate for candidate in candidates if candidate in values), None)
        if name in run.keys:
            runs.append(run)
        elif own is None:
            raise ConfigError(
                f"choose: sweep={sweep.config.choose['sweep']} has chosen {name} for {', '.join(values)}, none of "
                f"which is the variant or the algorithm of '{run.label}'; give it {name} itself, or choose.group"
            )
        else:
            runs.append(replace(run, keys={**run.keys, name: values[own]}))
    return replace(sweep, runs=tuple(runs))
