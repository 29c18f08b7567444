"""The files of a comparison: a page in Markdown, all values as CSV, the tables in LaTeX, and the pass@k curves."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from experiments.compare import tables
from experiments.compare.tables import Exclusive, Gap, Scores
from experiments.drawing import draw_band, draw_panels, dress, in_figure, save
from experiments.grid import Grid, latex, markdown, markdown_text
from upge.errors import DataError
from upge.evaluation.intervals import Interval, intervals
from upge.evaluation.scores import BenchmarkScores, powers_of_two

COLUMNS = "kind benchmark level run baseline measure value low high p p_holm problems samples".split()


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


def files(comparison: Comparison, folder: Path) -> list[Path]:
    """Create `folder`, write all files into it, and return their paths.

    Raises:
        DataError: the files cannot be written.
    """
    texts = {"compare.md": page(comparison), "compare.csv": table(comparison), "compare.tex": tex(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8", newline="")
        drawn = draw(comparison.panels, comparison.scores.names, folder) if comparison.panels else []
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
    grids = [tables.paper_grid(comparison.scores), *_grids(comparison)]
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
    grids = [tables.score_grid(comparison.scores), tables.pass_grid(comparison.scores)]
    for number, pair in enumerate(comparison.pairs, start=1):
        both = (tables.gap_grid(pair.first, pair.second, pair.gaps),
                tables.exclusive_grid(pair.first, pair.second, pair.exclusive, comparison.solved))  # fmt: skip
        # Labels in LaTeX must be unique.
        grids += [Grid(f"{g.label}-{number}", g.title, g.header, g.rows, g.labels) for g in both if g.rows]
    grids += [tables.level_grid(comparison.scores), tables.response_grid(comparison.scores)]
    return [grid for grid in grids if grid is not None]


def _explained(comparison: Comparison) -> str:
    return (
        "avg@n is the mean over problems of the share of correct ones among n samples; an average counts every "
        "benchmark of its group equally. pass@k is the unbiased estimate 1 − C(n−c, k)/C(n, k). Intervals are "
        "95 % Wilson intervals over problems: they show how much the score would vary with other problems of the same "
        "kind. A difference is taken problem by problem. Its p is that of the two-sided paired t-test; "
        "Holm's p adjusts it for the number of benchmarks, separately for avg and pass@k. All values are also in "
        "compare.csv, one per line, and in compare.tex."
    )


def _records(comparison: Comparison) -> Iterator[dict]:
    scores = comparison.scores
    for (run, benchmark), one in scores.per_benchmark.items():
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
            counts = (line.only_first, line.only_second, line.both, line.neither)
            for measure, value in zip(("only baseline", "only run", "both", "neither"), counts, strict=True):
                yield {"kind": "exclusive", **same, **about, "measure": measure, "value": value}


def _accuracy(same: dict, one: BenchmarkScores) -> Iterator[dict]:
    same = {**same, "problems": one.problems}
    yield {**same, "measure": f"avg@{one.samples}", **_ends(one.avg)}
    for k, interval in one.pass_at.items():
        if one.samples > 1:
            yield {**same, "measure": f"pass@{k}", **_ends(interval)}


def _ends(interval: Interval) -> dict:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Panel:
    """The curves of one benchmark, or of an average: run's name → k → pass@k."""

    title: str
    curves: Mapping[str, Mapping[int, Interval]]


def panels(scores: Scores) -> list[Panel]:
    """A panel for every benchmark with several samples per problem, and one for each group's average over these."""
    made = []
    for group, names in scores.groups.items():
        members = []
        for name in names:
            each = {run: scores.per_benchmark.get((run, name)) for run in scores.names}
            curves = {run: f.pass_at for run, f in each.items() if f and f.samples > 1}
            if curves:
                made.append(Panel(name, curves))
                members += [name] if len(curves) == len(scores.runs) else []
        if len(members) > 1:
            made.append(Panel(f"average {group}, n > 1", _average(scores, members)))
    return made


def draw(panels: Sequence[Panel], names: Sequence[str], folder: Path) -> list[Path]:
    """Write passk.png and passk.svg into `folder`; `names` are all runs, which have the same color in every panel."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))

    def draw_one(axes, panel: Panel, place: int) -> dict[str, Line2D]:
        axes.set_ylabel("pass@k in %" if place % columns == 0 else "")
        return _panel(axes, panel, names)

    def into(figure: Figure) -> None:
        figure.get_layout_engine().set(h_pad=0.08)
        draw_panels(figure, columns, panels, names, "k", draw_one, borderaxespad=0.2)

    return save(folder, "passk", (3.1 * columns + 0.4, 2.5 * math.ceil(len(panels) / columns) + 0.5), into)


def _average(scores: Scores, names: Sequence[str]) -> dict[str, dict[int, Interval]]:
    curves = {}
    for run in scores.runs:
        outcomes = [run.outcomes[name] for name in names]
        ks = powers_of_two(min(one.samples for one in outcomes))
        values = {one.benchmark: one.pass_at(ks) for one in outcomes}
        curves[run.name] = dict(zip(ks, intervals(values), strict=True))
    return curves


def _panel(axes, panel: Panel, names: Sequence[str]) -> dict[str, Line2D]:
    lines = {}
    for name, curve in panel.curves.items():
        index = names.index(name)
        style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "markeredgecolor": "white"}
        lines[name] = draw_band(axes, name, curve, index, 100, linewidth=1.8, markeredgewidth=0.6, **style)
    largest = max(k for curve in panel.curves.values() for k in curve)
    powers = [2**i for i in range(largest.bit_length())]
    ticks = powers[:: math.ceil(len(powers) / 7)]
    axes.set_title(in_figure(panel.title))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([str(k) for k in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_ylim(0, min(101.0, axes.get_ylim()[1]))
    dress(axes)
    axes.margins(x=0.04)
    return lines
