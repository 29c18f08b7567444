"""The style of a diagnosis's figures, and the figures that show each estimator as a point or as a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation

from experiments.diagnose.measuring import Result
from experiments.drawing import INK, RULE, SOFT, dress, in_figure, save
from upge.measure import Estimated, Measured

#: What an estimator learns from → its colors; a single estimator gets the first.
COLORS = {
    "rollouts": ("#0072b2", "#2a8fc7", "#5a5f66", "#00805a", "#6b4fa1", "#1d2126"),
    "demonstrations": ("#c95000", "#a6478b", "#8a6a00", "#d98c3f", "#b3261e", "#7a4a2b"),
    "both": ("#00805a",),
    "pairs": ("#6b4fa1",),
}
MARKERS = {"rollouts": "o", "demonstrations": "s", "both": "D", "pairs": "^"}
#: Colors of lines that differ by color alone.
PALETTE = ("#0072b2", "#c95000", "#00805a", "#a6478b", "#8a6a00", "#2a8fc7", "#5a5f66", "#b3261e", "#6b4fa1")
#: The lowest signal to noise that is drawn.
FLOOR = 1e-3
LINES = "osD^vph<>"


def kind(source: str) -> str:
    """The key of `COLORS` for a source, or for several sources separated by commas."""
    if source == "preference_pairs":
        return "pairs"
    return source if source in ("rollouts", "demonstrations") else "both"


def logarithmic(axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers such as 0.05."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: Figure, axes, columns: int) -> None:
    """Put a legend of one panel's lines below the figure; nothing if there are none."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def numbered(index: int) -> dict[str, str]:
    """Color, marker and dashes of a line by its number."""
    dash = "-" if index < len(LINES) else "--"
    return {"color": PALETTE[index % len(PALETTE)], "marker": LINES[index % len(LINES)], "linestyle": dash}


def draw_line(
    axes, points: Sequence[tuple[float, Estimated]], floor: float = -math.inf, shift: float = 0.0, **style: Any
) -> None:
    """Draw a line through estimates at (x, estimate), with their intervals; values below the floor are drawn at it.

    `shift` moves the line to the right, in points, so that the intervals of several lines do not cover each other.
    """
    place = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    for x, value in points:
        # A logarithmic axis cannot show what is below the floor.
        if not math.isnan(value.low) and value.high > floor:
            ends = [max(value.low, floor), value.high]
            axes.plot([x, x], ends, color=style["color"], alpha=0.3, linewidth=1.3, transform=place)
    shared = {"markersize": 5, "markeredgecolor": "white", "linewidth": 1.6, "transform": place}
    axes.plot([x for x, _ in points], [max(value.value, floor) for _, value in points], **shared | style)
    # Lines with a transform of their own have no effect on the limits of the axes.
    ends = [(x, max(end, floor)) for x, value in points for end in value if math.isfinite(end)]
    axes.update_datalim(ends)
    axes.autoscale_view()


#: Alignments whose lines are drawn.
_CONTOURS = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
_MOST_NAMES = 3
_SMALL = 8.3


def bias_variance(result: Result, folder: Path) -> list[Path]:
    """Draw bias_variance: the angle between mean and true gradient, and the noise of one batch."""
    shown = [one for one in result.different(parts=False) if _angle(one) is not None]
    return save(folder, "bias_variance", (8.6, 5.6), lambda figure: _draw(figure, result, shown)) if shown else []


def label(result: Result, name: str) -> str:
    """A name, together with the names of the algorithms that are equal to it."""
    wholes = [one.name for one in result.measured if not one.part]
    names = [other for other in result.same_as(name) if other in wholes] or [name]
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return in_figure(", ".join(names[:_MOST_NAMES]) + rest)


def _angle(one: Measured) -> tuple[float, float, float] | None:
    """The angle in degrees between mean and true gradient, with its interval; None if it is unknown."""
    cosine = one.overall.cosine
    if math.isnan(cosine.value) or not math.isfinite(one.overall.noise.value) or one.overall.noise.value <= 0:
        return None
    value, high, low = (math.degrees(math.acos(v)) if not math.isnan(v) else math.nan for v in cosine)
    return value, low, high


def _draw(figure: Figure, result: Result, shown: Sequence[Measured]) -> None:
    axes = figure.add_subplot()
    noises = [one.overall.noise.value for one in shown]
    low, high = min(noises) / 1.35, max(noises) * 1.35
    right = max(95.0, *(_angle(one)[0] + 4 for one in shown))
    axes.set(xlim=(-2, right), ylim=(low, high), yscale="log")
    _contours(axes, right, low, high)
    for one in shown:
        value, left, end = _angle(one)
        color, noise = COLORS[kind(one.source)][0], one.overall.noise
        if not math.isnan(left):
            axes.plot([left, end], [noise.value] * 2, color=color, alpha=0.25, linewidth=1.4, solid_capstyle="round")
        if not math.isnan(noise.low):
            ends = [max(noise.low, low), min(noise.high, high)]
            axes.plot([value] * 2, ends, color=color, alpha=0.25, linewidth=1.4, solid_capstyle="round")
        axes.plot(value, noise.value, marker=MARKERS[kind(one.source)], color=color, markersize=6.5,
                  markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=5,
                  label=label(result, one.name))  # fmt: skip
    axes.set_xlabel("bias: angle between the mean gradient and ∇E[R], in degrees")
    axes.set_ylabel("noise of one batch: √E‖g − m‖² / ‖m‖")
    axes.set_title("Bias and variance")
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.minorticks_off()
    axes.set_xticks([t for t in (0, 15, 30, 45, 60, 75, 90, 105, 120, 150, 180) if t <= right])
    dress(axes, "both")
    present = dict.fromkeys(kind(one.source) for one in shown)
    handles = [Line2D([], [], marker=MARKERS[k], color=COLORS[k][0], linestyle="none", markersize=6) for k in present]
    names = {"both": "rollouts and demonstrations", "pairs": "preference pairs"}
    figure.legend(handles, [names.get(k, k) for k in present], loc="outside lower left", ncols=4, frameon=False)
    _names(figure, axes, result, shown)


def _contours(axes, right: float, low: float, high: float) -> None:
    """Draw lines of equal cosine/√(1 + noise²): along a line, a step of a given length gains equally."""
    angles = np.linspace(0, min(right, 89.99), 400)
    for number, level in enumerate(_CONTOURS):
        with np.errstate(invalid="ignore"):
            noise = np.sqrt((np.cos(np.radians(angles)) / level) ** 2 - 1)
        inside = np.isfinite(noise) & (noise >= low) & (noise <= high)
        if not inside.any():
            continue
        axes.plot(angles[inside], noise[inside], color=SOFT, linewidth=0.7, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
        # Label the line at its upper left end, where there are no estimators.
        for first in np.flatnonzero(inside & (noise < high * (0.94, 0.88)[number % 2]))[:1]:
            axes.text(angles[first] + 0.4, noise[first], f"alignment {level:g}", color=SOFT, fontsize=7.5, va="bottom",
                      ha="left", rotation=0, zorder=1)  # fmt: skip


def _names(figure: Figure, axes, result: Result, shown: Sequence[Measured]) -> None:
    """Put names next to their points without overlaps; distant names get a thin line to their point."""
    figure.draw_without_rendering()  # determines the positions of the points on the figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = [axes.transData.transform((_angle(one)[0], one.overall.noise.value)) for one in shown]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in points]
    taken += [written.get_window_extent(renderer) for written in axes.texts]
    # Place the names in the most crowded regions first, because they have the least choice.
    order = sorted(range(len(shown)), key=lambda i: sum(np.hypot(*(points[i] - p)) < 90 for p in points), reverse=True)
    inside, unit = axes.get_window_extent(renderer), 72 / figure.dpi
    for i in order:
        color, words = COLORS[kind(shown[i].source)][0], label(result, shown[i].name)
        trial = figure.text(0, 0, words, fontsize=_SMALL)
        size = trial.get_window_extent(renderer).size
        trial.remove()
        x, y = free_place(tuple(points[i]), tuple(size), taken, inside)
        taken.append(Bbox.from_bounds(*(points[i] + (x, y) - size / 2 - (3, 1)), *(size + (6, 2))))
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4}
        far = abs(y) > 26 or abs(x) > size[0] / 2 + 26
        # Offsets in points, because SVG has another pixel size.
        axes.annotate(
            words, xy=(_angle(shown[i])[0], shown[i].overall.noise.value), xytext=(x * unit, y * unit),
            textcoords="offset points", fontsize=_SMALL, color=color, va="center", ha="center", zorder=6,
            arrowprops=line if far else None,
        ).set_in_layout(False)  # fmt: skip


def free_place(
    point: tuple[float, float], size: tuple[float, float], taken: Sequence[Bbox], inside: Bbox
) -> tuple[float, float]:
    """Find a place for a name next to its point.

    All arguments are in pixels. The name must not overlap the boxes `taken`, and must stay `inside`.

    Returns:
        The middle of the name relative to the point: the nearest free place on rings around the point, or directly to
        its right if there is none.
    """
    width, height = size
    for ring in range(14):
        for turn in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 65, -65, 115, -115):
            x = np.cos(np.radians(turn)) * (width / 2 + 12 + 14 * ring)
            y = np.sin(np.radians(turn)) * (height / 2 + 10 + 14 * ring)
            box = Bbox.from_bounds(point[0] + x - width / 2, point[1] + y - height / 2, width, height)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not any(box.overlaps(other) for other in taken):
                return float(x), float(y)
    return width / 2 + 12, 0.0


def cosines(result: Result, folder: Path) -> list[Path]:
    """Draw cosines: a heat map of the mean gradients with each other, with ∇E[R] and with imitation."""
    order = ("rollouts", "both", "pairs", "demonstrations")
    shown = sorted(result.different(parts=False), key=lambda one: order.index(kind(one.source)))
    if len(shown) < 2:
        return []
    names = ["∇E[R]", *(one.name for one in shown), *["imitation"] * any(one.imitation for one in shown)]
    values = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(values, 1.0)
    for i, one in enumerate(shown, 1):
        values[0, i] = values[i, 0] = one.overall.cosine.value
        if one.imitation is not None:
            values[-1, i] = values[i, -1] = one.imitation.value
        for j, other in enumerate(shown, 1):
            pair = result.cosines.get((one.name, other.name))
            if pair is not None:
                values[i, j] = values[j, i] = pair.value
    size = 2.4 + 0.36 * len(names)
    labels = [label(result, name) if name in {one.name for one in shown} else name for name in names]
    return save(folder, "cosines", (size + 1.2, size), lambda figure: _heat(figure, labels, values))


def _heat(figure: Figure, labels: Sequence[str], values: np.ndarray) -> None:
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]) and i != j:
            color = "white" if abs(values[i, j]) > 0.62 else INK
            shown = f"{values[i, j]:.2f}".replace("0.", ".", 1)
            axes.text(j, i, shown, ha="center", va="center", fontsize=6.8, color=color)
    axes.spines[:].set_visible(False)
    axes.set_title("Cosines of the mean gradients")
    bar = figure.colorbar(image, shrink=0.6, pad=0.02)
    bar.outline.set_edgecolor(RULE)
