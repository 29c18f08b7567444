"""Differences between two runs: of their scores, with intervals, and the problems that only one of them solves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from experiments.compare.load import Run, benchmarks, pairing
from experiments.grid import Grid, Row
from upge.evaluation.intervals import Difference, holm, paired
from upge.evaluation.scores import Outcomes, by_level


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


def gaps(baseline: Run, run: Run, resamples: int, seed: int) -> list[Gap]:
    """The differences on every benchmark with common problems, then on the average of each group with at least two."""
    singles: list[Gap] = []
    averages: list[Gap] = []
    for group, names in benchmarks([baseline, run]).items():
        both = [name for name in names if name in baseline.outcomes and name in run.outcomes]
        both = [name for name in both if pairing(run.outcomes[name], baseline.outcomes[name]).first]
        for name in both:
            singles += _gaps_of(baseline.outcomes[name], run.outcomes[name], resamples, seed)
        if len(both) > 1:
            values = {name: _values(run.outcomes[name], baseline.outcomes[name], []) for name in both}
            ours, theirs = ({name: pair[side] for name, pair in values.items()} for side in (0, 1))
            test = paired(ours, theirs, resamples, seed)
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
    return Grid(
        label="differences",
        title=f"{run} minus {baseline}, in percentage points",
        header=("benchmark", "measure", "N", "difference", "95 % interval", "p", "p (Holm)"),
        rows=tuple(rows),
        labels=2,
    )


def p_text(value: float) -> str:
    """A p-value with three decimals; smaller ones become "<0.001"."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _gaps_of(baseline: Outcomes, run: Outcomes, resamples: int, seed: int) -> list[Gap]:
    n = min(baseline.samples, run.samples)
    k = 2 ** (n.bit_length() - 2) if n > 3 else 0
    ours, theirs = _values(run, baseline, [k] if k else [])
    tests = paired({run.benchmark: ours}, {run.benchmark: theirs}, resamples, seed)
    same_n = baseline.samples == run.samples
    measures = [f"avg@{n}" if same_n else f"avg@{run.samples} − avg@{baseline.samples}", f"pass@{k}"]
    return [
        Gap(run.benchmark, measures[column], tests.problems, difference, None)
        for column, difference in enumerate(tests.columns)
    ]


def _values(first: Outcomes, second: Outcomes, ks: Sequence[int]) -> list[dict[str, Tensor]]:
    """For both runs: id → average and pass@k of each problem that they share."""
    pairs, per_run = pairing(first, second), []
    for one, places in ((first, pairs.first), (second, pairs.second)):
        values = torch.cat([one.average(), *([one.pass_at(ks)] if ks else [])], dim=1)
        per_run.append({one.ids[place]: values[place] for place in places})
    return per_run


def _adjusted(singles: Sequence[Gap]) -> list[Gap]:
    """Adds Holm's p-values; avg and pass@k are two families of tests over the benchmarks."""
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
        benchmark: the benchmark's name.
        level: the difficulty level, or `ALL`.
        problems: the number of common problems.
        only_first, only_second: problems that only one of the runs solves.
        both, neither: problems that both runs solve, and that none solves.
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
    counts = []
    for name in first.outcomes:
        if name in second.outcomes:
            counts += _exclusive_of(first.outcomes[name], second.outcomes[name], RULES[solved])
    return counts


def exclusive_grid(first: str, second: str, lines: list[Exclusive], solved: str) -> Grid:
    """The table of exclusive solves of two runs."""
    rows = []
    for line in lines:
        counts = (line.only_first, line.only_second, line.both, line.neither)
        shares = (f"{count} ({100 * count / line.problems:.1f})" for count in counts)
        begins = not rows or rows[-1].cells[0] != line.benchmark
        total = frozenset(range(1, 7)) if line.level == ALL and not begins else frozenset()
        rows.append(Row((line.benchmark, line.level, str(line.problems), *shares), total, begins and bool(rows)))
    return Grid(
        label="exclusive",
        title=f"Problems (and % of N) that {first} or {second} solves alone: {_RULE_TEXTS[solved]}",
        header=("benchmark", "level", "N", f"only {first}", f"only {second}", "both", "neither"),
        rows=tuple(rows),
        labels=2,
    )


def _exclusive_of(first: Outcomes, second: Outcomes, rule: Callable) -> list[Exclusive]:
    pairs = pairing(first, second)
    if not pairs.first:
        return []
    ours, theirs = rule(first.correct)[list(pairs.first)], rule(second.correct)[list(pairs.second)]
    # One of the two may have been evaluated on a file without levels.
    levels = [_either(first.levels[a], second.levels[b]) for a, b in zip(pairs.first, pairs.second, strict=True)]
    groups = {**by_level(levels), ALL: list(range(len(ours)))}
    return [_count(first.benchmark, level, ours[rows], theirs[rows]) for level, rows in groups.items()]


def _either(first: str | None, second: str | None) -> str | None:
    return second if first is None else first


def _count(benchmark: str, level: str, ours: Tensor, theirs: Tensor) -> Exclusive:
    counts = (ours & ~theirs, ~ours & theirs, ours & theirs, ~ours & ~theirs)
    return Exclusive(benchmark, level, len(ours), *(int(count.sum()) for count in counts))
