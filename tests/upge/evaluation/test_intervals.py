"""Intervals over problems and the paired test against scipy, textbook formulas and their own claims."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from upge.evaluation.intervals import Interval, holm, intervals, paired


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def ends_of(one: Interval) -> tuple[float, float, float]:
    return one.value, one.low, one.high


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Intervals of one mean.


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("right", "problems"), [(0, 1), (1, 1), (8, 8), (0, 30), (1, 30), (7, 10), (250, 500)])
def test_counted_values_have_wilsons_interval(right, problems, confidence):
    (actual,) = intervals({"b": column(*[1.0] * right, *[0.0] * (problems - right))}, confidence)
    expected = stats.binomtest(right, problems).proportion_ci(confidence, "wilson")
    assert ends_of(actual) == pytest.approx((right / problems, expected.low, expected.high), abs=1e-12)


def test_all_right_is_no_proof():
    (actual,) = intervals({"b": column(*[1.0] * 8)})
    assert actual.high == 1 and actual.low == pytest.approx(8 / (8 + 1.959964**2))
    for value in (0.3, 1.0):
        (alone,) = intervals({"b": column(value)})
        assert alone.low < 0.25 and alone.high > 0.85, "one problem tells hardly anything"


def test_shares_are_worth_more_problems_than_they_are():
    """By hand: four problems at 0.25, 0.5, 0.5 and 0.75 have m(1 - m) = 0.25 and s² = (0.125 + 0.25)/4."""
    n, q2 = 4 * 0.25 / (0.375 / 4), 3.1824463**2
    half = math.sqrt(q2 * 0.25 / n + q2**2 / 4 / n**2) / (1 + q2 / n)
    (actual,) = intervals({"b": column(0.25, 0.5, 0.5, 0.75)})
    assert ends_of(actual) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_it_agrees_with_the_normal_approximation():
    values = torch.rand(1500, 1, generator=draw(0), dtype=torch.float64)
    error = values.std().item() / math.sqrt(1500)
    interval = intervals({"b": values})[0]
    assert interval.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.06 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.06 * error)


# Several benchmarks, several columns.


def test_the_ends_of_an_average_are_those_of_its_benchmarks():
    values = {"a": torch.rand(10, 1, generator=draw(2)), "b": column(*[1.0] * 5), "c": column(0, 1)}
    parts = [intervals({name: rows})[0] for name, rows in values.items()]
    (actual,) = intervals(values)
    assert actual.value == pytest.approx(sum(part.value for part in parts) / 3)
    assert actual.low == pytest.approx(actual.value - math.hypot(*(part.value - part.low for part in parts)) / 3)
    assert actual.high == pytest.approx(actual.value + math.hypot(*(part.high - part.value for part in parts)) / 3)


def test_columns_do_not_touch_each_other():
    values = torch.cat([torch.rand(9, 1, generator=draw(3)), column(*[1.0] * 9), column(*[0.0] * 8, 1)], dim=1).double()
    assert intervals({"b": values}) == tuple(intervals({"b": part})[0] for part in values.split(1, dim=1))


# What must not matter, and what must.


def test_order_does_not_matter():
    rows = torch.rand(40, 3, generator=draw(5), dtype=torch.float64)
    shuffled = rows[torch.randperm(40, generator=draw(6))]
    assert intervals({"a": rows, "b": rows[:20]}) == intervals({"b": rows[:20], "a": shuffled})


# Two runs on the same problems.


def as_run(values: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"b": {str(index): row for index, row in enumerate(values)}}


def test_it_is_the_paired_t_test():
    """Also where both runs share most of the variance: hard problems are hard for both."""
    easiness = 0.8 * torch.rand(20, 1, generator=draw(7), dtype=torch.float64)
    first = easiness + 0.05 + 0.1 * torch.rand(20, 1, generator=draw(8), dtype=torch.float64)
    (actual,) = paired(as_run(first), as_run(easiness)).columns
    expected = stats.ttest_rel(first.flatten().numpy(), easiness.flatten().numpy())
    ends = expected.confidence_interval(0.95)
    assert actual.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert ends_of(actual.interval) == pytest.approx((float((first - easiness).mean()), ends.low, ends.high))
    (apart,) = intervals({"b": easiness})
    assert actual.interval.high - actual.interval.low < (apart.high - apart.low) / 4


def test_an_average_has_the_degrees_of_freedom_of_welch():
    """The mean of two benchmarks' differences is half of the difference between one and the other turned around."""
    a, b = (0.5 * torch.rand(size, 1, generator=draw(size), dtype=torch.float64) for size in (6, 15))
    zero = {name: {str(i): torch.zeros(1) for i in range(len(rows))} for name, rows in (("a", a), ("b", b))}
    runs = {name: {str(i): row for i, row in enumerate(rows)} for name, rows in (("a", a), ("b", b))}
    (actual,) = paired(runs, zero).columns
    expected = stats.ttest_ind(a.flatten().numpy(), -b.flatten().numpy(), equal_var=False)
    assert actual.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert actual.interval.low == pytest.approx(expected.confidence_interval(0.95).low / 2)


def test_no_difference_has_p_1_and_an_interval():
    """At most about 3 in 100 further problems differ if none of 100 did."""
    rows = torch.rand(100, 2, generator=draw(9), dtype=torch.float64)
    for actual in paired(as_run(rows), as_run(rows)).columns:
        assert actual.p_value == 1 and actual.interval.value == 0
        assert 0.03 < actual.interval.high < 0.04 and actual.interval.low == -actual.interval.high


def test_equal_differences_do_not_prove_one():
    """The p of a sign test on P problems that all have the same sign is 2^(1 - P), a lower bound."""
    for problems in (1, 2, 4, 8):
        (actual,) = paired(as_run(column(*[1.0] * problems)), as_run(column(*[0.0] * problems))).columns
        assert 2.0 ** (1 - problems) <= actual.p_value + 0.6 * (problems < 3) < 1.2
        assert actual.interval.low < 1 and actual.interval.high == 1


def test_equal_on_paper_is_equal():
    """Thirds that cancel leave 1e-17 or so; that is no difference in either direction."""
    third = 1 / 3
    first = as_run(column(third, third, third, 1.0))
    second = as_run(column(1 - 2 * third, 1 - third - third, third, 1.0))
    assert paired(first, second).columns[0].p_value == 1.0


def test_swapping_the_runs_turns_the_sign():
    first, second = (as_run(torch.rand(15, 1, generator=draw(seed), dtype=torch.float64)) for seed in (10, 11))
    one, other = paired(first, second).columns[0], paired(second, first).columns[0]
    assert ends_of(one.interval) == pytest.approx((-other.interval.value, -other.interval.high, -other.interval.low))
    assert one.p_value == pytest.approx(other.p_value)


def test_problems_of_one_run_alone_are_reported():
    one = torch.ones(1, dtype=torch.float64)
    first = {"a": {"1": one, "2": one, "9": one}, "only": {"1": one}}
    second = {"a": {"2": 0 * one, "1": one, "3": one}}
    actual = paired(first, second)
    assert actual.problems == 2 and actual.columns[0].interval.value == 0.5
    assert actual.only_first == (("a", "9"), ("only", "1")) and actual.only_second == (("a", "3"),)
    with pytest.raises(ValueError, match="no problem in common"):
        paired({"a": {"1": one}}, {"b": {"1": one}})


def test_benchmarks_weigh_the_same_in_a_difference():
    one = torch.ones(1, dtype=torch.float64)
    first = {"large": {str(i): 0 * one for i in range(9)}, "small": {"0": one}}
    second = {name: {id: 0 * one for id in rows} for name, rows in first.items()}
    assert paired(first, second).columns[0].interval.value == 0.5


# Many tests at once.


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.7]) == (1.0, 1.0)
    assert holm([0.01, math.nan, 0.04]) == pytest.approx((0.02, math.nan, 0.04), nan_ok=True)
    assert holm([]) == () and holm([0.2]) == (0.2,)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no benchmark"):
        intervals({})
    with pytest.raises(ValueError, match="b: found values of shape \\[0, 1\\]"):
        intervals({"b": torch.zeros(0, 1)})
    with pytest.raises(ValueError, match="b: found the value nan; give shares"):
        intervals({"b": column(1.0, math.nan)})
    with pytest.raises(ValueError, match="different numbers of columns"):
        intervals({"a": torch.zeros(2, 1), "b": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="confidence is 95"):
        intervals({"b": column(1.0)}, confidence=95)
