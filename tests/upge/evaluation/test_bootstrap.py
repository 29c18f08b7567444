"""Bootstrap intervals against enumeration, formulas and simulated truth; the paired test against its own claims."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from upge.evaluation.intervals import Interval, holm, intervals, paired, replicates
from upge.evaluation.scores import pass_at_k


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Intervals of one mean.


def test_resamples_are_those_of_enumeration():
    """Three problems: the 27 equally likely resamples give each mean as often as it comes, and its percentiles."""
    values = (0.0, 0.25, 1.0)
    exact = Counter(sum(draws) / 3 for draws in product(values, repeat=3))
    resamples = 40_000
    drawn = replicates({"b": column(*values)}, resamples)[:, 0]
    for mean, ways in exact.items():
        share, expected = (drawn - mean).abs().lt(1e-12).double().mean().item(), ways / 27
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / resamples))
    assert sum(exact.values()) == 27
    # 1/27 lies below 0.05 and above 0.025: all zeros and all ones are the ends of the 95 % interval, not of the 90 %.
    assert intervals({"b": column(*values)}) == (Interval(pytest.approx(5 / 12), 0.0, 1.0),)
    narrower = intervals({"b": column(*values)}, confidence=0.9)[0]
    assert narrower.low == pytest.approx(0.25 / 3) and narrower.high == pytest.approx(0.75)


def test_one_problem_and_equal_problems_have_no_width():
    assert intervals({"b": column(0.3)}) == (Interval(0.3, 0.3, 0.3),)
    assert intervals({"b": column(*[1.0] * 50)}) == (Interval(1.0, 1.0, 1.0),)


def test_it_agrees_with_the_normal_approximation():
    values = torch.rand(1500, 1, generator=draw(0), dtype=torch.float64)
    error = values.std().item() / math.sqrt(1500)
    interval = intervals({"b": values})[0]
    assert interval.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.06 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.06 * error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 sets of 80 problems with success rates that differ between problems, 4 samples each; the truth is 0.4."""
    covered, generator = 0, draw(1)
    for _ in range(400):
        rates = torch.rand(80, generator=generator, dtype=torch.float64) * 0.8
        solved = torch.rand(80, 4, generator=generator, dtype=torch.float64) < rates.unsqueeze(1)
        interval = intervals({"b": solved.double().mean(dim=1, keepdim=True)}, resamples=500)[0]
        covered += interval.low <= 0.4 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


# Several benchmarks, several columns.


def test_an_average_over_benchmarks_resamples_within_each():
    """Its variance is the sum of each mean's variance by the squared number of benchmarks, however unequal they are."""
    values = {"a": torch.rand(10, 1, generator=draw(2)), "b": torch.rand(10, 1, generator=draw(3)), "c": column(0, 1)}
    drawn = replicates(values, 40_000)[:, 0]
    expected = sum(rows.double().var(correction=0).item() / len(rows) for rows in values.values()) / 9
    assert drawn.var().item() == pytest.approx(expected, rel=0.03)
    assert intervals(values)[0].value == pytest.approx(sum(rows.double().mean().item() for rows in values.values()) / 3)


def test_benchmarks_of_one_size_are_not_resampled_in_step():
    rows = torch.rand(30, 1, generator=draw(4))
    both, alone = replicates({"x": rows, "y": rows}), replicates({"x": rows})
    assert both.var().item() == pytest.approx(alone.var().item() / 2, rel=0.1)


def test_a_curve_is_resampled_as_a_whole():
    """Every resampled pass@k curve is itself one: it rises with k, which columns resampled apart would not do."""
    correct = torch.tensor([0, 1, 3, 8, 8, 0, 2, 5, 1, 0])
    curve = pass_at_k(torch.full((10,), 8), correct, [1, 2, 4, 8])
    drawn = replicates({"b": curve}, 2000)
    assert (drawn.diff(dim=1) >= -1e-12).all()
    actual = intervals({"b": curve})
    assert [one.value for one in actual] == pytest.approx(curve.mean(dim=0).tolist())
    # The last column is whether any is correct: a share of 7 in 10, whose resamples are binomial.
    assert actual[-1] == Interval(pytest.approx(0.7), pytest.approx(0.4), pytest.approx(1.0))


# What must not matter, and what must.


def test_order_does_not_matter_and_the_seed_does():
    rows = torch.rand(40, 3, generator=draw(5), dtype=torch.float64)
    shuffled = rows[torch.randperm(40, generator=draw(6))]
    values = {"a": rows, "b": rows[:20]}
    actual = intervals(values, 500, seed=3)
    assert actual == intervals({"b": rows[:20], "a": shuffled}, 500, seed=3)
    assert actual == intervals(values, 500, seed=3)
    assert actual != intervals(values, 500, seed=4)


def test_a_large_comparison_fits_in_memory():
    """1500 problems × 10,000 resamples × 12 columns would be 1.4 GB for the indices' values of one column alone."""
    program = """
import resource, torch
from upge.evaluation.intervals import intervals
intervals({"b": torch.rand(4, 1)}, 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(intervals({"b": torch.rand(1500, 12)})) == 12
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert resource.RUSAGE_SELF == 0 and float(done.stdout) < 200


# Two runs on the same problems.


def as_run(values: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"b": {str(index): row for index, row in enumerate(values)}}


def test_pairing_removes_what_both_share():
    """Hard problems are hard for both runs: the difference is known far better than either mean."""
    easiness = torch.rand(200, 1, generator=draw(7), dtype=torch.float64)
    noise = 0.05 * torch.randn(200, 1, generator=draw(8), dtype=torch.float64)
    actual = paired(as_run(easiness + 0.05 + noise), as_run(easiness)).columns[0]
    error = noise.std().item() / math.sqrt(200)
    assert actual.interval.value == pytest.approx(0.05 + noise.mean().item())
    assert actual.interval.high - actual.interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert actual.p_value == pytest.approx(2 / 10_001)
    apart = intervals({"b": easiness})[0]
    assert actual.interval.high - actual.interval.low < (apart.high - apart.low) / 4


def test_the_p_value_is_that_of_enumeration():
    """Differences 1, 1, −1: 1 of 27 resamples is −3, and 7 are at or below 0: p = 14/27."""
    first, second = as_run(column(1, 1, 0)), as_run(column(0, 0, 1))
    actual = paired(first, second, resamples=40_000).columns[0]
    assert actual.p_value == pytest.approx(14 / 27, abs=0.01)
    assert (actual.interval.low, actual.interval.high) == (-1.0, 1.0)


def test_no_difference_has_p_1():
    rows = torch.rand(30, 2, generator=draw(9), dtype=torch.float64)
    for actual in paired(as_run(rows), as_run(rows), 200).columns:
        assert actual.p_value == 1.0 and actual.interval == Interval(0.0, 0.0, 0.0)


def test_equal_on_paper_is_equal():
    """Thirds that cancel leave 1e-17 or so; that is no difference in either direction."""
    third = 1 / 3
    first = as_run(column(third, third, third, 1.0))
    second = as_run(column(1 - 2 * third, 1 - third - third, third, 1.0))
    assert paired(first, second, 300).columns[0].p_value == 1.0


def test_swapping_the_runs_turns_the_sign():
    first, second = (as_run(torch.rand(15, 1, generator=draw(seed), dtype=torch.float64)) for seed in (10, 11))
    one, other = paired(first, second).columns[0], paired(second, first).columns[0]
    assert one.interval.value == pytest.approx(-other.interval.value)
    assert one.interval.low == pytest.approx(-other.interval.high, abs=0.02)
    assert one.p_value == pytest.approx(other.p_value, abs=0.05)


def test_a_false_alarm_is_as_rare_as_it_says():
    """400 pairs of runs with equal rates: about 5 % have p below 0.05, and then the interval leaves out 0."""
    alarms, generator = 0, draw(12)
    for _ in range(400):
        first, second = (torch.rand(60, 4, generator=generator) < 0.5 for _ in range(2))
        values = [as_run(run.double().mean(dim=1, keepdim=True)) for run in (first, second)]
        actual = paired(*values, resamples=500).columns[0]
        alarms += actual.p_value < 0.05
        outside = actual.interval.low > 0 or actual.interval.high < 0
        assert not outside or actual.p_value < 0.06
    assert 0.02 <= alarms / 400 <= 0.09


def test_problems_of_one_run_alone_are_reported():
    one = torch.ones(1, dtype=torch.float64)
    first = {"a": {"1": one, "2": one, "9": one}, "only": {"1": one}}
    second = {"a": {"2": 0 * one, "1": one, "3": one}}
    actual = paired(first, second, 100)
    assert actual.problems == 2 and actual.columns[0].interval.value == 0.5
    assert actual.only_first == (("a", "9"), ("only", "1")) and actual.only_second == (("a", "3"),)
    with pytest.raises(ValueError, match="no problem in common"):
        paired({"a": {"1": one}}, {"b": {"1": one}})


def test_benchmarks_weigh_the_same_in_a_difference():
    one = torch.ones(1, dtype=torch.float64)
    first = {"large": {str(i): 0 * one for i in range(9)}, "small": {"0": one}}
    second = {name: {id: 0 * one for id in rows} for name, rows in first.items()}
    assert paired(first, second, 100).columns[0].interval.value == 0.5


# Many tests at once.


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.7]) == (1.0, 1.0)
    assert holm([]) == () and holm([0.2]) == (0.2,)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="resamples is 0"):
        intervals({"b": column(1.0)}, resamples=0)
    with pytest.raises(ValueError, match="no benchmark"):
        intervals({})
    with pytest.raises(ValueError, match="b: found values of shape \\[0, 1\\]"):
        intervals({"b": torch.zeros(0, 1)})
    with pytest.raises(ValueError, match="b: some values are not finite"):
        intervals({"b": column(1.0, math.nan)})
    with pytest.raises(ValueError, match="different numbers of columns"):
        intervals({"a": torch.zeros(2, 1), "b": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="confidence is 95"):
        intervals({"b": column(1.0)}, confidence=95)
