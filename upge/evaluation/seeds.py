"""How sure a mean over training runs is: Student's t over seeds, and the paired test of two algorithms.

What varies is everything that the seed decides (data, order, sampling); the evaluation's problems are the same for all
runs, so how much other problems would change a figure is not in these intervals (`bootstrap` has that).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from upge.evaluation.bootstrap import CONFIDENCE, Difference, Interval
from upge.student import quantile, two_sided


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t_{n-1}·s/√n of n runs, s the standard deviation with n - 1; the ends are NaN for one run.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    _check(values, confidence)
    mean, error = _mean_and_error(values)
    if math.isnan(error):
        return Interval(mean, math.nan, math.nan)
    half = quantile((1 + confidence) / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half)


def paired_t(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """The paired t-test of first - second over the seeds that both have: what a seed does to both cancels.

        t = d̄/(s_d/√n),  p = P(|T_{n-1}| ≥ |t|)

    Returns:
        None where they have fewer than two seeds in common. Without any spread p is 1 for no difference and else 0.

    Raises:
        ValueError: a value that is not finite.
    """
    seeds = sorted({*first} & {*second})
    if len(seeds) < 2:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    interval = t_interval(values, confidence)
    _, error = _mean_and_error(values)
    if error == 0:
        return Difference(interval, 1.0 if interval.value == 0 else 0.0)
    return Difference(interval, two_sided(interval.value / error, len(values) - 1))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _check(values: Sequence[float], confidence: float) -> None:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"found {list(values)}; a mean over runs needs one finite value at least, and no other")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
