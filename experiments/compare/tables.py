"""The tables of a comparison: scores of all runs, and the differences between two runs with their exclusive solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from experiments.compare.load import Run, benchmarks, pairing
from experiments.grid import Grid, Row, ruled
from upge.evaluation.intervals import Difference, Interval, holm, paired
from upge.evaluation.scores import BenchmarkScores, Outcomes, average, benchmark_scores, by_level

MISSING = "–"


@dataclass(frozen=True)
class Scores:
    """The numbers that all tables show, computed once.

    Attributes:
        groups: group → the benchmarks of it that any run has.
        per_benchmark: (run's name, benchmark) → its scores, if the run has the benchmark.
        averages: (run's name, group) → the mean over the group's benchmarks, if the run has all of them.
    """

    runs: tuple[Run, ...]
    groups: Mapping[str, Sequence[str]]
    per_benchmark: Mapping[tuple[str, str], BenchmarkScores]
    averages: Mapping[tuple[str, str], Interval]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Scores:
        """Compute the scores of `runs`."""
        groups = benchmarks(runs)
        per_benchmark, averages = {}, {}
        for run in runs:
            per_benchmark |= {(run.name, name): benchmark_scores(o) for name, o in run.outcomes.items()}
            for group, names in groups.items():
                if all(name in run.outcomes for name in names):
                    averages[run.name, group] = average([run.outcomes[name] for name in names])
        return cls(tuple(runs), groups, per_benchmark, averages)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the runs."""
        return tuple(run.name for run in self.runs)

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks, group by group."""
        return [name for names in self.groups.values() for name in names]

    def of_benchmark(self, benchmark: str) -> list[BenchmarkScores | None]:
        """Each run's scores on a benchmark; None for a run without the benchmark."""
        return [self.per_benchmark.get((name, benchmark)) for name in self.names]


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
    title = "Accuracy in %, with 95 % intervals over problems"
    return Grid("scores", title, ("benchmark", "measure", "N", *scores.names), tuple(rows), labels=3)


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
    for name in scores.benchmarks:
        scored = scores.of_benchmark(name)
        levels = dict.fromkeys(level for f in scored if f for level in f.levels)
        for level in levels:
            having = [f.levels.get(level) if f else None for f in scored]
            labels = (name, level, _each(f.problems for f in having if f))
            rows.append(_row(labels, [f.avg if f else None for f in having]))
    header = ("benchmark", "level", "N", *scores.names)
    title = "Accuracy in % by difficulty level, with 95 % intervals"
    return Grid("levels", title, header, ruled(rows), 3) if rows else None


def pass_grid(scores: Scores) -> Grid | None:
    """pass@k of the benchmarks with several samples per problem; None if there is none."""
    sampled = [name for name in scores.benchmarks if any(f and f.samples > 1 for f in scores.of_benchmark(name))]
    chosen = [(name, run) for name in sampled for run in scores.names if (run, name) in scores.per_benchmark]
    ks = sorted({k for name, run in chosen for k in scores.per_benchmark[run, name].pass_at})
    rows = [
        Row((name, run, *(_cell(scores.per_benchmark[run, name].pass_at.get(k)) for k in ks))) for name, run in chosen
    ]
    title = "Unbiased pass@k in %, with 95 % intervals"
    return Grid("passk", title, ("benchmark", "run", *(f"k={k}" for k in ks)), ruled(rows), 2) if rows else None


def response_grid(scores: Scores) -> Grid:
    """The length of responses, and how many were cut off or could not be verified."""
    rows: list[Row] = []
    for name in scores.benchmarks:
        for run in scores.names:
            if scored := scores.per_benchmark.get((run, name)):
                cells = (f"{scored.tokens:.0f}", _percent(scored.unfinished), str(scored.timeouts), str(scored.errors))
                rows.append(Row((name, run, *cells)))
    header = ("benchmark", "run", "mean tokens", "cut off in %", "verifier timeouts", "verifier errors")
    return Grid("responses", "Responses", header, ruled(rows), 2)


def _row(labels: tuple[str, ...], values: Sequence[Interval | None], rule: bool = False) -> Row:
    bold = frozenset(len(labels) + place for place in _best(values))
    return Row((*labels, *map(_cell, values)), bold, rule)


def _best(values: Sequence[Interval | None]) -> set[int]:
    """The positions of the highest value as printed; empty if there are fewer than two values."""
    shown = {place: round(100 * value.value, 1) for place, value in enumerate(values) if value is not None}
    return {place for place, value in shown.items() if value == max(shown.values())} if len(shown) > 1 else set()


def _cell(value: Interval | None) -> str:
    return f"{_percent(value.value)} ({_percent(value.low)}–{_percent(value.high)})" if value else MISSING


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _each(values) -> str:
    """The value that all runs share, or the different ones separated by slashes."""
    return "/".join(dict.fromkeys(map(str, values)))


@dataclass(frozen=True)
class Gap:
    """The difference between a run and the baseline on one benchmark or average.

    Attributes:
        benchmark: the benchmark's name, or "average" and the group's name.
        measure: avg@n, or pass@k at the largest power of two up to n/2, because pass@n depends on single samples.
        problems: the number of problems that both runs have.
        difference: run minus baseline, a share.
        holm: the p-value adjusted for the number of benchmarks; None for an average, which is a single test.
    """

    benchmark: str
    measure: str
    problems: int
    difference: Difference
    holm: float | None


def gaps(baseline: Run, run: Run) -> list[Gap]:
    """The differences on every benchmark with common problems, then on the average of each group with at least two."""
    singles: list[Gap] = []
    averages: list[Gap] = []
    for group, names in benchmarks([baseline, run]).items():
        both = [name for name in names if name in baseline.outcomes and name in run.outcomes]
        both = [name for name in both if pairing(run.outcomes[name], baseline.outcomes[name]).first]
        for name in both:
            singles += _gaps_of(baseline.outcomes[name], run.outcomes[name])
        if len(both) > 1:
            values = {name: _values(run.outcomes[name], baseline.outcomes[name], []) for name in both}
            ours, theirs = ({name: pair[side] for name, pair in values.items()} for side in (0, 1))
            test = paired(ours, theirs)
            averages.append(Gap(f"average {group}", f"avg of {len(both)}", test.problems, test.columns[0], None))
    return [*_adjusted(singles), *averages]


def gap_grid(baseline: str, run: str, differences: Sequence[Gap]) -> Grid:
    """The table of the differences between two runs."""
    rows = []
    for gap in differences:
        interval = gap.difference.interval
        cells = (
            *(gap.benchmark, gap.measure, str(gap.problems), f"{100 * interval.value:+.1f}"),
            f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}",
            *(p_text(gap.difference.p_value), "" if gap.holm is None else p_text(gap.holm)),
        )
        rule = gap.holm is None and bool(rows) and not rows[-1].rule
        rows.append(Row(cells, frozenset(), rule))
    header = ("benchmark", "measure", "N", "difference", "95 % interval", "p", "p (Holm)")
    return Grid("differences", f"{run} minus {baseline}, in percentage points", header, tuple(rows), labels=2)


def p_text(value: float) -> str:
    """A p-value with three decimals; smaller ones become "<0.001", and NaN becomes `MISSING`."""
    if math.isnan(value):
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _gaps_of(baseline: Outcomes, run: Outcomes) -> list[Gap]:
    n = min(baseline.samples, run.samples)
    k = 2 ** (n.bit_length() - 2) if n > 3 else 0
    ours, theirs = _values(run, baseline, [k] if k else [])
    tests = paired({run.benchmark: ours}, {run.benchmark: theirs})
    same_n = baseline.samples == run.samples
    measures = [f"avg@{n}" if same_n else f"avg@{run.samples} − avg@{baseline.samples}", f"pass@{k}"]
    return [Gap(run.benchmark, measures[i], tests.problems, column, None) for i, column in enumerate(tests.columns)]


def _values(first: Outcomes, second: Outcomes, ks: Sequence[int]) -> list[dict[str, Tensor]]:
    """For both runs: id → average and pass@k of each problem that they share."""
    pairs, per_run = pairing(first, second), []
    for one, places in ((first, pairs.first), (second, pairs.second)):
        values = torch.cat([one.average(), *([one.pass_at(ks)] if ks else [])], dim=1)
        per_run.append({one.ids[place]: values[place] for place in places})
    return per_run


def _adjusted(singles: Sequence[Gap]) -> list[Gap]:
    """Add Holm's p-values; avg and pass@k are two families of tests over the benchmarks."""
    adjusted = list(singles)
    for kind in ("avg", "pass"):
        places = [place for place, gap in enumerate(singles) if gap.measure.startswith(kind)]
        values = holm([singles[place].difference.p_value for place in places])
        for place, value in zip(places, values, strict=True):
            adjusted[place] = replace(singles[place], holm=value)
    return adjusted


#: Rules for when a problem counts as solved. With one sample per problem, as in the paper's table, they are equal.
RULES: Mapping[str, Callable[[Bool[Tensor, "P n"]], Bool[Tensor, " P"]]] = {
    "most": lambda correct: correct.double().mean(dim=1) > 0.5,
    "first": lambda correct: correct[:, 0],
    "any": lambda correct: correct.any(dim=1),
}
_RULE_TEXTS = {
    "most": "more than half of its samples are correct",
    "first": "its first sample is correct",
    "any": "any of its samples is correct",
}
ALL = "all"


@dataclass(frozen=True)
class Exclusive:
    """Counts over the problems of one level that both runs have.

    Attributes:
        level: the difficulty level, or `ALL`.
        only_first, only_second, both, neither: the numbers of problems that only one of the runs, both or none solves.
    """

    benchmark: str
    level: str
    problems: int
    only_first: int
    only_second: int
    both: int
    neither: int


def exclusive(first: Run, second: Run, solved: str) -> list[Exclusive]:
    """A line per level and one for `ALL`, for every benchmark with common problems; `solved` is a key of `RULES`."""
    shared = [name for name in first.outcomes if name in second.outcomes]
    each = (_exclusive_of(first.outcomes[name], second.outcomes[name], RULES[solved]) for name in shared)
    return [line for lines in each for line in lines]


def exclusive_grid(first: str, second: str, lines: list[Exclusive], solved: str) -> Grid:
    """The table of exclusive solves of two runs."""
    rows = []
    for line in lines:
        counts = (line.only_first, line.only_second, line.both, line.neither)
        shares = (f"{count} ({100 * count / line.problems:.1f})" for count in counts)
        begins = not rows or rows[-1].cells[0] != line.benchmark
        total = frozenset(range(1, 7)) if line.level == ALL and not begins else frozenset()
        rows.append(Row((line.benchmark, line.level, str(line.problems), *shares), total))
    title = f"Problems (and % of N) that {first} or {second} solves alone: {_RULE_TEXTS[solved]}"
    header = ("benchmark", "level", "N", f"only {first}", f"only {second}", "both", "neither")
    return Grid("exclusive", title, header, ruled(rows), labels=2)


def _exclusive_of(first: Outcomes, second: Outcomes, rule: Callable) -> list[Exclusive]:
    pairs = pairing(first, second)
    if not pairs.first:
        return []
    ours, theirs = rule(first.correct)[list(pairs.first)], rule(second.correct)[list(pairs.second)]
    # One of the two may have been evaluated on a file without levels.
    levels = [first.levels[a] for a in pairs.first]
    levels = [second.levels[b] if own is None else own for own, b in zip(levels, pairs.second, strict=True)]
    lines = []
    for level, rows in {**by_level(levels), ALL: list(range(len(ours)))}.items():
        a, b = ours[rows], theirs[rows]
        counts = (int(count.sum()) for count in (a & ~b, ~a & b, a & b, ~a & ~b))
        lines.append(Exclusive(first.benchmark, level, len(rows), *counts))
    return lines
