"""The table at the end of a run: accuracy per difficulty level, before and after training.

The numbers come from two lines of evaluations.jsonl. `accuracy_rows` computes the rows once for the terminal
(`print_table`) and the HTML report, so that the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


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
class Row:
    """A difficulty level: how many problems it has and the change of each measure, in the order of `measures`."""

    level: str
    problems: int | None
    changes: tuple[Change, ...]


def measures(*evaluations: Mapping) -> tuple[str, ...]:
    """The accuracies that these evaluation lines hold, in reading order: greedy, pass@k, mean@k."""
    names = {key: None for line in evaluations for _, scores in _levels(line) for key in scores}
    kinds = ("greedy", "pass@", "mean@")
    return tuple(key for kind in kinds for key in names if key.startswith(kind))


def accuracy_rows(before: Mapping, after: Mapping) -> list[Row]:
    """A row for each difficulty level of either evaluation line, in their order, and last the row of all problems."""
    old, new = dict(_levels(before)), dict(_levels(after))
    names = [name for name in {**old, **new} if name != "all"]
    names += ["all"] if "all" in old or "all" in new else []
    rows = []
    for name in names:
        was, now = old.get(name, {}), new.get(name, {})
        changes = tuple(Change(number(was.get(key)), number(now.get(key))) for key in measures(before, after))
        rows.append(Row(name, now.get("problems", was.get("problems")), changes))
    return rows


def result_table(before: Mapping, after: Mapping, *, ascii_only: bool = False) -> Table:
    """The change of every measure per difficulty level, within 80 columns for level names of up to 10 characters.

    `before` and `after` are lines of evaluations.jsonl; an empty mapping stands for an evaluation that never happened.
    """
    arrow = "->" if ascii_only else "→"
    title = f"Accuracy in %, step {before.get('step', '?')} {arrow} step {after.get('step', '?')}, and the difference"
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("level", overflow="fold", min_width=8)
    table.add_column("n", justify="right", no_wrap=True)
    for name in measures(before, after):
        table.add_column(name, justify="right", no_wrap=True)
    for row in accuracy_rows(before, after):
        cells = [_cell(change, arrow, ascii_only) for change in row.changes]
        problems = "" if row.problems is None else str(row.problems)
        if row.level == "all" and table.row_count:
            table.add_section()
        table.add_row(row.level, problems, *cells, style="bold" if row.level == "all" else "")
    return table


def print_table(before: Mapping, after: Mapping, console: Console | None = None) -> None:
    """Print `result_table` on `console` (standard output by default); plain text when it is not a terminal."""
    console = console or Console(highlight=False)
    console.print(result_table(before, after, ascii_only=console.options.ascii_only))


def number(value: object) -> float | None:
    """`value` as a finite float, or None when it is missing, not a number, infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _levels(line: Mapping) -> Iterator[tuple[str, Mapping]]:
    yield from line.get("levels", {}).items()
    if "all" in line:
        yield "all", line["all"]


def _cell(change: Change, arrow: str, ascii_only: bool) -> str:
    before, after, difference = change.percents()
    cell = f"{before} {arrow} {after:>5} {difference:>5}"
    return cell.replace("–", "-") if ascii_only else cell
