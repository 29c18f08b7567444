"""Figures of comparisons, sweeps and diagnoses: style, files, and the pages that embed them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments import hover
from upge.evaluation.intervals import Interval

# The report's light colors only: a figure in a paper has no dark mode.
INK, SOFT, RULE = "#1d2126", "#565d66", "#dcdeda"
#: Colors of the lines of runs.
COLORS = ("#0072b2", "#c95000", "#00805a", "#a6478b", "#8a6a00", "#2a8fc7", "#5a5f66")
_STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.linewidth": 0.8, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip


def save(folder: Path, name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> list[Path]:
    """Call `draw` on a figure of this size in inches and write NAME.png and NAME.svg.

    The SVG holds the values of the lines that have a label, which pages show under the pointer.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(size, dpi=180, layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        text = buffer.getvalue().replace("<svg ", f"<svg{hover.attribute(hover.panels(figure))} ", 1)
        (folder / f"{name}.svg").write_text(text, "utf-8")
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def draw_panels(
    figure: Figure, columns: int, panels: Sequence, names: Sequence[str], xlabel: str, draw: Callable, **legend: Any
) -> None:
    """Draw each panel into axes of its own, with one legend for all; `names` gives the order of the lines in it.

    `draw` gets axes, a panel and its number, and returns the lines that it has drawn by their names.
    """
    grid, lines = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False), {}
    for place, axes in enumerate(grid.flat):
        if place < len(panels):
            lines |= draw(axes, panels[place], place)
            axes.set_xlabel(xlabel if place + columns >= len(panels) else "")
        else:
            axes.set_visible(False)
    shown = [name for name in names if name in lines]
    figure.legend([lines[name] for name in shown], [in_figure(name) for name in shown], loc="outside upper left",
                  ncols=min(4, len(shown)), frameon=False, **legend)  # fmt: skip


def dress(axes, grid: str = "y") -> None:
    """Remove the frame except for the bottom edge and put a grid behind everything."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=RULE, linewidth=0.7)


def count_steps(axes) -> None:
    """Put whole numbers on the horizontal axis, which counts steps; called after drawing."""
    low, high = axes.dataLim.intervalx
    if high - low < 1:  # a single step, around which matplotlib would show fractions
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def draw_band(axes, name: str, curve: Mapping[int, Interval], index: int, scale: float = 1.0, **style: Any) -> Line2D:
    """Draw line number `index`, in its color, with its intervals as a band; return the line."""
    color, dash = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
    value, low, high = ([scale * getattr(one, of) for one in curve.values()] for of in ("value", "low", "high"))
    axes.fill_between(list(curve), low, high, color=color, alpha=0.14, linewidth=0)
    return axes.plot(list(curve), value, color=color, linestyle=dash, label=in_figure(name), **style)[0]


def in_figure(name: str) -> str:
    """`name` shown literally: dollars would start a formula, and a leading underscore would hide it from the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def inline(path: Path, prefix: str) -> str:
    """The SVG element of a file for a page with several; its ids and references are prefixed with `prefix`."""
    drawing = path.read_text("utf-8")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing[drawing.index("<svg") :])


def render(template: Path, **values: Any) -> str:
    """The page of a Jinja template with these values, which are escaped.

    Templates can include and extend those in their own folder and in the folder of this module.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    return environment.get_template(template.name).render(**values)
