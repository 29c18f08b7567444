"""The pass@k curves of all runs with bootstrap bands, a panel per benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from experiments.compare.tables import Scores
from experiments.drawing import dress, in_figure, save
from upge.evaluation.intervals import Interval, intervals
from upge.evaluation.scores import powers_of_two

COLORS = ("#0072b2", "#c95000", "#00805a", "#a6478b", "#8a6a00", "#2a8fc7", "#5a5f66")
_MARKERS = "osD^vPX"
_WIDTH, _HEIGHT = 3.1, 2.5  # of a panel, in inches
_MOST_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """The curves of one benchmark, or of an average: run's name → k → pass@k."""

    title: str
    curves: Mapping[str, Mapping[int, Interval]]


def panels(scores: Scores, resamples: int, seed: int) -> list[Panel]:
    """A panel for every benchmark with several samples per problem, and one for each group's average over these."""
    made = []
    for group, names in scores.groups.items():
        members = []
        for name in names:
            each = {run: scores.figures.get((run, name)) for run in scores.names}
            curves = {run: f.pass_at for run, f in each.items() if f and f.samples > 1}
            if curves:
                made.append(Panel(name, curves))
                members += [name] if len(curves) == len(scores.runs) else []
        if len(members) > 1:
            made.append(Panel(f"average {group}, n > 1", _average(scores, members, resamples, seed)))
    return made


def draw(panels: Sequence[Panel], names: Sequence[str], folder: Path) -> list[Path]:
    """Writes passk.png and passk.svg into `folder`; `names` are all runs, which have the same colour in every panel."""
    columns = 2 if len(panels) == 4 else min(_MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)

    def into(figure: Figure) -> None:
        figure.get_layout_engine().set(h_pad=0.08)
        grid = figure.subplots(rows, columns, squeeze=False)
        lines: dict[str, Line2D] = {}
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                lines |= _panel(axes, panels[place], names)
                axes.set_xlabel("k" if place + columns >= len(panels) else "")
                axes.set_ylabel("pass@k in %" if place % columns == 0 else "")
            else:
                axes.set_visible(False)
        shown = [name for name in names if name in lines]
        figure.legend([lines[name] for name in shown], [in_figure(name) for name in shown], loc="outside upper left",
                      ncols=min(4, len(shown)), frameon=False, borderaxespad=0.2)  # fmt: skip

    return save(folder, "passk", (_WIDTH * columns + 0.4, _HEIGHT * rows + 0.5), into)


def _average(scores: Scores, names: Sequence[str], resamples: int, seed: int) -> dict[str, dict[int, Interval]]:
    curves = {}
    for run in scores.runs:
        outcomes = [run.outcomes[name] for name in names]
        ks = powers_of_two(min(one.samples for one in outcomes))
        values = {one.benchmark: one.pass_at(ks) for one in outcomes}
        curves[run.name] = dict(zip(ks, intervals(values, resamples, seed), strict=True))
    return curves


def _panel(axes, panel: Panel, names: Sequence[str]) -> dict[str, Line2D]:
    lines = {}
    for name, curve in panel.curves.items():
        index = names.index(name)
        color, dash = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
        low, high = ([100 * getattr(one, end) for one in curve.values()] for end in ("low", "high"))
        axes.fill_between(list(curve), low, high, color=color, alpha=0.14, linewidth=0)
        (lines[name],) = axes.plot(list(curve), [100 * one.value for one in curve.values()], color=color,
                                   linestyle=dash, linewidth=1.8, marker=_MARKERS[index % len(_MARKERS)], markersize=4,
                                   markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    _dress(axes, panel)
    return lines


def _dress(axes, panel: Panel) -> None:
    largest = max(k for curve in panel.curves.values() for k in curve)
    powers = [2**i for i in range(largest.bit_length())]
    ticks = powers[:: math.ceil(len(powers) / 7)]
    axes.set_title(in_figure(panel.title))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([str(k) for k in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_ylim(0, min(101.0, axes.get_ylim()[1]))
    dress(axes)
    axes.margins(x=0.04)
