"""Draws a plot as inline SVG with CSS variables as colors, so that one drawing serves light and dark pages.

Matplotlib draws with placeholder colors, which are then replaced by `var(--c0)` and so on; the page's style sheet
defines their values. Drawing needs no display, no font file and no network.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import hover
from experiments.drawing import count_steps
from experiments.report.plots import Plot
from experiments.report.series import Series

COLORS = 7  # --c0 to --c6 in the style sheet
MARKERS = "osD^vPX"
MOST_POINTS = 240  # per line: more are not visible at the width of a figure
_NAMES = (*(f"c{index}" for index in range(COLORS)), "ink", "soft", "rule", "card", "s1", "s2", "s3", "s4")


def _stand_in(name: str) -> str:
    """The placeholder of a color of the style sheet; l0, l1, ... have no highest number."""
    numbered = re.fullmatch(r"l(\d+)", name)
    return f"#b1{int(numbered[1]):04x}" if numbered else f"#a1b2{_NAMES.index(name):02x}"


#: Left, bottom, width and height of the axes, as shares of the figure, with room for labels such as -0.00025 and 1e6.
#: Matplotlib's own layouts measure the labels, which takes as long as to draw.
_AXES = (0.16, 0.17, 0.82, 0.75)
_SOFT, _RULE, _CARD = (_stand_in(name) for name in ("soft", "rule", "card"))
_STYLE = {
    "svg.fonttype": "none", "font.size": 11, "axes.linewidth": 0.8, "text.color": _SOFT, "axes.labelcolor": _SOFT,
    "axes.edgecolor": _RULE, "xtick.color": _SOFT, "ytick.color": _SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
    "ytick.minor.size": 0, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


def smoothing_window(one: Series) -> int:
    """The number of steps that the drawn line averages over: odd, and 1 for a short or smooth series."""
    values = one.finite()
    changes = np.diff(values)
    if len(values) < 20 or (changes[1:] * changes[:-1] < 0).mean() < 0.2:
        return 1  # a schedule seldom changes direction, noise does at most steps
    return 2 * max(1, len(values) // 30) + 1


def color_name(plot: Plot, index: int) -> str:
    """The name of the CSS variable with the color of line number `index`."""
    return plot.palette[index % len(plot.palette)] if plot.palette else f"c{index % COLORS}"


def draw(plot: Plot, series: Sequence[Series], marks: Sequence[float] = ()) -> str:
    """Draw `plot` as an SVG element without XML header, sized by the page, with `describe` as its label.

    At the steps `marks` draw vertical lines, where a stage of the run ends and the next begins.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": plot.identifier}):
        figure = Figure(figsize=(5, 2.7))
        axes = figure.add_axes(_AXES)
        names = [color_name(plot, index) for index in range(len(series))]
        kinds = {"line": _draw_lines, "band": _draw_bands, "stack": _draw_stack, "evaluation": _draw_evaluation}
        kinds[plot.kind](axes, series, [_stand_in(name) for name in names])
        for mark in marks:
            axes.axvline(mark, color=_SOFT, linewidth=1.0, linestyle=":")
        _dress(axes, plot, series)
        lines = [
            hover.HoverLine(one.label, f"var(--{name})", one.steps, one.values)
            for one, name in zip(series, names, strict=True)
        ]
        canvas, buffer = FigureCanvasSVG(figure), io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(
        buffer.getvalue(), plot.identifier, describe(plot, series), hover.attribute([hover.panel(axes, lines)])
    )


def describe(plot: Plot, series: Sequence[Series]) -> str:
    """A description of the plot for screen readers."""
    ends = [(one.label, one.finite()) for one in series]
    parts = [f"{n} from {v[0]:.3g} to {v[-1]:.3g}" if len(v) > 1 else f"{n} {v[0]:.3g}" for n, v in ends]
    steps = [step for one in series for step in one.steps]
    return f"{plot.title} ({plot.unit}), steps {min(steps):.0f} to {max(steps):.0f}: {'; '.join(parts)}."


def _draw_lines(axes, series: Sequence[Series], colors: Sequence[str]) -> None:
    for index, one in enumerate(series):
        color = colors[index]
        steps, values = np.asarray(one.steps, float), np.asarray(one.values, float)
        window = smoothing_window(one)
        if window > 1:
            axes.plot(*_envelope(steps, values), color=color, linewidth=0.8, alpha=0.35)
        smooth_steps, smooth = _thin(steps, _centred_mean(values, window))
        axes.plot(smooth_steps, smooth, color=color, linewidth=2.0, linestyle=_dash(colors, index))
        alone = _isolated(values)
        if alone.any():
            axes.plot(steps[alone], values[alone], linestyle="none", marker="o", markersize=5, color=color)


def _draw_bands(axes, series: Sequence[Series], colors: Sequence[str]) -> None:
    """Draw areas around the line; in a long run their edges are averages over bins, as the line is."""
    for index, one in enumerate(series):
        size = math.ceil(len(one.steps) / MOST_POINTS)
        steps = _bin_means(np.asarray(one.steps, float), size)
        for low, high in one.ranges:
            edges = [_bin_means(np.asarray(edge, float), size) for edge in (low, high)]
            axes.fill_between(steps, *edges, color=colors[index], alpha=0.2, linewidth=0)
    _draw_lines(axes, series, colors)


def _draw_evaluation(axes, series: Sequence[Series], colors: Sequence[str]) -> None:
    for index, one in enumerate(series):
        marker = {"marker": MARKERS[index % len(MARKERS)], "markersize": 5.5, "markeredgecolor": _CARD}
        width = 2.8 if one.label == "all" else 1.6
        axes.plot(one.steps, one.values, color=colors[index], markeredgewidth=0.8, linewidth=width,
                  linestyle=_dash(colors, index), **marker)  # fmt: skip


def _draw_stack(axes, series: Sequence[Series], colors: Sequence[str]) -> None:
    steps = np.array(sorted({step for one in series for step in one.steps}), float)
    layers = []
    for one in series:
        column = dict(zip(one.steps, np.nan_to_num(one.values), strict=True))
        layers.append(np.array([column.get(step, 0.0) for step in steps], float))
    if len(steps) == 1:
        bottoms = np.cumsum([0.0, *(layer[0] for layer in layers[:-1])])
        for index, (bottom, layer) in enumerate(zip(bottoms, layers, strict=True)):
            axes.bar(steps, layer, width=0.5, bottom=bottom, color=colors[index])
        return
    size = math.ceil(len(steps) / MOST_POINTS)
    layers = [_bin_means(layer, size) for layer in layers]
    axes.stackplot(_bin_means(steps, size), layers, colors=colors, edgecolor=_CARD, linewidth=0.6)


def _dress(axes, plot: Plot, series: Sequence[Series]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    if plot.log_scale and all(value > 0 for one in series for value in one.finite()):
        axes.set_yscale("log")
    else:
        axes.set_ylim(*plot.limits)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if plot.identifier == "plot-learning-rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.grid(True, color=_RULE, linewidth=0.7)
    axes.margins(x=0.02)
    count_steps(axes)
    axes.set_xlabel("step")


def _dash(colors: Sequence[str], index: int) -> str:
    """Dashes for a line with the color of an earlier one."""
    return "--" if colors[index] in colors[:index] else "-"


def _centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The weighted mean over `window` neighbors, fewer at the ends; gaps are skipped and stay gaps."""
    if window == 1:
        return values
    known = ~np.isnan(values)
    kernel = np.hanning(window + 2)[1:-1]  # nearer steps weigh more, so a spike does not become a box
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known, sums / np.where(known, counts, 1.0), np.nan)


def _envelope(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The raw line; if it is long, the lowest and highest value of each bin, so that no spike is lost."""
    size = math.ceil(2 * len(values) / MOST_POINTS)
    if size <= 2:
        return steps, values
    keep: list[int] = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        if np.isnan(part).any():  # keep all points around gaps, so that short gaps stay visible
            keep.extend(range(start, start + len(part)))
        else:
            keep.extend(sorted({start + int(part.argmin()), start + int(part.argmax())}))
    return steps[keep], values[keep]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th point of a smooth line, its last point and all points next to gaps."""
    size = math.ceil(len(values) / MOST_POINTS)
    keep = np.arange(len(values)) % size == 0
    keep[-1] = True
    gaps = np.isnan(values)
    for shift in (-1, 0, 1):
        keep |= np.roll(gaps, shift)
    return steps[keep], values[keep]


def _isolated(values: np.ndarray) -> np.ndarray:
    """The points with a gap or an end on both sides, which no line would show."""
    gaps = np.concatenate([[True], np.isnan(values), [True]])
    return ~gaps[1:-1] & gaps[:-2] & gaps[2:]


def _bin_means(values: np.ndarray, size: int) -> np.ndarray:
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def _inline(svg: str, identifier: str, description: str, values: str) -> str:
    """Prepare an SVG for a page with several: unique ids, no header or metadata, page colors, short numbers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{identifier}-", svg)
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"#b1([0-9a-f]{4})\b", lambda match: f"var(--l{int(match[1], 16)})", svg)
    for name in _NAMES:
        svg = svg.replace(_stand_in(name), f"var(--{name})")
    attributes = re.search(r'viewBox="[^"]*"', svg)
    assert attributes, "matplotlib wrote an SVG without a viewBox"
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {names} {attributes[0]} role="img" aria-label="{label}"{values}>'
    return opening + svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
