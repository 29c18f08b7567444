"""The figure of the course of training: the same measurement of several policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.diagnosing.measuring import Result
from experiments.diagnosing.plane import distinct, label
from experiments.diagnosing.style import FLOOR, LINES, PALETTE, bars, kind, known_or, legend, logarithmic, palette
from experiments.drawing import SOFT, dress, in_figure, save
from upge.measure import Estimated


def over_training(results: Sequence[Result], folder: Path) -> list[Path]:
    """over_training: cosine, signal to noise, alignment and conflict of every policy, in their order."""
    if len(results) < 2:
        return []
    names = [one.name for one in distinct(results[0])]
    if len(names) > len(PALETTE):
        # More lines could not be told apart: of each kind those with the highest alignment at first.
        ranked = sorted(distinct(results[0]), key=lambda one: -known_or(one.overall.alignment.value, -1.0))
        kinds: dict[str, list[str]] = {}
        for one in ranked:
            kinds.setdefault(kind(one.source), []).append(one.name)
        kept = {name for own in kinds.values() for name in own[:2]}
        names = [name for name in names if name in kept]

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(2, 2).flat)
        panels = (("cosine", "cosine with ∇E[R]"), ("snr", "signal to noise of a batch"), ("alignment", "alignment"))
        for axes, (field, title) in zip(grid, panels, strict=False):
            for index, name in enumerate(names):
                found = [next((m for m in r.measured if m.name == name), None) for r in results]
                values = [m and getattr(m.overall, field) for m in found]
                floor = FLOOR if field == "snr" else -math.inf
                _course(axes, results, values, index, label(results[0], name), floor)
            axes.set_title(title)
        last = figure.axes[3]
        both = dict.fromkeys(c.algorithm for r in results for c in r.conflicts)
        for index, name in enumerate(names):
            if name in both:
                found = [next((c.overall for c in r.conflicts if c.algorithm == name), None) for r in results]
                _course(last, results, found, index, "")
        last.set_title("cosine of rollouts' and demonstrations' parts")
        logarithmic(figure.axes[1])
        for axes in figure.axes:
            if not any(len(line.get_xdata()) for line in axes.get_lines()):
                axes.set_yticks([])
                axes.text(0.5, 0.5, "no figure from these samples", transform=axes.transAxes, ha="center", color=SOFT)
            _steps(axes, results)
            dress(axes)
        legend(figure, figure.axes[0], 3)

    return save(folder, "over_training", (8.6, 6.4), draw)


def _course(
    axes,
    results: Sequence[Result],
    values: Sequence[Estimated | None],
    index: int,
    name: str,
    floor: float = -math.inf,
) -> None:
    at = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v.value)]
    places = _places(results)
    color = palette(index)
    xs, known = [places[i] for i, _ in at], [v for _, v in at]
    bars(axes, xs, known, color, floor)
    axes.plot(xs, [max(v.value, floor) for v in known], color=color, marker=LINES[index % len(LINES)], markersize=5,
              markeredgecolor="white", linewidth=1.6, label=name or None)  # fmt: skip


def _places(results: Sequence[Result]) -> list[float]:
    steps = [one.step for one in results]
    return [float(i) for i in range(len(results))] if None in steps else [float(step) for step in steps]


def _steps(axes, results: Sequence[Result]) -> None:
    if any(one.step is None for one in results):
        axes.set_xticks(range(len(results)), [in_figure(one.label) for one in results])
    else:
        axes.set_xlabel("step")
