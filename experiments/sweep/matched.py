"""Compares the runs of a sweep at equal costs, read from their evaluations during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from experiments.compare.tables import p_text
from experiments.grid import Grid, Row, ruled
from experiments.sweep.collect import cumulative_costs, finite
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import COSTS
from experiments.sweep.tables import Figure, best_places, mean_cell_of
from upge.evaluation.intervals import holm, paired_t, t_interval
from upge.train.files import read_lines


def matched_grids(folder: SweepFolder) -> list[Grid]:
    """A table of means and one of differences to the baseline, for every measure of `match.levels`."""
    match = folder.sweep.config.match
    grids = []
    for name, levels in match["levels"].items():
        values = {cost: at_equal_cost(folder, cost, match["measure"], levels) for cost in match["costs"]}
        grids += [_means(folder, name, values), _differences(folder, name, values)]
    return grids


def missing(folder: SweepFolder) -> list[str]:
    """Sentences on the names of `match.levels` for which no run has the measure."""
    match, trained = folder.sweep.config.match, [run for run in folder.sweep.runs if folder.is_trained(run)]
    return [
        f"No run has {match['measure']} of all levels of match.levels.{name} ({', '.join(levels)})."
        for name, levels in (match["levels"].items() if match else ())
        if not any(level_curve(folder.run(run), match["measure"], levels) for run in trained)
    ]


class Matched(NamedTuple):
    """A measure at a common cost.

    Attributes:
        budget: the common cost.
        values: label → seed → the measure of its run at that cost.
        cheaper: the labels of runs that cost less than nine tenths of it in all.
    """

    budget: float
    values: Mapping[str, Mapping[int, float]]
    cheaper: frozenset[str]


def at_equal_cost(folder: SweepFolder, cost: str, measure: str, levels: Sequence[str]) -> Matched:
    """The runs of a sweep at the same cost.

    The common cost is the smallest total of the finished runs of `match.budget` (all variants if it is not given) that
    have this cost at all. Between two evaluations the measure is interpolated linearly in the cost. A run that costs
    less in all, such as one that generates no tokens, is read at its end.
    """
    runs = [run for run in folder.sweep.runs if folder.is_trained(run)]
    counted = folder.sweep.config.match.get("budget") or {run.variant for run in runs}
    spent = {run.slug: {step: costs[cost] for step, costs in cumulative_costs(folder.run(run)).items()} for run in runs}
    totals = (max(spent[run.slug].values()) for run in runs if run.variant in counted)
    budget = min((total for total in totals if total > 0), default=0.0)
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        curve = level_curve(folder.run(run), measure, levels)
        if curve:
            values.setdefault(run.label, {})[run.seed] = value_at(curve, spent[run.slug], budget)
    cheaper = frozenset(run.label for run in runs if max(spent[run.slug].values()) < 0.9 * budget)
    return Matched(budget, values, cheaper)


def value_at(curve: Mapping[int, float], spent: Mapping[int, float], budget: float) -> float:
    """The value of a curve where the cumulative cost reaches `budget`, or its last value if it never does."""
    points = [(spent[step], value) for step, value in sorted(curve.items())]
    for (before, low), (after, high) in pairwise(points):
        if before <= budget < after:
            return low + (high - low) * (budget - before) / (after - before)
    return points[-1][1]


def level_curve(path: Path, measure: str, levels: Sequence[str]) -> dict[int, float]:
    """Step → the mean of a measure over these levels with equal weights, at the evaluations that have all of them."""
    file = path / "evaluations.jsonl"
    curve = {}
    for line in read_lines(file) if file.is_file() else []:
        values = [line["levels"].get(level, {}).get(measure) for level in levels]
        if all(map(finite, values)):
            curve[line["step"]] = sum(values) / len(values)
    return curve


def _means(folder: SweepFolder, name: str, values: Mapping[str, Matched]) -> Grid:
    labels = folder.sweep.labels
    table = [[_figure(one.values.get(label)) for one in values.values()] for label in labels]
    best = [best_places([line[i] for line in table]) for i in range(len(values))]
    rows = []
    for place, (label, line) in enumerate(zip(labels, table, strict=True)):
        marks = ("*" if label in one.cheaper else "" for one in values.values())
        cells = (mean_cell_of(figure) + mark for figure, mark in zip(line, marks, strict=True))
        rows.append(Row((label, *cells), frozenset(i + 1 for i in range(len(values)) if place in best[i])))
    title = f"{name} in % at equal cost, means over seeds ± half a 95 % interval (t)"
    if any(one.cheaper for one in values.values()):
        title += "; * = costs less in all and is read at its end"
    return Grid(f"matched-{name}", title, ("", *_headings(values)), tuple(rows))


def _differences(folder: SweepFolder, name: str, values: Mapping[str, Matched]) -> Grid:
    """Paired differences to the baseline; Holm's adjustment over the labels of one cost."""
    baseline, rows = folder.sweep.baseline, []
    for cost, (_, by_label, _) in values.items():
        tests = {
            label: paired_t(by_label[label], by_label.get(baseline, {}))
            for label in folder.sweep.labels
            if label != baseline and label in by_label
        }
        kept = {label: test for label, test in tests.items() if test is not None}
        adjusted = holm([test.p_value for test in kept.values()])
        for (label, test), p in zip(kept.items(), adjusted, strict=True):
            value, half = 100 * test.interval.value, 100 * (test.interval.high - test.interval.value)
            cell = f"{value:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
            rows.append(Row((COSTS[cost], label, cell, p_text(test.p_value), p_text(p))))
    title = (
        f"{name}: difference to {baseline} at equal cost, in percentage points ± half a 95 % interval, paired by seed"
    )
    return Grid(f"matched-{name}-differences", title, ("cost", "", "difference", "p", "p (Holm)"), ruled(rows), 2)


def _headings(values: Mapping[str, Matched]) -> list[str]:
    return [f"{COSTS[cost]} ({one.budget:.3g})" for cost, one in values.items()]


def _figure(by_seed: Mapping[int, float] | None) -> Figure | None:
    return Figure(len(by_seed), t_interval(list(by_seed.values()))) if by_seed else None
