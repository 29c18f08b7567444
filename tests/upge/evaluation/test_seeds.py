"""Means over seeds: Student's t against tables, against enumeration, and what has no interval."""

import math
import random
import statistics

import pytest

from upge.evaluation.intervals import paired_t, t_interval

#: (degrees of freedom, the value that two-sided 5 % lie beyond), from any printed table.
TABLE = [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]


@pytest.mark.parametrize(("degrees", "value"), TABLE)
def test_half_widths_are_those_of_the_tables(degrees, value):
    values = [float(i) for i in range(degrees + 1)]
    actual = t_interval(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert (actual.high - actual.value) / error == pytest.approx(value, abs=6e-4)
    assert actual.value - actual.low == pytest.approx(actual.high - actual.value)


def test_with_two_degrees_of_freedom_p_values_have_a_closed_form():
    for t in (0.3, 1.0, 4.0):
        differences = [t - math.sqrt(3), t, t + math.sqrt(3)]  # mean t and error 1
        actual = paired_t(dict(enumerate(differences)), dict.fromkeys(range(3), 0.0))
        assert actual.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_an_interval_worked_out_by_hand():
    actual = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (actual.value, actual.low, actual.high) == pytest.approx((3.0, 3 - half, 3 + half))


def test_it_covers_the_mean_of_normal_values_as_often_as_it_says():
    rng, hits, rounds = random.Random(0), 0, 2000
    for _ in range(rounds):
        actual = t_interval([rng.gauss(1.0, 2.0) for _ in range(5)])
        hits += actual.low <= 1.0 <= actual.high
    # Four standard errors of a share of 0.95.
    assert abs(hits / rounds - 0.95) < 4 * math.sqrt(0.95 * 0.05 / rounds)


def test_pairing_removes_what_a_seed_does_to_both():
    base = {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.3}
    better = {seed: value + 0.05 + 0.001 * seed for seed, value in base.items()} | {9: 1.0}
    actual = paired_t(better, base)
    assert actual.p_value < 0.001 and actual.interval.value == pytest.approx(0.0515)
    assert actual.interval.low > 0.048


def test_a_test_needs_three_common_seeds():
    assert paired_t({0: 1.0, 1: 2.0, 2: 3.5}, {1: 2.0, 2: 3.0, 3: 4.0}) is None
    assert paired_t({0: 1.0, 1: 2.0, 2: 3.5}, {0: 0.0, 1: 2.0, 2: 3.0}) is not None
    assert math.isnan(t_interval([0.5]).low)


@pytest.mark.parametrize("value", [1.0, 0.1 + 0.2])
def test_equal_differences_have_neither_p_nor_ends(value):
    """0.1 + 0.2 and 0.3 differ by a rounding error, which is no spread."""
    actual = paired_t({0: value, 1: value, 2: 0.3 if value < 1 else 1.0}, dict.fromkeys(range(3), 0.0))
    assert actual.interval.value == pytest.approx(value)
    assert math.isnan(actual.p_value) and math.isnan(actual.interval.low) and math.isnan(actual.interval.high)


def test_values_that_are_no_numbers_are_refused():
    for values in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="at least one value"):
            t_interval(values)
