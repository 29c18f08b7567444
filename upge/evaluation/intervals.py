"""Confidence intervals and paired tests: the bootstrap over problems, and Student's t over training runs.

Bootstrap: problems are resampled with replacement (Efron 1979). The samples of a problem stay together, because they
are not independent. For a mean over several benchmarks, each benchmark is resampled separately. The result depends on
the values and the seed, not on the order of problems or benchmarks.

Student's t: over seeds, which determine data, order and sampling. The evaluation problems are the same for all runs, so
these intervals do not include the variation due to the choice of problems.

Legend: P problems, K columns of values, R resamples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

RESAMPLES = 10_000
#: The coverage of intervals, unless the caller gives another one.
CONFIDENCE = 0.95
#: Random indices drawn at once: 8 MB, for any number of problems and resamples.
_AT_ONCE = 1_000_000
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
    """A mean difference with its interval, and the two-sided p-value of the hypothesis that it is 0."""

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


def replicates(
    values: Mapping[str, Float[Tensor, "P K"]], resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "R K"]:
    """The mean over benchmarks of the means over their problems, in each of R resamples, for K columns at once.

    Args:
        values: benchmark → [P, K], a row per problem; rows are resampled whole, so all columns share the resamples.
        resamples, seed: R, and the seed of the resampling.

    Raises:
        ValueError: there is no benchmark or no resample, a benchmark has no problems, the numbers of columns differ, or
            a value is not finite.
    """
    _check_problems(values, resamples)
    parts = [_resampled(rows, resamples, _generator(seed, name)) for name, rows in sorted(values.items())]
    return torch.stack(parts).mean(dim=0)


def intervals(
    values: Mapping[str, Float[Tensor, "P K"]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> tuple[Interval, ...]:
    """The interval of each column: the percentiles (1 ± confidence)/2 of `replicates`.

    Raises:
        ValueError: as for `replicates`, or `confidence` is not between 0 and 1.
    """
    drawn = replicates(values, resamples, seed)
    return _percentiles(_mean(values), drawn, confidence)


def paired(
    first: Mapping[str, Mapping[str, Float[Tensor, " K"]]],
    second: Mapping[str, Mapping[str, Float[Tensor, " K"]]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Paired:
    """The paired bootstrap of the difference first − second of two runs.

    The difference on a problem is resampled as one value, so the difficulty that both runs share cancels.

        p = min(1, 2·(1 + min(#{d* ≤ 0}, #{d* ≥ 0}))/(1 + R))

    over the R resampled differences d*. The p-value inverts the interval: up to one resample, the interval excludes 0
    if and only if p is below 1 − confidence. The smallest possible p is 2/(1 + R).

    Args:
        first: benchmark → problem's id → [K] values of the first run.
        second: the same of the second run.
        resamples, seed, confidence: as for `intervals`.

    Raises:
        ValueError: the runs have no problem in common, or as for `intervals`.
    """
    ours, theirs = ({(name, id) for name, rows in run.items() for id in rows} for run in (first, second))
    shared = sorted(ours & theirs)
    if not shared:
        raise ValueError("the two runs have no problem in common; a paired comparison needs the same problems")
    differences: dict[str, list[Tensor]] = {}
    for name, id in shared:
        differences.setdefault(name, []).append((first[name][id] - second[name][id]).to(torch.float64))
    values = {name: torch.stack(rows) for name, rows in differences.items()}
    drawn = replicates(values, resamples, seed)
    ends = _percentiles(_mean(values), drawn, confidence)
    columns = tuple(Difference(interval, _p_value(drawn[:, k])) for k, interval in enumerate(ends))
    return Paired(columns, len(shared), tuple(sorted(ours - theirs)), tuple(sorted(theirs - ours)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment (1979) of p-values.

    If all hypotheses are true, the probability that any adjusted p is below α is at most α.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def _mean(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([rows.to(torch.float64).mean(dim=0) for _, rows in sorted(values.items())]).mean(dim=0)


def _resampled(rows: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """[R, K] the mean of each resample: the number of times that each problem was drawn, times the values."""
    # Sort the rows, so that the same values in another order give the same resamples.
    distinct, times = torch.unique(rows.to(torch.float64), dim=0, return_counts=True)
    rows = distinct.repeat_interleave(times, dim=0)
    problems = len(rows)
    means = torch.empty(resamples, rows.shape[1], dtype=torch.float64)
    step = max(1, _AT_ONCE // problems)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = torch.randint(problems, (size, problems), generator=generator)
        counts = torch.zeros(size, problems, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(size, problems))
        means[start : start + size] = counts @ rows / problems
    return means


def _percentiles(mean: Tensor, drawn: Tensor, confidence: float) -> tuple[Interval, ...]:
    _check_confidence(confidence)
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    # One column at a time, because torch.quantile refuses more than 16 million values.
    low, high = torch.stack([torch.quantile(column, ends) for column in drawn.unbind(dim=1)], dim=1)
    return tuple(Interval(*ends) for ends in zip(mean.tolist(), low.tolist(), high.tolist(), strict=True))


def _p_value(drawn: Tensor) -> float:
    below, above = int((drawn <= _ZERO).sum()), int((drawn >= -_ZERO).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn)))


def _generator(seed: int, benchmark: str) -> torch.Generator:
    """A generator per benchmark; with a shared seed, benchmarks of equal size would get the same resamples."""
    digest = hashlib.sha256(f"{seed} {benchmark}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _check_problems(values: Mapping[str, Tensor], resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; give at least 1, preferably {RESAMPLES}")
    if not values:
        raise ValueError("there is no benchmark to take a mean over")
    for name, rows in values.items():
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(f"{name}: found values of shape {list(rows.shape)}, expected a row per problem")
        if not rows.isfinite().all():
            raise ValueError(f"{name}: some values are not finite, so their mean is undefined")
    if len({rows.shape[1] for rows in values.values()}) > 1:
        raise ValueError(f"the benchmarks {', '.join(values)} have different numbers of columns")


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t_{n-1}·s/√n over n runs, where s is the sample standard deviation; the ends are NaN for one run.

    Raises:
        ValueError: there are no values, one is not finite, or `confidence` is not between 0 and 1.
    """
    _check_runs(values, confidence)
    mean, error = _mean_and_error(values)
    if math.isnan(error):
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
        The difference; None with fewer than two common seeds. If all differences are equal, p is 1 when they are 0 and
        0 otherwise.

    Raises:
        ValueError: a value is not finite, or `confidence` is not between 0 and 1.
    """
    seeds = sorted({*first} & {*second})
    if len(seeds) < 2:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    interval = t_interval(values, confidence)
    _, error = _mean_and_error(values)
    if error == 0:
        return Difference(interval, 1.0 if interval.value == 0 else 0.0)
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
