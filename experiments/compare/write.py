"""The files of a comparison: a page in Markdown, every figure as CSV, the tables in LaTeX, the curves as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.compare import curves
from experiments.compare.curves import Panel
from experiments.compare.differences import Exclusive, Gap, exclusive_grid, gap_grid
from experiments.compare.tables import Scores, level_grid, paper_grid, pass_grid, response_grid, score_grid
from experiments.grid import Grid, latex, markdown, markdown_text
from upge.errors import DataError
from upge.evaluation.intervals import Interval
from upge.evaluation.scores import BenchmarkScores

COLUMNS = (
    *("kind", "benchmark", "level", "run", "baseline", "measure", "value", "low", "high"),
    *("p", "p_holm", "problems", "samples"),
)


@dataclass(frozen=True)
class Pair:
    """The first run and another: what lies between them, and what only one of them solves."""

    first: str
    second: str
    gaps: tuple[Gap, ...]
    exclusive: tuple[Exclusive, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that was worked out, with the settings that matter to a reader."""

    scores: Scores
    pairs: tuple[Pair, ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    solved: str
    resamples: int
    seed: int


def files(found: Comparison, folder: Path) -> list[Path]:
    """Writes everything into `folder`, which is made; returns the paths.

    Raises:
        DataError: it cannot be written.
    """
    texts = {"compare.md": page(found), "compare.csv": table(found), "compare.tex": tex(found)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8", newline="")
        drawn = curves.draw(found.panels, found.scores.names, folder) if found.panels else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another output=") from error
    return [*(folder / name for name in texts), *drawn]


def page(found: Comparison) -> str:
    """compare.md."""
    runs = [f"- **{markdown_text(run.name)}**: {markdown_text(str(run.path))}" for run in found.scores.runs]
    parts = ["# " + " against ".join(map(markdown_text, found.scores.names)), "\n".join(runs)]
    if found.notes:
        parts.append("\n".join(f"> {markdown_text(note)}  " for note in found.notes))
    for grid in _grids(found):
        parts += [f"## {markdown_text(grid.title)}", markdown(grid)]
        if grid.label == "passk":
            parts.append("![pass@k curves](passk.png)")
    parts += ["## How to read this", _explained(found)]
    return "\n\n".join(parts) + "\n"


def tex(found: Comparison) -> str:
    """compare.tex: a table environment each."""
    grids = [paper_grid(found.scores), *_grids(found)]
    notes = "\n".join(f"% {note}" for note in found.notes)
    return "\n\n".join(filter(None, ["% Needs \\usepackage{booktabs}.", notes, *map(latex, grids)])) + "\n"


def table(found: Comparison) -> str:
    """compare.csv: shares in [0, 1], differences of shares, counts of problems; empty where a column says nothing."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(found))
    return buffer.getvalue()


def _grids(found: Comparison) -> list[Grid]:
    grids = [score_grid(found.scores), pass_grid(found.scores)]
    for number, pair in enumerate(found.pairs, start=1):
        both = (gap_grid(pair.first, pair.second, pair.gaps),
                exclusive_grid(pair.first, pair.second, pair.exclusive, found.solved))  # fmt: skip
        # Labels in LaTeX are unique.
        grids += [Grid(f"{g.label}-{number}", g.title, g.header, g.rows, g.labels) for g in both if g.rows]
    grids += [level_grid(found.scores), response_grid(found.scores)]
    return [grid for grid in grids if grid is not None]


def _explained(found: Comparison) -> str:
    return (
        "avg@n is the mean over problems of the share of correct ones among n samples; an average counts every "
        "benchmark of its group alike. pass@k is the unbiased estimate 1 − C(n−c, k)/C(n, k). Intervals are percentile "
        f"bootstrap intervals ({found.resamples} resamples of the problems, seed {found.seed}): what they say is how "
        "much other problems of the same kind would change the figure. A difference is resampled problem by problem; "
        "its p is two-sided, and Holm's adjusts it for the number of benchmarks, avg and pass@k apart. The figures are "
        "also in compare.csv, one a line, and in compare.tex."
    )


def _records(found: Comparison) -> Iterator[dict]:
    scores = found.scores
    for (run, benchmark), one in scores.figures.items():
        same = {"run": run, "benchmark": benchmark, "samples": one.samples}
        yield from _accuracy({"kind": "score", **same}, one)
        for level, part in one.levels.items():
            yield from _accuracy({"kind": "level", "level": level, **same}, part)
        for measure in ("tokens", "unfinished", "timeouts", "errors"):
            yield {"kind": "response", "measure": measure, "value": getattr(one, measure), **same}
    for (run, group), interval in scores.averages.items():
        yield {"kind": "average", "benchmark": f"average {group}", "run": run, "measure": "avg", **_ends(interval)}
    for pair in found.pairs:
        same = {"run": pair.second, "baseline": pair.first}
        for gap in pair.gaps:
            about = {"benchmark": gap.benchmark, "measure": gap.measure, "problems": gap.problems}
            p_values = {"p": gap.difference.p_value, "p_holm": "" if gap.holm is None else gap.holm}
            yield {"kind": "difference", **same, **about, **_ends(gap.difference.interval), **p_values}
        for line in pair.exclusive:
            about = {"benchmark": line.benchmark, "level": line.level, "problems": line.problems}
            counts = {"only baseline": line.only_first, "only run": line.only_second, "both": line.both,
                      "neither": line.neither}  # fmt: skip
            for measure, value in counts.items():
                yield {"kind": "exclusive", **same, **about, "measure": measure, "value": value}


def _accuracy(same: dict, one: BenchmarkScores) -> Iterator[dict]:
    same = {**same, "problems": one.problems}
    yield {**same, "measure": f"avg@{one.samples}", **_ends(one.avg)}
    for k, interval in one.pass_at.items():
        if one.samples > 1:
            yield {**same, "measure": f"pass@{k}", **_ends(interval)}


def _ends(interval: Interval) -> dict:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
