"""The bias-variance plane of all algorithms, and the cosines of their mean gradients with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.diagnosing.measuring import Result
from experiments.diagnosing.style import COLORS, INK, MARKERS, RULE, SOFT, dress, kind, save, text
from experiments.diagnosing.tables import same_as
from upge.measure import Measured

#: Alignments whose lines are drawn.
_CONTOURS = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
_MOST_NAMES = 3


def plane(result: Result, folder: Path) -> list[Path]:
    """bias_variance: the angle between mean and true gradient, and the noise of one batch."""
    shown = [one for one in distinct(result) if _angle(one) is not None]
    return save(folder, "bias_variance", (8.6, 5.6), lambda figure: _draw(figure, result, shown)) if shown else []


def distinct(result: Result) -> list[Measured]:
    """The algorithms, of those that are the same but for their scale only the first."""
    seen: set[str] = set()
    found = []
    for one in result.measured:
        if not one.part and one.name not in seen:
            found.append(one)
            seen.update(same_as(result, one.name))
    return found


def label(result: Result, name: str) -> str:
    """A name, with those of the algorithms that are the same."""
    wholes = [one.name for one in result.measured if not one.part]
    names = [other for other in same_as(result, name) if other in wholes]
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return text(", ".join(names[:_MOST_NAMES]) + rest)


def _angle(one: Measured) -> tuple[float, float, float] | None:
    """Of the mean with the true gradient, in degrees, with its interval; None where nothing is known."""
    found = one.overall.cosine
    if math.isnan(found.value) or not math.isfinite(one.overall.noise.value) or one.overall.noise.value <= 0:
        return None
    value, high, low = (math.degrees(math.acos(v)) if not math.isnan(v) else math.nan for v in found)
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
                  markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=5)  # fmt: skip
    _names(axes, result, shown, right)
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


def _contours(axes, right: float, low: float, high: float) -> None:
    """Where cosine/√(1 + noise²) has one value: estimators on a line gain as much by a step of a given length."""
    angles = np.linspace(0, min(right, 89.99), 400)
    for level in _CONTOURS:
        with np.errstate(invalid="ignore"):
            noise = np.sqrt((np.cos(np.radians(angles)) / level) ** 2 - 1)
        inside = np.isfinite(noise) & (noise >= low) & (noise <= high)
        if not inside.any():
            continue
        axes.plot(angles[inside], noise[inside], color=SOFT, linewidth=0.7, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
        # At its upper left end, where no estimator is.
        first = np.flatnonzero(inside)[0]
        axes.text(angles[first] + 0.4, noise[first], f"alignment {level:g}", color=SOFT, fontsize=7.5, va="bottom",
                  ha="left", rotation=0, zorder=1)  # fmt: skip


def _names(axes, result: Result, shown: Sequence[Measured], right: float) -> None:
    """Names in a column beside the plane, each joined to its point by a thin line: in it they would overlap."""
    from matplotlib.transforms import blended_transform_factory

    bottom, top = (math.log(v) for v in axes.get_ylim())
    order = sorted(shown, key=lambda one: one.overall.noise.value)
    places = [(math.log(one.overall.noise.value) - bottom) / (top - bottom) for one in order]
    spread = spaced(places, min(0.043, 1 / max(1, len(order))))
    beside = blended_transform_factory(axes.transAxes, axes.transAxes)
    for one, place in zip(order, spread, strict=True):
        color = COLORS[kind(one.source)][0]
        axes.annotate(
            label(result, one.name), xy=(_angle(one)[0], one.overall.noise.value), xycoords="data",
            xytext=(1.03, place), textcoords=beside, va="center", ha="left", fontsize=8.5, color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.45, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spaced(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in [0, 1], moved apart to `gap` at least, as little as a sweep up and one down achieve."""
    found = list(places)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    excess = max(0.0, found[-1] - 1.0) if found else 0.0
    found[-1:] = [found[-1] - excess] if found else []
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - gap)
    return found


def cosines(result: Result, folder: Path) -> list[Path]:
    """cosines: a heat map of the mean gradients with each other, with ∇E[R] and with imitation."""
    order = ("rollouts", "both", "pairs", "demonstrations")
    shown = sorted(distinct(result), key=lambda one: order.index(kind(one.source)))
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
