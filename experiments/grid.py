"""Tables of strings, printed in the terminal or written as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
    "–": "--", "−": r"$-$", "→": r"$\to$", "\n": " ",
}  # fmt: skip
_ASCII = str.maketrans({"–": "-", "−": "-", "→": ">"})


@dataclass(frozen=True)
class Row:
    """A row of cells, with the positions of those in bold; `rule` draws a line above it."""

    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    rule: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        label: its label in LaTeX.
        title: what it shows, one line.
        labels: number of columns on the left that name the row; they are left-aligned and repeated if a table is split.
    """

    label: str
    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    labels: int = 1


def ruled(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, with a rule above each one whose first cell differs from that of the row before."""
    before = (None, *(row.cells[0] for row in rows))
    return tuple(replace(row, rule=first not in (None, row.cells[0])) for first, row in zip(before, rows, strict=False))


def print_grid(grid: Grid, console: Console) -> None:
    """Prints a table. If it is too wide, cells break at spaces, and columns that still do not fit go below it."""
    for number, part in enumerate(_parts(grid, console.width)):
        if number:
            console.print()
        table = plain_table(_plain(part.title, console))
        for index, name in enumerate(part.header):
            label = index < part.labels
            table.add_column(_plain(name, console), justify="left" if label else "right", overflow="fold")
        for row in part.rows:
            if row.rule:
                table.add_section()
            cells = (Text(_plain(cell, console), "bold" if i in row.bold else "") for i, cell in enumerate(row.cells))
            table.add_row(*cells)
        console.print(table)


def plain_table(title: str) -> Table:
    """A table for the terminal with this title and a line below its header, still without columns."""
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
                 title_justify="left", title_style="bold")  # fmt: skip


def markdown(grid: Grid) -> str:
    """The table in Markdown, without its title."""
    align = ["---" if index < grid.labels else "---:" for index in range(len(grid.header))]
    lines = [[markdown_text(name) for name in grid.header], align]
    for row in grid.rows:
        cells = [markdown_text(cell) for cell in row.cells]
        lines.append([f"**{cell}**" if i in row.bold and cell else cell for i, cell in enumerate(cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def latex(grid: Grid) -> str:
    """The table as a LaTeX table environment, which needs the package booktabs."""
    columns = "l" * grid.labels + "r" * (len(grid.header) - grid.labels)
    body = []
    for row in grid.rows:
        cells = [tex_text(cell) for cell in row.cells]
        cells = [rf"\textbf{{{cell}}}" if i in row.bold and cell else cell for i, cell in enumerate(cells)]
        body += [r"    \midrule"] * row.rule + [f"    {' & '.join(cells)} \\\\"]
    head = rf"""\begin{{table}}
  \centering
  \caption{{{tex_text(grid.title)}}}
  \label{{tab:{grid.label}}}
  \begin{{tabular}}{{{columns}}}
    \toprule
    {" & ".join(map(tex_text, grid.header))} \\
    \midrule"""
    return "\n".join([head, *body, "    \\bottomrule\n  \\end{tabular}\n\\end{table}"])


def tex_text(text: str) -> str:
    """`text` with LaTeX's special characters escaped, and with minus signs in place of hyphens before numbers."""
    escaped = "".join(_TEX.get(letter, letter) for letter in text)
    return re.sub(r"(^|[\[( ])-(?=[\d.])", r"\1$-$", escaped)


def markdown_text(text: str) -> str:
    """`text` with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text).replace("\n", " ")


def _plain(text: str, console: Console) -> str:
    return text.translate(_ASCII) if console.options.ascii_only else text


def _parts(grid: Grid, width: int) -> list[Grid]:
    if sum(_widths(grid)) > width:
        grid = _broken(grid)
    widths = _widths(grid)
    left, blocks = sum(widths[: grid.labels]), [[]]
    for index in range(grid.labels, len(grid.header)):
        if blocks[-1] and left + sum(widths[i] for i in blocks[-1]) + widths[index] > width:
            blocks.append([])
        blocks[-1].append(index)
    return [_columns(grid, [*range(grid.labels), *block]) for block in blocks]


def _widths(grid: Grid) -> list[int]:
    """The widths of the columns, including the spaces between them."""
    lines = [grid.header, *(row.cells for row in grid.rows)]
    return [2 + max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*lines, strict=True)]


def _broken(grid: Grid) -> Grid:
    """Breaks every cell except the labels into a line per word, short cells as well as long ones."""

    def broken(cells: Sequence[str]) -> tuple[str, ...]:
        return tuple(cell if i < grid.labels else cell.replace(" ", "\n") for i, cell in enumerate(cells))

    rows = tuple(replace(row, cells=broken(row.cells)) for row in grid.rows)
    return replace(grid, header=broken(grid.header), rows=rows)


def _columns(grid: Grid, kept: Sequence[int]) -> Grid:
    rows = []
    for row in grid.rows:
        bold = frozenset(place for place, i in enumerate(kept) if i in row.bold)
        rows.append(replace(row, cells=tuple(row.cells[i] for i in kept), bold=bold))
    return replace(grid, header=tuple(grid.header[i] for i in kept), rows=tuple(rows))
