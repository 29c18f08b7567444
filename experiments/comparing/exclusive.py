"""Exclusive solves: the problems that one run solves and the other does not, by difficulty level.

Table 4 of arXiv 2509.04419, which counts on MATH-500 with one sample per problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from experiments.comparing.load import Run, pairing
from experiments.comparing.render import Grid, Row
from upge.evaluation.scores import Outcomes, by_level

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
            found += _of_benchmark(first.outcomes[name], second.outcomes[name], RULES[solved])
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


def _of_benchmark(first: Outcomes, second: Outcomes, rule: Callable) -> list[Exclusive]:
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
