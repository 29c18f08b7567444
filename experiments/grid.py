"""Tables: grids of strings, printed in the terminal or written as Markdown and LaTeX, and the one at the end of a run.

The latter shows the accuracy per difficulty level before and after training, from two lines of evaluations.jsonl.
`accuracy_rows` computes its rows for the terminal (`print_table`) and for the HTML report, so that the two cannot
disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Print a table. If it is too wide, cells break at spaces, and columns that still do not fit go below it."""
    for number, part in enumerate(_parts(grid, console.width)):
        if number:
            console.print()
        table = _rich_table(_plain(part.title, console))
        for index, name in enumerate(part.header):
            label = index < part.labels
            table.add_column(_plain(name, console), justify="left" if label else "right", overflow="fold")
        for row in part.rows:
            if row.rule:
                table.add_section()
            cells = (Text(_plain(cell, console), "bold" if i in row.bold else "") for i, cell in enumerate(row.cells))
            table.add_row(*cells)
        console.print(table)


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Cells that are already Markdown as a table."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *lines])


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
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{tex_text(grid.title)}}}",
        rf"  \label{{tab:{grid.label}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {' & '.join(map(tex_text, grid.header))} \\\\",
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def tex_text(text: str) -> str:
    """`text` with LaTeX's special characters escaped, and with minus signs in place of hyphens before numbers."""
    escaped = "".join(_TEX.get(letter, letter) for letter in text)
    return re.sub(r"(^|[\[( ])-(?=[\d.])", r"\1$-$", escaped)


def markdown_text(text: str) -> str:
    """`text` with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text).replace("\n", " ")


def _rich_table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
                 title_justify="left", title_style="bold")  # fmt: skip


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
    """Break every cell except the labels into a line per word, short cells as well as long ones."""

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


# The table at the end of a run.


@dataclass(frozen=True)
class Change:
    """One accuracy, a share of problems in [0, 1], before and after training; None where it was not measured."""

    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After minus before, or None when one of them is missing."""
        return None if self.before is None or self.after is None else self.after - self.before

    def percents(self) -> tuple[str, str, str]:
        """Before, after and the signed difference in percent with one decimal; a dash stands for a missing number."""
        before, after = ("–" if value is None else f"{100 * value:.1f}" for value in (self.before, self.after))
        return before, after, "" if self.difference is None else f"{100 * self.difference:+.1f}"


@dataclass(frozen=True)
class LevelRow:
    """A difficulty level: how many problems it has and the change of each measure, in the order of `measures`."""

    level: str
    problems: int | None
    changes: tuple[Change, ...]


def measures(*evaluations: Mapping) -> tuple[str, ...]:
    """The accuracies that these evaluation lines hold, in reading order: greedy, pass@k, mean@k."""
    names = {key: None for line in evaluations for _, scores in _levels(line) for key in scores}
    kinds = ("greedy", "pass@", "mean@")
    return tuple(key for kind in kinds for key in names if key.startswith(kind))


def accuracy_rows(before: Mapping, after: Mapping) -> list[LevelRow]:
    """A row for each difficulty level of either evaluation line, in their order, and last the row of all problems."""
    old, new = dict(_levels(before)), dict(_levels(after))
    names = [name for name in {**old, **new} if name != "all"]
    names += ["all"] if "all" in old or "all" in new else []
    rows = []
    for name in names:
        was, now = old.get(name, {}), new.get(name, {})
        changes = tuple(Change(number(was.get(key)), number(now.get(key))) for key in measures(before, after))
        rows.append(LevelRow(name, now.get("problems", was.get("problems")), changes))
    return rows


def print_table(before: Mapping, after: Mapping, console: Console | None = None) -> None:
    """Print the change of every measure per difficulty level, in 80 columns for level names of up to 10 characters.

    Args:
        before, after: lines of evaluations.jsonl; an empty mapping stands for an evaluation that never happened.
        console: standard output by default; plain text when it is not a terminal.
    """
    console = console or Console(highlight=False)
    arrow, dash = ("->", "-") if console.options.ascii_only else ("→", "–")
    title = f"Accuracy in %, step {before.get('step', '?')} {arrow} step {after.get('step', '?')}, and the difference"
    table = _rich_table(title)
    table.add_column("level", overflow="fold", min_width=8)
    table.add_column("n", justify="right", no_wrap=True)
    for name in measures(before, after):
        table.add_column(name, justify="right", no_wrap=True)
    for row in accuracy_rows(before, after):
        cells = []
        for was, now, difference in (change.percents() for change in row.changes):
            cells.append(f"{was} {arrow} {now:>5} {difference:>5}".replace("–", dash))
        problems = "" if row.problems is None else str(row.problems)
        if row.level == "all" and table.row_count:
            table.add_section()
        table.add_row(row.level, problems, *cells, style="bold" if row.level == "all" else "")
    console.print(table)


def number(value: object) -> float | None:
    """`value` as a finite float, or None when it is missing, not a number, beyond a float's range or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        finite = float(value)
    except OverflowError:  # of an integer with hundreds of digits
        return None
    return finite if math.isfinite(finite) else None


def _levels(line: Mapping) -> Iterator[tuple[str, Mapping]]:
    yield from line.get("levels", {}).items()
    if "all" in line:
        yield "all", line["all"]
