"""Values that appear when the pointer is on a chart: what each line shows there, as an attribute of the chart's SVG.

`interactive.html.j2`, which every page includes, reads the attribute. A page without JavaScript shows the same charts.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FuncFormatter

#: Per line: more are too close to each other to point at.
MOST_POINTS = 240


class HoverLine(NamedTuple):
    """The points of a line, with its name and its color in CSS."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]


def panel(axes: Any, lines: Iterable[HoverLine], x_name: str = "") -> dict[str, Any]:
    """What the script needs of one chart: its place in the figure, its horizontal axis, and its lines' points.

    `box` is left, top, right and bottom as shares of the figure. A line whose x are those of the line before has null
    in their place. `names` are the labels of an axis that has texts in place of numbers, by their x. `x_name` stands in
    for the label of the horizontal axis if the chart has none.
    """
    place, shown, before = axes.get_position(), [], None
    for line in lines:
        size = math.ceil(len(line.x) / MOST_POINTS) or 1
        x, y = ([_short(value) for value in values][::size] for values in (line.x, line.y))
        shown.append([line.name, line.color, None if x == before else x, y])
        before = x
    box = [round(value, 4) for value in (place.x0, 1 - place.y1, place.x1, 1 - place.y0)]
    limits = [_short(value) for value in axes.get_xlim()]
    log = axes.get_xscale() == "log"
    name = axes.get_xlabel() or x_name
    return {"box": box, "limits": limits, "log": log, "x": name, "names": _names(axes), "lines": shown}


def panels(figure: Figure) -> list[dict[str, Any]]:
    """The charts of a drawn figure; their lines are those with a label that does not begin with an underscore."""
    made = []
    x_name = next((axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()), "")
    for axes in figure.axes:
        lines = [
            HoverLine(_plain(str(line.get_label())), to_hex(line.get_color()), line.get_xdata(), line.get_ydata())
            for line in axes.get_lines()
            if not str(line.get_label()).startswith("_")
        ]
        made += [panel(axes, lines, x_name)] if lines else []
    return made


def attribute(charts: Sequence[dict[str, Any]]) -> str:
    """The attribute `data-hover` of an SVG element, with a space before it; empty without charts."""
    text = json.dumps(charts, ensure_ascii=False, separators=(",", ":"))
    return f' data-hover="{html.escape(text)}"' if charts else ""


def _names(axes: Any) -> dict[str, str]:
    if not isinstance(axes.xaxis.get_major_formatter(), FixedFormatter | FuncFormatter):
        return {}
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=False)
    texts = {f"{float(tick):g}": _plain(label.get_text()).replace("\n", " ") for tick, label in labels}
    return {place: text for place, text in texts.items() if text and text != place}


def _short(value: float) -> float | int | None:
    """The value with five digits, None for a gap; whole numbers, such as steps, keep all digits."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")


def _plain(label: str) -> str:
    """A label without what `in_figure` adds for matplotlib."""
    return label.removeprefix("\u200b").replace(r"\$", "$")
