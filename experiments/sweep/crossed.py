"""Tables and a figure of a sweep that crosses its variants with the values of one key, such as rollout.lag."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.drawing import count_steps, draw_band, draw_panels, dress, save
from experiments.grid import Grid, Row
from experiments.sweep.collect import by_seed, measure_names, metric_curve
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Planned, Sweep, text
from experiments.sweep.tables import blocks, curves_of, mean_cell
from upge.evaluation.intervals import Difference, holm, paired_t

#: Steps over which the reward is averaged before it is called collapsed.
WINDOW = 8


def crossed_key(sweep: Sweep) -> str | None:
    """The key that all variants are crossed with; None for another kind of sweep or one that chooses a value."""
    grid = sweep.config.grid
    crossed = len(grid) == 1 and len(next(iter(grid.values()))) > 1 and len(sweep.config.variants) > 1
    return next(iter(grid)) if crossed and not sweep.config.select else None


def value_text(value: Any) -> str:
    """A value of the key as the heading of a column: a mapping without its braces, 'none' if it is empty."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={text(one)}" for name, one in value.items()) or "none"
    return text(value)


def value_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]], measure: str) -> Grid:
    """A row per variant and a column per value: the mean of a measure and half the width of its interval, in %."""
    title = f"{_name(measure)} in %, means over seeds ± half a 95 % interval (t)"
    return _table(sweep, "values", title, lambda run: mean_cell(rows, run.label, measure))


def change_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]], measure: str) -> Grid:
    """The difference of each value to the first one of the same variant, paired by seed."""
    first = {run.variant: run.label for run in reversed(sweep.runs)}
    key = crossed_key(sweep)
    title = f"{_name(measure)}: difference to {key}={value_text(_values(sweep)[0])} in the same row"
    return _differences(sweep, rows, measure, "changes", title, lambda run: first[run.variant])


def variant_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]], measure: str) -> Grid:
    """The difference of each variant to the baseline's variant at the same value, paired by seed."""
    own = next(run.variant for run in sweep.runs if run.label == sweep.baseline)
    labels = {value_text(_place(run)): run.label for run in sweep.runs if run.variant == own}
    title = f"{_name(measure)}: difference to {own} in the same column"
    return _differences(sweep, rows, measure, "variants", title, lambda run: labels[value_text(_place(run))])


def collapse_grid(folder: SweepFolder) -> Grid:
    """How many seeds of each point collapsed (`collapse`), and the median of the steps at which they did."""

    def cell(run: Planned) -> str:
        same = [one for one in folder.sweep.runs if one.label == run.label and folder.is_trained(one)]
        steps = [collapse(metric_curve(folder.run(one), "reward/mean")) for one in same]
        collapsed = sorted(step for step in steps if step is not None)
        middle = f", step {collapsed[len(collapsed) // 2]}" if collapsed else ""
        return f"{len(collapsed)} of {len(steps)}{middle}"

    title = f"Seeds that collapsed: mean reward of {WINDOW} steps below half of its highest until then; median step"
    return _table(folder.sweep, "collapses", title, cell)


def collapse(rewards: Mapping[int, float], window: int = WINDOW) -> int | None:
    """The first step at which the mean of the last `window` rewards is below half of its highest value until then."""
    steps, highest = sorted(rewards), -math.inf
    for end in range(window, len(steps) + 1):
        mean = sum(rewards[step] for step in steps[end - window : end]) / window
        highest = max(highest, mean)
        if mean < highest / 2:
            return steps[end - 1]
    return None


def reward_curves(folder: SweepFolder, target: Path) -> list[Path]:
    """Draw dynamics.png and .svg: a panel per variant, in it a line per value, the mean reward over the steps."""
    sweep = folder.sweep
    curves = curves_of(folder, lambda path: blocks(metric_curve(path, "reward/mean")))
    headings = [value_text(value) for value in _values(sweep)]
    panels: dict[str, dict[str, Any]] = {}
    for run in sweep.runs:
        if curves[run.label]:
            panels.setdefault(run.variant, {})[headings[_values(sweep).index(_place(run))]] = curves[run.label]
    if not panels:
        return []
    top = max(one.value for lines in panels.values() for curve in lines.values() for one in curve.values())

    def draw(axes, panel: tuple[str, Mapping], place: int) -> dict:
        title, lines = panel
        drawn = {name: draw_band(axes, name, line, headings.index(name), linewidth=1.7) for name, line in lines.items()}
        axes.set_title(title)
        axes.set_ylabel("reward")
        axes.set_ylim(0, 1.1 * top if top > 0 else 1)
        dress(axes)
        count_steps(axes)
        return drawn

    columns = min(4, len(panels))
    size = (2.6 * columns + 0.4, 2.2 * math.ceil(len(panels) / columns) + 0.5)
    return save(target, "dynamics", size, lambda canvas: draw_panels(
        canvas, columns, [*panels.items()], headings, "step", draw, title=crossed_key(sweep)
    ))  # fmt: skip


def _differences(
    sweep: Sweep,
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    label: str,
    title: str,
    other: Callable[[Planned], str],
) -> Grid:
    """Paired differences to the label `other(run)`; bold where Holm's p over the whole table is below 0.05."""
    tests: dict[str, Difference] = {}
    for run in _points(sweep):
        if other(run) != run.label:
            test = paired_t(by_seed(rows, run.label, measure), by_seed(rows, other(run), measure))
            tests |= {run.label: test} if test else {}
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))

    def cell(run: Planned) -> str:
        test = tests.get(run.label)
        if test is None:
            return "–"
        value, half = test.interval.value, test.interval.high - test.interval.value
        return f"{100 * value:+.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")

    title += ", in percentage points ± half a 95 % interval, paired by seed; bold: p (Holm) < 0.05"
    return _table(sweep, label, title, cell, lambda run: adjusted.get(run.label, math.nan) < 0.05)


def _table(
    sweep: Sweep,
    label: str,
    title: str,
    cell: Callable[[Planned], str],
    bold: Callable[[Planned], bool] = lambda run: False,
) -> Grid:
    by_variant: dict[str, list[Planned]] = {}
    for run in _points(sweep):
        by_variant.setdefault(run.variant, []).append(run)
    table_rows = tuple(
        Row((variant, *map(cell, runs)), frozenset(i + 1 for i, run in enumerate(runs) if bold(run)))
        for variant, runs in by_variant.items()
    )
    key = crossed_key(sweep) or ""
    header = (key, *(value_text(value) for value in _values(sweep)))
    return Grid(label, title, header, table_rows)


def _points(sweep: Sweep) -> list[Planned]:
    """One run of every label, in the order of the file."""
    return list({run.label: run for run in reversed(sweep.runs)}.values())[::-1]


def _place(run: Planned) -> Any:
    """The value of the crossed key in a run."""
    return next(iter(run.point.values()))


def _values(sweep: Sweep) -> list:
    return next(iter(sweep.config.grid.values()))


def _name(measure: str) -> str:
    return measure_names([measure])[measure]
