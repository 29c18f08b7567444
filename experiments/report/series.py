"""The lines of a report's plots, made of the metrics and evaluations of a run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from experiments.grid import measures, number
from experiments.report.plots import PLOTS, Parts, Plot


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


class Selection(NamedTuple):
    """The plots of a run with their lines, those whose lines do not change, and the metrics that no plot shows."""

    plots: list[tuple[Plot, list[Series]]]
    constant: list[tuple[Plot, list[Series]]]
    others: dict[str, Series]


def select(metrics: Sequence[dict], parts: Parts | None = None) -> Selection:
    """Choose the plots for lines of metrics.jsonl of an algorithm with these parts.

    A plot is left out if it has fewer lines than it needs, not counting those of nothing but rounding errors.
    """
    parts = parts or Parts()
    remaining = series_by_key(metrics)
    for key in ("step", "stage"):
        remaining.pop(key, None)
    chosen: list[tuple[Plot, list[Series]]] = []
    constant: list[tuple[Plot, list[Series]]] = []
    for plot in PLOTS:
        keys = matching(plot, remaining) if plot.when(parts) else []
        keys = [key for key in keys if not plot.floor or _largest([remaining[key]]) > plot.floor]
        if len(keys) < plot.fewest:
            continue
        series = [remaining.pop(key) for key in keys]
        if plot.kind == "stack":
            series = _with_rest(series, remaining.pop("time/total", None))
        if plot.kind == "band":
            series = _bands(series)
        if series:
            if parts.terms == 1:
                plot = replace(plot, title=plot.title.removesuffix(" of each term"))
            (constant if is_constant(series) else chosen).append((plot, _shorten(series)))
    return Selection(chosen, constant, remaining)


def matching(plot: Plot, keys: Iterable[str]) -> list[str]:
    """The keys that a plot shows, in the order of its patterns."""
    allowed = [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in plot.without)]
    return [*dict.fromkeys(key for pattern in plot.keys for key in allowed if fnmatchcase(key, pattern))]


def is_constant(series: Sequence[Series]) -> bool:
    """Whether no line changes by more than 1e-6 of the largest value in the plot; False for a single point."""
    edges = [edge for one in series if isinstance(one, Band) for pair in one.ranges for edge in pair]
    lines = [*(one.finite() for one in series), *edges]
    if max(map(len, lines)) < 2:
        return False
    return all(max(line) - min(line) <= 1e-6 * _largest(series) for line in lines)


def _largest(series: Sequence[Series]) -> float:
    return max((abs(value) for one in series for value in one.finite()), default=0.0)


def stages(metrics: Sequence[dict], names: Sequence[str] = ()) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each stage of a run, by the lines' key `stage`; empty without stages."""
    steps_of: dict[int, list[int]] = {}
    for line in metrics:
        if type(line.get("stage")) is int and line["stage"] > 0:
            steps_of.setdefault(int(line["stage"]), []).append(int(line["step"]))
    labels = {number: names[number - 1] if number <= len(names) else f"stage {number}" for number in steps_of}
    return [(labels[number], min(steps), max(steps)) for number, steps in sorted(steps_of.items())]


def levels_of(evaluations: Sequence[dict]) -> list[str]:
    """The difficulty levels in lines of evaluations.jsonl."""
    return list(dict.fromkeys(name for line in evaluations for name in line.get("levels", {})))


def evaluation_plots(evaluations: Sequence[dict], colors: Mapping[str, str]) -> list[tuple[Plot, list[Series]]]:
    """A plot for each accuracy of evaluations.jsonl, with a line for each difficulty level, in its color.

    A single evaluation gives no plot, because the table of the page shows it.
    """
    if len({line["step"] for line in evaluations}) < 2:
        return []
    levels = [*levels_of(evaluations), *["all"] * any("all" in line for line in evaluations)]
    plots = []
    for measure in measures(*evaluations):
        series = [series for level in levels if (series := evaluation_series(evaluations, level, measure)).finite()]
        if series:
            palette = tuple(colors.get(one.label, "ink") for one in series)
            plots.append((replace(evaluation_plot(measure), palette=palette), series))
    return plots


def evaluation_plot(measure: str) -> Plot:
    """The plot of one accuracy, without the colors of its lines."""
    kind, _, samples = measure.partition("@")
    title = {"greedy": "greedy", "mean": f"sampled (mean@{samples})", "pass": f"pass@{samples}"}[kind]
    caption = {
        "greedy": "The accuracy of the most likely answers; training should raise it at every level.",
        "mean": "The accuracy of an average sample; it approaches the greedy curve as the policy becomes more certain.",
        "pass": f"At least one of {samples} samples correct. If it falls while greedy rises, training only sharpens.",
    }[kind]
    about = (f"plot-evaluation-{kind}", f"Evaluation, {title}", "% of problems correct", caption)
    return Plot(*about, kind="evaluation", limits=(-2, 102))


def evaluation_series(evaluations: Sequence[dict], level: str, measure: str) -> Series:
    """The accuracy of a level, or of all problems, over the steps of the evaluations, in %."""
    each = {line["step"]: {**line.get("levels", {}), "all": line.get("all", {})} for line in evaluations}
    points = [(step, of[level][measure]) for step, of in each.items() if measure in of.get(level, {})]
    return Series(level, tuple(step for step, _ in points), tuple(100 * _gap(value) for _, value in points))


def series_by_key(metrics: Sequence[dict]) -> dict[str, Series]:
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
        max(whole - sum(_zero_if_gap(column.get(step, 0.0)) for column in columns), 0.0)  # a gap stays a gap
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
        if percent.isdecimal() and len(percent) < 3:
            terms.setdefault(name, {})[int(percent)] = one
    bands = []
    for name, percents in terms.items():
        if 50 in percents:
            middle = percents[50]
            lows = [low for low in sorted(percents) if low < 50 and 100 - low in percents]
            pairs = [(percents[low], percents[100 - low]) for low in lows]
            ranges = tuple((low.values, high.values) for low, high in pairs if low.steps == high.steps == middle.steps)
            bands.append(Band(name, middle.steps, middle.values, ranges))
    return bands


def _zero_if_gap(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _shorten(series: list[Series]) -> list[Series]:
    """Remove from the labels the words, divided by / or _, with which all of them begin or end."""
    if len(series) < 2:
        return series
    words = [re.split(r"([/_])", one.label) for one in series]
    start = len(os.path.commonprefix(words)) // 2 * 2
    end = len(os.path.commonprefix([label[start:][::-1] for label in words])) // 2 * 2
    labels = ["".join(label[start : len(label) - end]) for label in words]
    return [replace(one, label=label or one.label) for label, one in zip(labels, series, strict=True)]
