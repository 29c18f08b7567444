"""Figures on white, those of comparisons, sweeps and diagnoses: how they look, are written and put into a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# The report's colours, on white: a figure in a paper has no dark page.
INK, SOFT, RULE = "#1d2126", "#565d66", "#dcdeda"
_STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.linewidth": 0.8, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip


def save(folder: Path, name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> list[Path]:
    """Writes NAME.png and NAME.svg of what `draw` puts into a figure of this size in inches."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(size, dpi=180, layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None})
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def dress(axes, grid: str = "y") -> None:
    """No more frame than is needed, and a grid behind everything."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=RULE, linewidth=0.7)


def in_figure(name: str) -> str:
    """`name` as it stands: dollars would begin a formula, and a leading underscore would keep it out of the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def inline(path: Path, prefix: str) -> str:
    """The SVG element of a file, for a page that has others: what it refers to by name begins with `prefix`."""
    drawing = path.read_text("utf-8")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing[drawing.index("<svg") :])
