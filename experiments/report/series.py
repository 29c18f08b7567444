"""The lines of a run's plots, made of its metrics: selected by key, cut into stages and bands."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from experiments.grid import measures, number
from experiments.report.plots import PLOTS, Plot


@dataclass(frozen=True)
class Series:
    """One line of a plot: `values[i]` at `steps[i]`, NaN where the recorded value is not a finite number."""

    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def finite(self) -> list[float]:
        """The values without the gaps."""
        return [value for value in self.values if not math.isnan(value)]


@dataclass(frozen=True)
class Band(Series):
    """A line with bands around it: `ranges` are (lowest, highest) values at the same steps, the widest first."""

    ranges: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


def select(metrics: Sequence[dict]) -> tuple[list[tuple[Plot, list[Series]]], dict[str, Series]]:
    """The plots with data in lines of metrics.jsonl, with their series, and the series that no plot shows."""
    remaining = _series_by_key(metrics)
    for key in ("step", "stage"):
        remaining.pop(key, None)
    chosen = []
    for plot in PLOTS:
        keys = [
            key
            for pattern in plot.keys
            for key in remaining
            if fnmatchcase(key, pattern) and not any(fnmatchcase(key, other) for other in plot.without)
        ]
        series = [remaining.pop(key) for key in dict.fromkeys(keys) if remaining[key].finite()]
        if plot.kind == "stack":
            series = _with_rest(series, remaining.pop("time/total", None))
        if plot.kind == "band":
            series = _bands(series)
        if series:
            chosen.append((plot, _shorten(series)))
    return chosen, remaining


def stages(metrics: Sequence[dict], names: Sequence[str] = ()) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each stage of a run, by the lines' key `stage`; empty without stages."""
    steps_of: dict[int, list[int]] = {}
    for line in metrics:
        if "stage" in line:
            steps_of.setdefault(int(line["stage"]), []).append(int(line["step"]))
    labels = {number: names[number - 1] if number <= len(names) else f"stage {number}" for number in steps_of}
    return [(labels[number], min(steps), max(steps)) for number, steps in sorted(steps_of.items())]


def evaluation_plots(evaluations: Sequence[dict]) -> list[tuple[Plot, list[Series]]]:
    """A plot for each accuracy of evaluations.jsonl, with a series for each difficulty level."""
    levels = list(dict.fromkeys(name for line in evaluations for name in line.get("levels", {})))
    levels += ["all"] if any("all" in line for line in evaluations) else []
    plots = []
    for measure in measures(*evaluations):
        series = [series for level in levels if (series := _evaluation_series(evaluations, level, measure)).finite()]
        if series:
            plots.append((_evaluation_plot(measure), series))
    return plots


def _evaluation_plot(measure: str) -> Plot:
    kind, _, samples = measure.partition("@")
    title, caption = {
        "greedy": (
            "Evaluation, greedy",
            "The accuracy of the most likely answers; training should raise it at every level.",
        ),
        "mean": (
            f"Evaluation, sampled (mean@{samples})",
            "The accuracy of an average sample; it approaches the greedy curve as the policy becomes more certain.",
        ),
        "pass": (
            f"Evaluation, pass@{samples}",
            f"At least one of {samples} samples correct. If it falls while greedy rises, training only sharpens.",
        ),
    }[kind]
    return Plot(f"plot-evaluation-{kind}", title, "% of problems correct", caption, kind="evaluation", limits=(-2, 102))


def _evaluation_series(evaluations: Sequence[dict], level: str, measure: str) -> Series:
    points = [
        (line["step"], (line.get("levels", {}) | {"all": line.get("all", {})}).get(level, {})) for line in evaluations
    ]
    points = [(step, scores[measure]) for step, scores in points if measure in scores]
    return Series(level, tuple(step for step, _ in points), tuple(100 * _gap(value) for _, value in points))


def _series_by_key(metrics: Sequence[dict]) -> dict[str, Series]:
    """A series for every key with a finite number; a step whose line lacks the key is left out, not a gap."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            points.setdefault(key, []).append((line["step"], _gap(value)))
    series = {key: Series(key, *zip(*pairs, strict=True)) for key, pairs in points.items()}
    return {key: one for key, one in series.items() if one.finite()}


def _gap(value: object) -> float:
    finite = number(value)
    return math.nan if finite is None else finite


def _with_rest(parts: list[Series], total: Series | None) -> list[Series]:
    """The parts of the time, and the rest of the total, on the steps of the total."""
    if total is None:
        return parts
    if not parts:
        return [total]
    columns = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    rest = tuple(
        max(0.0, whole - sum(_zero_if_gap(column.get(step, 0.0)) for column in columns))
        for step, whole in zip(total.steps, total.values, strict=True)
    )
    known = sum(_zero_if_gap(value) for value in total.values)
    rest_share = sum(map(_zero_if_gap, rest)) / known if known else 0.0
    return parts + ([Series("time/other", total.steps, rest)] if rest_share > 0.01 else [])


def _bands(percentiles: list[Series]) -> list[Series]:
    """A band for each term, from its percentiles TERM/..._p1, p10, p50 and so on that have the median's steps."""
    terms: dict[str, dict[int, Series]] = {}
    for one in percentiles:
        name, _, percent = one.label.rpartition("_p")
        terms.setdefault(name, {})[int(percent)] = one
    bands = []
    for name, percents in terms.items():
        if 50 in percents:
            middle = percents[50]
            pairs = [
                (percents[low], percents[100 - low]) for low in sorted(percents) if low < 50 and 100 - low in percents
            ]
            ranges = tuple((low.values, high.values) for low, high in pairs if low.steps == high.steps == middle.steps)
            bands.append(Band(name, middle.steps, middle.values, ranges))
    return bands


def _zero_if_gap(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _shorten(series: list[Series]) -> list[Series]:
    """Removes from the labels the words, divided by / or _, with which all of them begin or end."""
    if len(series) < 2:
        return series
    words = [re.split(r"([/_])", one.label) for one in series]
    start = len(os.path.commonprefix(words)) // 2 * 2
    end = len(os.path.commonprefix([label[start:][::-1] for label in words])) // 2 * 2
    labels = ["".join(label[start : len(label) - end]) for label in words]
    return [replace(one, label=label or one.label) for label, one in zip(labels, series, strict=True)]
