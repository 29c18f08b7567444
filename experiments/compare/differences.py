"""What sets two runs apart: differences of their scores with intervals, and problems that only one of them solves."""

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
    """How far one run is ahead of another.

    Fields:
        benchmark: its name, or of an average the word and the group's name.
        measure: avg@n, or pass@k at the largest power of two up to half of n: pass@n itself hangs on single samples.
        problems: how many both have.
        difference: run minus baseline, a share.
        holm: the p-value adjusted for the number of benchmarks; None for an average, which is one question.
    """

    benchmark: str
    measure: str
    problems: int
    difference: Difference
    holm: float | None


def gaps(baseline: Run, run: Run, resamples: int, seed: int) -> list[Gap]:
    """Those of every benchmark with common problems, then of the average of every group with two such or more."""
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
            found = paired(ours, theirs, resamples, seed)
            averages.append(Gap(f"average {group}", f"avg of {len(both)}", found.problems, found.columns[0], None))
    return [*_adjusted(singles), *averages]


def gap_grid(baseline: str, run: str, found: Sequence[Gap]) -> Grid:
    """The table of one pair of runs."""
    rows = []
    for gap in found:
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
    """Three decimals; what is smaller is said to be."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _gaps_of(baseline: Outcomes, run: Outcomes, resamples: int, seed: int) -> list[Gap]:
    n = min(baseline.samples, run.samples)
    k = 2 ** (n.bit_length() - 2) if n > 3 else 0
    ours, theirs = _values(run, baseline, [k] if k else [])
    found = paired({run.benchmark: ours}, {run.benchmark: theirs}, resamples, seed)
    same_n = baseline.samples == run.samples
    measures = [f"avg@{n}" if same_n else f"avg@{run.samples} − avg@{baseline.samples}", f"pass@{k}"]
    return [
        Gap(run.benchmark, measures[column], found.problems, difference, None)
        for column, difference in enumerate(found.columns)
    ]


def _values(first: Outcomes, second: Outcomes, ks: Sequence[int]) -> list[dict[str, Tensor]]:
    """For either: id → its average and its pass@k, of the problems that they share."""
    pairs, found = pairing(first, second), []
    for one, places in ((first, pairs.first), (second, pairs.second)):
        values = torch.cat([one.average(), *([one.pass_at(ks)] if ks else [])], dim=1)
        found.append({one.ids[place]: values[place] for place in places})
    return found


def _adjusted(found: Sequence[Gap]) -> list[Gap]:
    """With Holm's p-values; avg and pass@k are two questions, each of which is asked of every benchmark."""
    adjusted = list(found)
    for kind in ("avg", "pass"):
        places = [place for place, gap in enumerate(found) if gap.measure.startswith(kind)]
        values = holm([found[place].difference.p_value for place in places])
        for place, value in zip(places, values, strict=True):
            adjusted[place] = replace(found[place], holm=value)
    return adjusted


#: When a problem counts as solved. With one sample per problem, as in the paper's table, all three say the same.
RULES: Mapping[str, Callable[[Bool[Tensor, "P n"]], Bool[Tensor, " P"]]] = {
    "most": lambda correct: correct.double().mean(dim=1) > 0.5,
    "first": lambda correct: correct[:, 0],
    "any": lambda correct: correct.any(dim=1),
}
_SAID = {
    "most": "more than half of its samples are correct",
    "first": "its first sample is correct",
    "any": "any of its samples is correct",
}
ALL = "all"


@dataclass(frozen=True)
class Exclusive:
    """Of the problems of one level that both runs have: how many either solves alone, both solve, and neither."""

    benchmark: str
    level: str
    problems: int
    only_first: int
    only_second: int
    both: int
    neither: int


def exclusive(first: Run, second: Run, solved: str) -> list[Exclusive]:
    """A line per level and one for `ALL`, for every benchmark with common problems; `solved` is a key of `RULES`."""
    found = []
    for name in first.outcomes:
        if name in second.outcomes:
            found += _exclusive_of(first.outcomes[name], second.outcomes[name], RULES[solved])
    return found


def exclusive_grid(first: str, second: str, lines: list[Exclusive], solved: str) -> Grid:
    """The table of one pair of runs."""
    rows = []
    for line in lines:
        counts = (line.only_first, line.only_second, line.both, line.neither)
        shares = (f"{count} ({100 * count / line.problems:.1f})" for count in counts)
        begins = not rows or rows[-1].cells[0] != line.benchmark
        total = frozenset(range(1, 7)) if line.level == ALL and not begins else frozenset()
        rows.append(Row((line.benchmark, line.level, str(line.problems), *shares), total, begins and bool(rows)))
    return Grid(
        label="exclusive",
        title=f"Problems (and % of N) that {first} or {second} solves alone: {_SAID[solved]}",
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
