"""Tables with all runs: accuracy with averages, accuracy by level, pass@k, response lengths and failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.compare.load import Run, benchmarks
from experiments.grid import Grid, Row
from upge.evaluation.intervals import Interval
from upge.evaluation.scores import BenchmarkScores, average, benchmark_scores

MISSING = "–"


@dataclass(frozen=True)
class Scores:
    """The numbers that all tables show, computed once.

    Attributes:
        runs: the runs, in the given order.
        groups: group → the benchmarks of it that any run has.
        figures: (run's name, benchmark) → its scores, if the run has the benchmark.
        averages: (run's name, group) → the mean over the group's benchmarks, if the run has all of them.
    """

    runs: tuple[Run, ...]
    groups: Mapping[str, Sequence[str]]
    figures: Mapping[tuple[str, str], BenchmarkScores]
    averages: Mapping[tuple[str, str], Interval]

    @classmethod
    def of(cls, runs: Sequence[Run], resamples: int, seed: int) -> Scores:
        """Computes the scores of `runs`."""
        groups = benchmarks(runs)
        by_benchmark = {
            (run.name, name): benchmark_scores(o, resamples, seed) for run in runs for name, o in run.outcomes.items()
        }
        averages = {
            (run.name, group): average([run.outcomes[name] for name in names], resamples, seed)
            for run in runs
            for group, names in groups.items()
            if all(name in run.outcomes for name in names)
        }
        return cls(tuple(runs), groups, by_benchmark, averages)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the runs."""
        return tuple(run.name for run in self.runs)

    def of_benchmark(self, benchmark: str) -> list[BenchmarkScores | None]:
        """Each run's scores on a benchmark; None for a run without the benchmark."""
        return [self.figures.get((name, benchmark)) for name in self.names]


def score_grid(scores: Scores) -> Grid:
    """A row per benchmark and per average, a column per run, each with its interval."""
    rows = []
    for group, names in scores.groups.items():
        for place, name in enumerate(names):
            scored = scores.of_benchmark(name)
            labels = (name, _each(f"avg@{f.samples}" for f in scored if f), _each(f.problems for f in scored if f))
            rows.append(_row(labels, [f.avg if f else None for f in scored], rule=bool(rows) and place == 0))
        if len(names) > 1:
            averages = [scores.averages.get((name, group)) for name in scores.names]
            rows.append(_row((f"average {group}", "", ""), averages, rule=True))
    return Grid(
        label="scores",
        title="Accuracy in %, with 95 % bootstrap intervals over problems",
        header=("benchmark", "measure", "N", *scores.names),
        rows=tuple(rows),
        labels=3,
    )


def paper_grid(scores: Scores) -> Grid:
    """The transposed table, as papers print it: a row per run, a column per benchmark and average, no intervals."""
    columns: list[tuple[str, list[Interval | None]]] = []
    for group, names in scores.groups.items():
        columns += [(name, [f.avg if f else None for f in scores.of_benchmark(name)]) for name in names]
        if len(names) > 1:
            columns.append((f"avg. {group}", [scores.averages.get((name, group)) for name in scores.names]))
    best = [_best(values) for _, values in columns]
    rows = []
    for place, run in enumerate(scores.names):
        cells = (MISSING if values[place] is None else _percent(values[place].value) for _, values in columns)
        rows.append(Row((run, *cells), frozenset(i + 1 for i in range(len(columns)) if place in best[i])))
    header = ("", *(name for name, _ in columns))
    return Grid("paper", "Accuracy in %, the highest of each column in bold", header, tuple(rows))


def level_grid(scores: Scores) -> Grid | None:
    """Accuracy by difficulty level on the benchmarks that have levels; None if there is none."""
    rows = []
    for name in [name for names in scores.groups.values() for name in names]:
        scored = scores.of_benchmark(name)
        levels = dict.fromkeys(level for f in scored if f for level in f.levels)
        for place, level in enumerate(levels):
            having = [f.levels.get(level) if f else None for f in scored]
            labels = (name, level, _each(f.problems for f in having if f))
            rows.append(_row(labels, [f.avg if f else None for f in having], rule=bool(rows) and place == 0))
    header = ("benchmark", "level", "N", *scores.names)
    title = "Accuracy in % by difficulty level, with 95 % intervals"
    return Grid("levels", title, header, tuple(rows), 3) if rows else None


def pass_grid(scores: Scores) -> Grid | None:
    """pass@k of the benchmarks with several samples per problem; None if there is none."""
    chosen = [(name, run) for name in _sampled(scores) for run in scores.names if (run, name) in scores.figures]
    ks = sorted({k for name, run in chosen for k in scores.figures[run, name].pass_at})
    rows: list[Row] = []
    for name, run in chosen:
        curve = scores.figures[run, name].pass_at
        rule = bool(rows) and rows[-1].cells[0] != name
        rows.append(Row((name, run, *(_cell(curve.get(k)) for k in ks)), rule=rule))
    title = "Unbiased pass@k in %, with 95 % intervals"
    return Grid("passk", title, ("benchmark", "run", *(f"k={k}" for k in ks)), tuple(rows), 2) if rows else None


def response_grid(scores: Scores) -> Grid:
    """The length of responses, and how many were cut off or could not be verified."""
    rows: list[Row] = []
    for name in [name for names in scores.groups.values() for name in names]:
        for run in scores.names:
            scored = scores.figures.get((run, name))
            if scored:
                rule = bool(rows) and rows[-1].cells[0] != name
                cells = (f"{scored.tokens:.0f}", _percent(scored.unfinished), str(scored.timeouts), str(scored.errors))
                rows.append(Row((name, run, *cells), rule=rule))
    header = ("benchmark", "run", "mean tokens", "cut off in %", "verifier timeouts", "verifier errors")
    return Grid("responses", "Responses", header, tuple(rows), 2)


def _sampled(scores: Scores) -> list[str]:
    names = [name for names in scores.groups.values() for name in names]
    return [name for name in names if any(f and f.samples > 1 for f in scores.of_benchmark(name))]


def _row(labels: tuple[str, ...], values: Sequence[Interval | None], rule: bool) -> Row:
    bold = frozenset(len(labels) + place for place in _best(values))
    return Row((*labels, *map(_cell, values)), bold, rule)


def _best(values: Sequence[Interval | None]) -> set[int]:
    """The positions of the highest value as printed; empty if there are fewer than two values."""
    shown = {place: round(100 * value.value, 1) for place, value in enumerate(values) if value is not None}
    return {place for place, value in shown.items() if value == max(shown.values())} if len(shown) > 1 else set()


def _cell(value: Interval | None) -> str:
    if value is None:
        return MISSING
    return f"{_percent(value.value)} ({_percent(value.low)}–{_percent(value.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _each(values) -> str:
    """The value that all runs share, or the different ones separated by slashes."""
    return "/".join(dict.fromkeys(map(str, values)))
