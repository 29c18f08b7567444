"""The tables and figures of a sweep: means over seeds with intervals, paired tests, chosen values, costs, curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from omegaconf import OmegaConf

from experiments.compare.load import Run
from experiments.compare.tables import ALL, MISSING, Exclusive, exclusive, p_text
from experiments.compare.write import Panel
from experiments.compare.write import draw as draw_pass
from experiments.drawing import count_steps, draw_band, draw_panels, dress, save
from experiments.grid import Grid, Row, ruled
from experiments.sweep.collect import (
    CURVES,
    best_values,
    by_seed,
    evaluation_curve,
    group_of,
    measure_names,
    metric_curve,
)
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import COSTS, Sweep
from upge.evaluation.intervals import Interval, holm, paired_t, t_interval
from upge.evaluation.scores import powers_of_two


@dataclass(frozen=True)
class Figure:
    """A measure over the runs of one label: the mean over seeds with its interval from `t_interval`."""

    runs: int
    interval: Interval


def figure(rows: Sequence[Mapping[str, Any]], label: str, measure: str) -> Figure | None:
    """The measure over the runs of a label; None if no run has it."""
    values = list(by_seed(rows, label, measure).values())
    return Figure(len(values), t_interval(values)) if values else None


def mean_cell(rows: Sequence[Mapping[str, Any]], label: str, measure: str) -> str:
    """The mean of a measure over the runs of a label and half the width of its interval, in %."""
    return mean_cell_of(figure(rows, label, measure))


def mean_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Grid:
    """A row per label and a column per measure: the mean and half the width of its interval, in %."""
    table = [[figure(rows, label, measure) for measure in measures] for label in sweep.labels]
    best = [best_places([line[i] for line in table]) for i in range(len(measures))]
    table_rows = []
    for place, (label, line) in enumerate(zip(sweep.labels, table, strict=True)):
        counts = [one.runs for one in line if one] or [0]
        seeds = f"{max(counts)}" if len({*counts}) == 1 else f"{min(counts)}–{max(counts)}"
        bold = frozenset(i + 2 for i in range(len(measures)) if place in best[i])
        table_rows.append(Row((label, seeds, *map(mean_cell_of, line)), bold))
    title, names = "Means over seeds in %, ± half a 95 % interval (t)", measure_names(measures)
    return Grid("means", title, ("", "seeds", *(names[measure] for measure in measures)), tuple(table_rows))


def difference_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Grid | None:
    """Paired tests of every label against the baseline; None if no label shares enough seeds with it.

    Holm's p is adjusted for the number of labels that are tested on a measure.
    """
    table_rows, names = [], measure_names(measures)
    for measure in measures:
        base = by_seed(rows, sweep.baseline, measure)
        others = [label for label in sweep.labels if label != sweep.baseline]
        tests = {label: paired_t(by_seed(rows, label, measure), base) for label in others}
        tests = {label: test for label, test in tests.items() if test is not None}
        adjusted = holm([test.p_value for test in tests.values()])
        for (label, test), p in zip(tests.items(), adjusted, strict=True):
            low, high = test.interval.low, test.interval.high
            ends = MISSING if math.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
            seeds = len({*by_seed(rows, label, measure)} & {*base})
            cells = (names[measure], label, str(seeds), f"{100 * test.interval.value:+.1f}", ends,
                     p_text(test.p_value), p_text(p))  # fmt: skip
            table_rows.append(Row(cells))
    header = ("measure", "", "seeds", "difference", "95 % interval", "p", "p (Holm)")
    title = f"Difference to {sweep.baseline} in percentage points, paired by seed"
    return Grid("differences", title, header, ruled(table_rows), 2) if table_rows else None


def choice_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Grid:
    """The mean of `select.measure` for every value of `select.key`, the chosen one in bold."""
    name, measure = sweep.config.select["key"], sweep.config.select["measure"]
    chosen, values = best_values(sweep, rows), sweep.config.grid[name]
    labels = {(group_of(run, name), str(run.point[name])): run.label for run in sweep.runs}
    table_rows = []
    for group, best in chosen.items():
        line = [figure(rows, labels[group, str(value)], measure) for value in values]
        table_rows.append(Row((group, *map(mean_cell_of, line)), frozenset({values.index(best) + 1})))
    title = f"{measure_names([measure])[measure]} in % by {name}; the chosen value is bold"
    return Grid("choice", title, ("", *map(str, values)), tuple(table_rows))


def cost_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Grid:
    """The costs of each label's runs, means over seeds."""
    table_rows = []
    for label in sweep.labels:
        values = [figure(rows, label, name) for name in COSTS]
        table_rows.append(Row((label, *(MISSING if v is None else _number(v.interval.value) for v in values))))
    return Grid("costs", "Cost of a run", ("", *COSTS.values()), tuple(table_rows))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def level_grid(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Grid | None:
    """Accuracy by level, on the evaluations' benchmarks or else in the runs' own evaluations; None without levels."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    levels = [c for c in columns if c.endswith("/avg") and c.count("/") == 3]
    levels = levels or [c for c in columns if c.count("/") == 1 and "/mean@" in c]
    table_rows, names = [], measure_names(levels)
    for place, column in enumerate(levels):
        line = [figure(rows, label, column) for label in sweep.labels]
        rule = bool(place) and column.count("/") == 3 and column.split("/")[:2] != levels[place - 1].split("/")[:2]
        cells = (names[column], *map(mean_cell_of, line))
        table_rows.append(Row(cells, frozenset(i + 1 for i in best_places(line)), rule))
    title = "By level, means over seeds in %"
    return Grid("levels", title, ("", *sweep.labels), tuple(table_rows)) if table_rows else None


def exclusive_grid(sweep: Sweep, name: str, runs: Mapping[tuple[str, int], Run], solved: str = "most") -> Grid | None:
    """Problems that only the baseline or only another label solves in the evaluation `name`, averaged over seeds."""
    table_rows, fields = [], ("only_first", "only_second", "both")
    for label in sweep.labels:
        seeds = [s for (own, s) in runs if own == label and (sweep.baseline, s) in runs]
        if label == sweep.baseline or not seeds:
            continue
        lines: dict[tuple[str, str], list[Exclusive]] = {}
        for seed in seeds:
            for line in exclusive(runs[sweep.baseline, seed], runs[label, seed], solved):
                lines.setdefault((line.benchmark, line.level), []).append(line)
        counts = {key: [sum(getattr(line, one) for line in same) / len(same) for one in fields]
                  for key, same in lines.items()}  # fmt: skip
        # Leave out benchmarks of which neither solves a problem, and the total of a single level.
        levels = Counter(benchmark for benchmark, _ in lines)
        single = {benchmark for benchmark, count in levels.items() if count == 2}
        shown = [key for key in lines if any(counts[key[0], ALL]) and not (key[1] == ALL and key[0] in single)]
        for key in shown:
            cells = (label, *key, str(lines[key][0].problems), *(f"{count:.1f}" for count in counts[key]))
            table_rows.append(Row(cells))
    which = f" of {name}" if len(sweep.config.evaluate) > 1 else ""
    title = (f"Problems{which} that only {sweep.baseline}, or only the other, solves in more than half of the samples; "
             "means over seeds")  # fmt: skip
    header = ("other", "benchmark", "level", "N", f"only {sweep.baseline}", "only the other", "both")
    return Grid("exclusive", title, header, ruled(table_rows), 3) if table_rows else None


def best_places(values: Sequence[Figure | None]) -> set[int]:
    """The positions of the highest mean as printed; empty if no two means differ."""
    means = {place: round(100 * one.interval.value, 1) for place, one in enumerate(values) if one}
    differ = len({*means.values()}) > 1
    return {place for place, mean in means.items() if mean == max(means.values())} if differ else set()


def mean_cell_of(one: Figure | None) -> str:
    """A mean and half the width of its interval, in %."""
    if one is None:
        return MISSING
    half = one.interval.high - one.interval.value
    return f"{100 * one.interval.value:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


#: Number of blocks of steps over which a curve is averaged, because single steps are noisy.
BLOCKS = 20


def pass_curves(folder: SweepFolder, rows: Sequence[Mapping], target: Path) -> list[Path]:
    """Draw passk.png and .svg, a panel for every benchmark with several samples; no files if there is none."""
    labels, panels = folder.sweep.labels, []
    columns = dict.fromkeys(column for row in rows for column in row)
    names = measure_names(list(columns))
    for place in [c.removesuffix("/pass@1") for c in columns if c.endswith("/pass@1") and c.count("/") == 2]:
        largest = max(int(c.rsplit("@", 1)[1]) for c in columns if c.startswith(f"{place}/pass@"))
        curves = {}
        for label in labels:
            by_k = {k: list(by_seed(rows, label, f"{place}/pass@{k}").values()) for k in powers_of_two(largest)}
            curves[label] = {k: _visible(t_interval(values), values) for k, values in by_k.items() if values}
        panels.append(Panel(names[f"{place}/avg"], {label: curve for label, curve in curves.items() if curve}))
    return draw_pass(panels, labels, target) if panels else []


def metric_curves(folder: SweepFolder, target: Path) -> list[Path]:
    """Draw dynamics.png and .svg, a panel for every metric of `CURVES` and for evaluations during training."""
    panels = []
    for metric, (title, unit) in CURVES.items():
        panels.append((title, unit, curves_of(folder, lambda path, m=metric: blocks(metric_curve(path, m)))))
    for measure in ("greedy", *_sampled_measures(folder)):
        curves = curves_of(folder, lambda path, m=measure: evaluation_curve(path, m))
        if any(len(line) > 2 for line in curves.values()):
            panels.append((f"Evaluation, {measure}", "share", curves))
    panels = [panel for panel in panels if any(panel[2].values())]
    if not panels:
        return []
    columns = min(3, len(panels))
    size = (3.1 * columns + 0.4, 2.3 * math.ceil(len(panels) / columns) + 0.5)
    return save(target, "dynamics", size, lambda canvas: _draw(canvas, columns, panels, folder.sweep.labels))


def blocks(values: Mapping[int, float], count: int = BLOCKS) -> dict[int, float]:
    """Middle step → mean, over at most `count` blocks of steps of equal length."""
    if len(values) <= count:
        return dict(values)
    last = max(values)
    length = math.ceil(last / count)
    by_block: dict[int, list[float]] = {}
    for step, value in values.items():
        by_block.setdefault((step - 1) // length, []).append(value)
    return {b * length + (length + 1) // 2: sum(all) / len(all) for b, all in sorted(by_block.items())}


def curves_of(folder: SweepFolder, read: Callable[[Path], Mapping[int, float]]) -> dict[str, dict[int, Interval]]:
    """Label → step → interval over its seeds, at the steps that all of them have."""
    curves: dict[str, dict[int, Interval]] = {}
    for label in folder.sweep.labels:
        lines = [read(folder.run(p)) for p in folder.sweep.runs if p.label == label and folder.is_trained(p)]
        steps = set.intersection(*map(set, lines)) if lines else set()
        curves[label] = {step: _visible(t_interval([line[step] for line in lines]), lines) for step in sorted(steps)}
    return curves


def _sampled_measures(folder: SweepFolder) -> list[str]:
    """The names of mean@k and pass@k in the runs' own evaluations."""
    for planned in folder.sweep.runs:
        file = folder.run(planned) / "config.yaml"
        if file.is_file():
            samples = OmegaConf.load(file).eval.samples
            return [f"mean@{samples}", f"pass@{samples}"]
    return []


def _draw(canvas, columns: int, panels: Sequence, labels: Sequence[str]) -> None:
    def draw(axes, panel, place: int) -> dict[str, Line2D]:
        title, unit, curves = panel
        lines = {n: draw_band(axes, n, one, labels.index(n), linewidth=1.7) for n, one in curves.items() if one}
        axes.set_title(title)
        axes.set_ylabel(unit)
        dress(axes)
        count_steps(axes)
        drawn = [one.value for curve in curves.values() for one in curve.values()]
        # Limits come from the lines, because a band over three seeds can be many times as high.
        bottom, top = min(0, 1.1 * min(drawn)), max(0, 1.12 * max(drawn))
        axes.set_ylim(bottom, top if top > bottom else 1)
        return lines

    draw_panels(canvas, columns, panels, labels, "step", draw)


def _visible(interval: Interval, runs: Sequence) -> Interval:
    """The interval, without its band where it is undefined, and for two runs, where it covers the page."""
    value = interval.value
    return Interval(value, value, value) if len(runs) < 3 or math.isnan(interval.low) else interval
