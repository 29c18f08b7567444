"""Line figures of a diagnosis: by pass rate (signal to noise, conflict of the two sources) and over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.diagnose.conclusion import best_of
from experiments.diagnose.figures import COLORS, FLOOR, PALETTE, draw_line, kind, label, legend, logarithmic, numbered
from experiments.diagnose.measuring import Result, known_or
from experiments.drawing import SOFT, count_steps, dress, in_figure, save
from upge.measure import Estimated, Measured

#: Maximum number of lines of a source, and minimum number of prompts of a bin that is drawn.
_MOST, _FEWEST = 5, 3
#: Distance between the intervals of neighboring lines, in points.
SHIFT = 2.0
#: A cosine with a wider interval is not drawn.
_WIDEST = 1.0


def signal(result: Result, folder: Path) -> list[Path]:
    """Draw signal_by_pass_rate: signal to noise by pass rate, alignment by successes and by threshold."""
    shown = chosen(result)
    if not result.bins or not shown:
        return []
    panels = 3 if result.thresholds else 2

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _by_rate(axes[0], result, shown)
        _by_count(axes[1], result, shown)
        if result.thresholds:
            _by_threshold(axes[2], result)
        legend(figure, axes[0], min(5, len(shown)))

    return save(folder, "signal_by_pass_rate", (3.9 * panels, 4.4), draw)


def chosen(result: Result) -> list[Measured]:
    """The different estimators with one source: per source whole algorithms before parts, then by alignment."""
    estimators = []
    for source in ("rollouts", "demonstrations"):
        mine = [one for one in result.different(parts=True) if one.source == source]
        mine.sort(key=lambda one: (bool(one.part), -known_or(one.overall.alignment.value, -math.inf)))
        estimators += mine[:_MOST]
    return estimators


def conflict(result: Result, folder: Path) -> list[Path]:
    """Draw conflict: the cosine between the mean gradients of rollouts and demonstrations, by pass rate."""
    if not result.conflicts:
        return []

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = [one.label for one in result.bins]
        for index, one in enumerate(result.conflicts):
            shift = (index - len(result.conflicts) / 2) * SHIFT
            line = [(i, one.by_rate[name]) for i, name in enumerate(places) if name in one.by_rate]
            line = [(at, estimate) for at, estimate in line if _is_precise(estimate)]
            draw_line(axes, line, shift=shift, **numbered(index), label=in_figure(one.algorithm))
            if _is_precise(one.overall):
                draw_line(axes, [(len(places), one.overall)], shift=shift + 8, **numbered(index), markersize=6)
        axes.axhline(0, color=SOFT, linewidth=0.9)
        axes.set_xticks(range(len(places) + 1), [*places, "all"])
        axes.set_xlim(-0.4, len(places) + 0.5)
        estimates = [estimate for one in result.conflicts for estimate in (one.overall, *one.by_rate.values())]
        lowest = min([-0.4, *(estimate.low - 0.05 for estimate in estimates if _is_precise(estimate))])
        axes.set_ylim(max(-1.04, lowest), 1.04)
        axes.set_xlabel("pass rate of the prompt")
        axes.set_ylabel("cosine of the two mean gradients")
        axes.set_title("Cosine of rollouts' and demonstrations' gradients")
        dress(axes)
        legend(figure, axes, 5)

    return save(folder, "conflict", (6.8, 4.6), draw)


def _by_rate(axes, result: Result, shown: Sequence[Measured]) -> None:
    bins = [one for one in result.bins if len(one.prompts) >= _FEWEST]
    places = {one.label: i for i, one in enumerate(bins)}
    for color, marker, shift, one in _styled(shown):
        at = [(places[at_rate.bin], at_rate.snr) for at_rate in one.by_rate if at_rate.bin in places]
        known = [(x, v) for x, v in at if math.isfinite(v.value)]
        style = {"color": color, "marker": marker, "linewidth": 1.5}
        draw_line(axes, known, FLOOR, shift, **style, label=label(result, one.name))
    logarithmic(axes)
    axes.set_ylim(bottom=FLOOR * 0.8)
    axes.set_xticks(range(len(places)), [f"{one.label}\n({len(one.prompts)})" for one in bins])
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_xlabel("pass rate of the prompt (prompts)")
    axes.set_title("Signal to noise of one prompt")
    dress(axes)


def _by_count(axes, result: Result, shown: Sequence[Measured]) -> None:
    size = int(result.details["group_size"])
    for color, marker, shift, one in _styled(shown):
        known = [(at.successes, at.pooled.alignment) for at in one.by_count]
        known = [(x, v) for x, v in known if not math.isnan(v.value)]
        style = {"color": color, "marker": marker, "linewidth": 1.5}
        draw_line(axes, known, shift=shift, **style, label=label(result, one.name))
    axes.axhline(0, color=SOFT, linewidth=0.9)
    axes.set_xticks(range(0, size + 1, 1 if size <= 8 else 2))
    axes.set_xlabel(f"successes among the {size} rollouts of its group")
    axes.set_title("Alignment of one prompt with ∇E[R]")
    dress(axes)


def _by_threshold(axes, result: Result) -> None:
    """Draw a line per algorithm; a circle marks the best threshold if its interval is above all others."""
    circled = False
    for index, (name, points) in enumerate(result.thresholds.items()):
        at, values = [one.threshold for one in points], [one.overall.alignment for one in points]
        if all(math.isnan(value.value) for value in values):
            continue
        draw_line(axes, list(zip(at, values, strict=True)), **numbered(index), label=in_figure(name))
        best = best_of(values)
        if best.place is not None and not best.open:
            circle = {"marker": "o", "markersize": 12, "markerfacecolor": "none"}
            axes.plot(at[best.place], values[best.place].value, **numbered(index) | circle)
            circled = True
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=8.5)
    axes.axhline(0, color=SOFT, linewidth=0.9)
    axes.set_xlabel("threshold of the gates")
    axes.set_title("Alignment of a batch" + " (circle: best)" * circled)
    dress(axes)


def _styled(shown: Sequence[Measured]):
    """(color, marker, shift, estimator) of each estimator, with a color family for each source."""
    counts: dict[str, int] = {}
    for place, one in enumerate(shown):
        number = counts.setdefault(one.source, 0)
        counts[one.source] += 1
        colors = COLORS[kind(one.source)]
        marker = "osv^D"[number % 5]
        yield colors[number % len(colors)], marker, (place - len(shown) / 2) * SHIFT, one


def _is_precise(estimate: Estimated) -> bool:
    """Whether the interval of a cosine is narrow enough to draw it; False if it is missing."""
    return estimate.high - estimate.low < _WIDEST


def over_training(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw over_training: cosine, signal to noise, alignment and conflict of every policy, in their order."""
    if len(results) < 2:
        return []
    names = [one.name for one in results[0].different(parts=False)]
    if len(names) > len(PALETTE):
        # More lines would be indistinguishable, so keep those of each kind with the highest initial alignment.
        ranked = sorted(results[0].different(parts=False), key=lambda one: -known_or(one.overall.alignment.value, -1.0))
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
                estimates = [next((m for m in r.measured if m.name == name), None) for r in results]
                values = [m and getattr(m.overall, field) for m in estimates]
                floor = FLOOR if field == "snr" else -math.inf
                _line_over_policies(axes, results, values, index, label(results[0], name), floor)
            axes.set_title(title)
        last = figure.axes[3]
        both = dict.fromkeys(c.algorithm for r in results for c in r.conflicts)
        for index, name in enumerate(names):
            if name in both:
                estimates = [next((c.overall for c in r.conflicts if c.algorithm == name), None) for r in results]
                _line_over_policies(last, results, estimates, index, label(results[0], name))
        last.set_title("cosine of rollouts' and demonstrations' parts")
        logarithmic(figure.axes[1])
        for axes in figure.axes:
            if not any(len(line.get_xdata()) for line in axes.get_lines()):
                axes.set_yticks([])
                axes.text(0.5, 0.5, "no estimate from these samples", transform=axes.transAxes, ha="center", color=SOFT)
            if any(one.step is None for one in results):
                axes.set_xticks(range(len(results)), [in_figure(one.label) for one in results])
            else:
                axes.set_xlabel("step")
                count_steps(axes)
            dress(axes)
        legend(figure, figure.axes[0], 3)

    return save(folder, "over_training", (8.6, 6.4), draw)


def _line_over_policies(
    axes, results: Sequence[Result], values: Sequence[Estimated | None], index: int, name: str, floor: float = -math.inf
) -> None:
    steps = [one.step for one in results]
    places = range(len(results)) if None in steps else steps
    pairs = zip(places, values, strict=True)
    line = [(float(at), value) for at, value in pairs if value is not None and math.isfinite(value.value)]
    draw_line(axes, line, floor, **numbered(index), label=name)
