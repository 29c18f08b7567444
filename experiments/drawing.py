"""Figures of comparisons, sweeps and diagnoses: style, files, and embedding into a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# The report's light colours only: a figure in a paper has no dark mode.
INK, SOFT, RULE = "#1d2126", "#565d66", "#dcdeda"
_STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.linewidth": 0.8, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip


def save(folder: Path, name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> list[Path]:
    """Calls `draw` on a figure of this size in inches and writes NAME.png and NAME.svg."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(size, dpi=180, layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None})
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def dress(axes, grid: str = "y") -> None:
    """Removes the frame except for the bottom edge and puts a grid behind everything."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=RULE, linewidth=0.7)


def in_figure(name: str) -> str:
    """`name` shown literally: dollars would start a formula, and a leading underscore would hide it from the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def inline(path: Path, prefix: str) -> str:
    """The SVG element of a file for a page with several; its ids and references are prefixed with `prefix`."""
    drawing = path.read_text("utf-8")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing[drawing.index("<svg") :])
