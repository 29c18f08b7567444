"""Confidence intervals and paired tests: over the problems of benchmarks, and over training runs.

Over problems: how a score would vary with other problems of the same kind. Scores are shares in [0, 1]; the samples of
a problem count as one value, because they are not independent. tests/upge/evaluation/test_coverage.py simulates how
often the intervals hold the true mean.

Over seeds, which determine data, order and sampling: Student's t. The evaluation problems are the same for all runs, so
these intervals do not include the variation due to the choice of problems.

Legend: P problems, K columns of values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

#: The coverage of intervals, unless the caller gives another one.
CONFIDENCE = 0.95
#: The number of common seeds that a paired test needs.
LEAST_SEEDS = 3
#: An upper bound on the rounding error of a difference of shares.
_ZERO = 1e-12


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, in the unit of the values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval, and the two-sided p-value of the hypothesis that it is 0.

    The p-value and the ends of the interval are NaN where the sample does not determine them.
    """

    interval: Interval
    p_value: float


@dataclass(frozen=True)
class Paired:
    """Two runs compared on the problems that both have.

    Attributes:
        columns: the `Difference` (first minus second) of each column of the values.
        problems: the number of problems that both have.
        only_first, only_second: (benchmark, id) of the problems that only one run has; `columns` leaves them out.
    """

    columns: tuple[Difference, ...]
    problems: int
    only_first: tuple[tuple[str, str], ...]
    only_second: tuple[tuple[str, str], ...]


def intervals(values: Mapping[str, Float[Tensor, "P K"]], confidence: float = CONFIDENCE) -> tuple[Interval, ...]:
    """The interval of each column's mean: over the problems of a benchmark, then over B benchmarks with equal weights.

    For one benchmark with mean m, it is the score interval of Wilson (1927) for n problems, with the quantile q:

        (m + q²/2n ± q·√(m(1 - m)/n + q²/4n²)) / (1 + q²/n)

    If all values are 0 or 1, or all are equal, n = P and q is the normal quantile: P problems that are all solved do
    not prove a rate of 1. Other shares vary less than values of 0 and 1 with the same mean, so they are worth

        n = P·m(1 - m)/s²,  s² = (Σ(v - m)² + m(1 - m))/P

    such values, and q is Student's t with P - 1 degrees of freedom. The second summand of s² is one more problem with
    a value of 0 or 1; without it, intervals are too narrow where few problems are ever solved.

    The ends of an average are those of Zou and Donner (2008), with the ends l_b and u_b of the benchmarks:

        low = m - √(Σ_b (m_b - l_b)²)/B,  high = m + √(Σ_b (u_b - m_b)²)/B

    Args:
        values: benchmark → [P, K], a row per problem, shares in [0, 1].

    Raises:
        ValueError: there is no benchmark, a benchmark has no problems, the numbers of columns differ, a value is not a
            share, or `confidence` is not between 0 and 1.
    """
    _check_problems(values, 0.0)
    _check_confidence(confidence)
    parts = torch.stack([_wilson(_sorted(rows), confidence) for _, rows in sorted(values.items())])
    means, low, high = parts.unbind(dim=1)
    mean = means.mean(dim=0)
    below, above = ((part - means).square().sum(dim=0).sqrt() / len(parts) for part in (low, high))
    return _in_range(mean, below, above, 0.0)


def paired(
    first: Mapping[str, Mapping[str, Float[Tensor, " K"]]],
    second: Mapping[str, Mapping[str, Float[Tensor, " K"]]],
    confidence: float = CONFIDENCE,
) -> Paired:
    """The paired t-test of first − second of two runs, over the problems that both have.

    The difference on a problem is one value, so the difficulty that both runs share cancels. With the mean d_b of the
    differences on the P_b problems of benchmark b and their sample variance s_b²:

        d = Σ_b d_b/B,  e² = Σ_b s_b²/P_b/B²,  interval d ± t·e,  p = P(|T| ≥ |d|/e)

    Student's T has the degrees of freedom of Welch and Satterthwaite, P - 1 for one benchmark. The interval excludes 0
    if and only if p is below 1 − confidence, unless it is cut at the ends of [-1, 1].

    Differences that are all equal show no variance, but they do not prove that there is none: then
    s_b/√P_b = 2·(1 + |d_b|)/(P_b + 4). Up to the share 4/(P_b + 4) of other problems may have another difference
    (Agresti and Coull 1998), which is at most 1 + |d_b| away.

    Args:
        first: benchmark → problem's id → [K] values of the first run, shares in [0, 1].
        second: the same of the second run.

    Raises:
        ValueError: the runs have no problem in common, or as for `intervals`.
    """
    ours, theirs = ({(name, id) for name, rows in run.items() for id in rows} for run in (first, second))
    shared = sorted(ours & theirs)
    if not shared:
        raise ValueError("the two runs have no problem in common; a paired comparison needs the same problems")
    differences: dict[str, list[Tensor]] = {}
    for name, id in shared:
        differences.setdefault(name, []).append(first[name][id].to(torch.float64) - second[name][id].to(torch.float64))
    values = {name: torch.stack(rows) for name, rows in differences.items()}
    _check_problems(values, -1.0)
    columns = _t_tests([_sorted(rows) for _, rows in sorted(values.items())], confidence)
    return Paired(columns, len(shared), tuple(sorted(ours - theirs)), tuple(sorted(theirs - ours)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment (1979) of p-values.

    If all hypotheses are true, the probability that any adjusted p is below α is at most α. A NaN stays NaN and does
    not count as a test.
    """
    tested = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(sorted(tested, key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def _sorted(rows: Tensor) -> Float[Tensor, "P K"]:
    """Each column in order, so that the order of problems does not even change the last digit of a sum."""
    return rows.to(torch.float64).sort(dim=0).values


def _wilson(rows: Float[Tensor, "P K"], confidence: float) -> Float[Tensor, "3 K"]:
    """Mean, lower end and upper end of each column."""
    problems, mean = len(rows), rows.mean(dim=0)
    largest = mean * (1 - mean)
    counted = ((rows == 0) | (rows == 1)).all(dim=0) | (rows[0] == rows[-1])
    variance = ((rows - mean).square().sum(dim=0) + largest) / problems
    n = torch.where(counted, problems, problems * largest / variance)
    # The normal distribution is Student's with infinitely many degrees of freedom.
    freedom = torch.where(counted, torch.inf, torch.full_like(mean, max(problems - 1, 1)))
    q2 = torch.from_numpy(stats.t.ppf((1 + confidence) / 2, freedom.numpy())).square() / n
    center, half = mean + q2 / 2, (q2 * largest + q2.square() / 4).sqrt()
    return torch.stack([mean, (center - half) / (1 + q2), (center + half) / (1 + q2)])


def _t_tests(benchmarks: Sequence[Float[Tensor, "P K"]], confidence: float) -> tuple[Difference, ...]:
    _check_confidence(confidence)
    means, squares = zip(*map(_mean_and_square, benchmarks), strict=True)
    mean, parts = torch.stack(means).mean(dim=0), torch.stack(squares) / len(benchmarks) ** 2
    square = parts.sum(dim=0)
    degrees = torch.tensor([max(len(rows) - 1, 1) for rows in benchmarks], dtype=torch.float64)
    freedom = square.square() / (parts.square() / degrees[:, None]).sum(dim=0)
    error = square.sqrt()
    half = error * torch.from_numpy(stats.t.ppf((1 + confidence) / 2, freedom.numpy()))
    p_values = 2 * stats.t.sf((mean.abs() / error).numpy(), freedom.numpy())
    ends = _in_range(mean, half, half, -1.0)
    return tuple(Difference(interval, float(p)) for interval, p in zip(ends, p_values, strict=True))


def _mean_and_square(rows: Float[Tensor, "P K"]) -> tuple[Tensor, Tensor]:
    """The mean of each column and the square of its standard error."""
    mean, problems = rows.mean(dim=0), len(rows)
    mean = torch.where(mean.abs() < _ZERO, 0.0, mean)
    square = (rows - mean).square().sum(dim=0) / max(problems - 1, 1) / problems
    unknown = 2 * (1 + mean.abs()) / (problems + 4)
    return mean, torch.where(rows[-1] - rows[0] < _ZERO, unknown.square(), square)


def _in_range(mean: Tensor, below: Tensor, above: Tensor, least: float) -> tuple[Interval, ...]:
    """mean - below to mean + above, cut at `least` and 1."""
    low, high = (mean - below).clamp(min=least), (mean + above).clamp(max=1.0)
    return tuple(Interval(*ends) for ends in zip(mean.tolist(), low.tolist(), high.tolist(), strict=True))


def _check_problems(values: Mapping[str, Tensor], least: float) -> None:
    if not values:
        raise ValueError("there is no benchmark to take a mean over")
    for name, rows in values.items():
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(f"{name}: found values of shape {list(rows.shape)}, expected a row per problem")
        outside = rows[~((rows >= least - _ZERO) & (rows <= 1 + _ZERO))]
        if len(outside):
            raise ValueError(f"{name}: found the value {outside[0].item():g}; give shares in [0, 1]")
    if len({rows.shape[1] for rows in values.values()}) > 1:
        raise ValueError(f"the benchmarks {', '.join(values)} have different numbers of columns")


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t_{n-1}·s/√n over n runs, where s is the sample standard deviation.

    The ends are NaN for one run, and for runs that are all equal, which do not show how much runs vary.

    Raises:
        ValueError: there are no values, one is not finite, or `confidence` is not between 0 and 1.
    """
    _check_runs(values, confidence)
    mean, error = _mean_and_error(values)
    if not error > _ZERO:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_t(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """The paired t-test of first - second, seed → value, over the n seeds that both have.

    Effects of a seed on both cancel.

        t = d̄/(s_d/√n),  p = P(|T_{n-1}| ≥ |t|)

    Returns:
        The difference; None with fewer than `LEAST_SEEDS` common seeds, whose s_d is too often near 0 by chance. If all
        differences are equal, s_d is 0: p and the ends of the interval are NaN.

    Raises:
        ValueError: a value is not finite, or `confidence` is not between 0 and 1.
    """
    seeds = sorted({*first} & {*second})
    if len(seeds) < LEAST_SEEDS:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    interval = t_interval(values, confidence)
    if math.isnan(interval.low):
        return Difference(interval, math.nan)
    _, error = _mean_and_error(values)
    return Difference(interval, float(2 * stats.t.sf(abs(interval.value / error), len(values) - 1)))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _check_runs(values: Sequence[float], confidence: float) -> None:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"found {list(values)}; a mean over runs needs at least one value, and all must be finite")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
