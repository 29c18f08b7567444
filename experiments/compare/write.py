"""The files of a comparison: a page in Markdown, all values as CSV, the tables in LaTeX, the curves as a figure."""

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
    """The first run and another one: the differences of their scores, and their exclusive solves."""

    first: str
    second: str
    gaps: tuple[Gap, ...]
    exclusive: tuple[Exclusive, ...]


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison, with the settings that a reader needs."""

    scores: Scores
    pairs: tuple[Pair, ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    solved: str
    resamples: int
    seed: int


def files(comparison: Comparison, folder: Path) -> list[Path]:
    """Creates `folder`, writes all files into it, and returns their paths.

    Raises:
        DataError: the files cannot be written.
    """
    texts = {"compare.md": page(comparison), "compare.csv": table(comparison), "compare.tex": tex(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8", newline="")
        drawn = curves.draw(comparison.panels, comparison.scores.names, folder) if comparison.panels else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another output=") from error
    return [*(folder / name for name in texts), *drawn]


def page(comparison: Comparison) -> str:
    """The text of compare.md."""
    runs = [f"- **{markdown_text(run.name)}**: {markdown_text(str(run.path))}" for run in comparison.scores.runs]
    parts = ["# " + " against ".join(map(markdown_text, comparison.scores.names)), "\n".join(runs)]
    if comparison.notes:
        parts.append("\n".join(f"> {markdown_text(note)}  " for note in comparison.notes))
    for grid in _grids(comparison):
        parts += [f"## {markdown_text(grid.title)}", markdown(grid)]
        if grid.label == "passk":
            parts.append("![pass@k curves](passk.png)")
    parts += ["## How to read this", _explained(comparison)]
    return "\n\n".join(parts) + "\n"


def tex(comparison: Comparison) -> str:
    """The text of compare.tex: a table environment per table."""
    grids = [paper_grid(comparison.scores), *_grids(comparison)]
    notes = "\n".join(f"% {note}" for note in comparison.notes)
    return "\n\n".join(filter(None, ["% Needs \\usepackage{booktabs}.", notes, *map(latex, grids)])) + "\n"


def table(comparison: Comparison) -> str:
    """The text of compare.csv: shares in [0, 1], differences of shares, counts; columns that do not apply are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(comparison))
    return buffer.getvalue()


def _grids(comparison: Comparison) -> list[Grid]:
    grids = [score_grid(comparison.scores), pass_grid(comparison.scores)]
    for number, pair in enumerate(comparison.pairs, start=1):
        both = (gap_grid(pair.first, pair.second, pair.gaps),
                exclusive_grid(pair.first, pair.second, pair.exclusive, comparison.solved))  # fmt: skip
        # Labels in LaTeX must be unique.
        grids += [Grid(f"{g.label}-{number}", g.title, g.header, g.rows, g.labels) for g in both if g.rows]
    grids += [level_grid(comparison.scores), response_grid(comparison.scores)]
    return [grid for grid in grids if grid is not None]


def _explained(comparison: Comparison) -> str:
    return (
        "avg@n is the mean over problems of the share of correct ones among n samples; an average counts every "
        "benchmark of its group equally. pass@k is the unbiased estimate 1 − C(n−c, k)/C(n, k). Intervals are "
        f"percentile bootstrap intervals ({comparison.resamples} resamples of the problems, seed {comparison.seed}): "
        "they show how much the score would vary with other problems of the same kind. A difference is resampled "
        "problem by problem. Its p is two-sided; Holm's p adjusts it for the number of benchmarks, separately for avg "
        "and pass@k. All values are also in compare.csv, one per line, and in compare.tex."
    )


def _records(comparison: Comparison) -> Iterator[dict]:
    scores = comparison.scores
    for (run, benchmark), one in scores.figures.items():
        same = {"run": run, "benchmark": benchmark, "samples": one.samples}
        yield from _accuracy({"kind": "score", **same}, one)
        for level, part in one.levels.items():
            yield from _accuracy({"kind": "level", "level": level, **same}, part)
        for measure in ("tokens", "unfinished", "timeouts", "errors"):
            yield {"kind": "response", "measure": measure, "value": getattr(one, measure), **same}
    for (run, group), interval in scores.averages.items():
        yield {"kind": "average", "benchmark": f"average {group}", "run": run, "measure": "avg", **_ends(interval)}
    for pair in comparison.pairs:
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
