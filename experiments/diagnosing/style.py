"""What the figures of a diagnosis have in common: colours by source, intervals, logarithmic axes, legends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from upge.measure import Estimated

#: What an estimator learns from → its colours, the first for a single one.
COLORS = {
    "rollouts": ("#0072b2", "#2a8fc7", "#5a5f66", "#00805a", "#6b4fa1", "#1d2126"),
    "demonstrations": ("#c95000", "#a6478b", "#8a6a00", "#d98c3f", "#b3261e", "#7a4a2b"),
    "both": ("#00805a",),
    "pairs": ("#6b4fa1",),
}
MARKERS = {"rollouts": "o", "demonstrations": "s", "both": "D", "pairs": "^"}
#: Of lines that are told apart by colour alone.
PALETTE = ("#0072b2", "#c95000", "#00805a", "#a6478b", "#8a6a00", "#2a8fc7", "#5a5f66", "#b3261e", "#6b4fa1")
#: The lowest signal to noise that is drawn.
FLOOR = 1e-3
LINES = "osD^vph<>"


def kind(source: str) -> str:
    """The key of `COLORS` of a source, or of several separated by commas."""
    if source == "preference_pairs":
        return "pairs"
    return source if source in ("rollouts", "demonstrations") else "both"


def logarithmic(axes) -> None:
    """A logarithmic axis with plain numbers, as in 0.05."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: Figure, axes, columns: int) -> None:
    """Below the figure, of the lines of one panel; nothing where there is none."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def palette(index: int) -> str:
    """The colour of a line by its number."""
    return PALETTE[index % len(PALETTE)]


def bars(axes, at: Sequence[float], values: Sequence[Estimated], color: str, floor: float = -math.inf) -> None:
    """Intervals; what is below the floor is cut, for it would have no end on a logarithmic axis."""
    for x, found in zip(at, values, strict=True):
        if not math.isnan(found.low) and found.high > floor:
            axes.plot([x, x], [max(found.low, floor), found.high], color=color, alpha=0.3, linewidth=1.3)


def known_or(value: float, other: float) -> float:
    """The value, or the other in place of NaN."""
    return other if math.isnan(value) else value
