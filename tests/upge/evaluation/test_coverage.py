"""Simulations: how often intervals hold the truth, and how often paired tests reject a true hypothesis.

A column of values is one simulated evaluation, so a call gives thousands of intervals.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta

from upge.evaluation.intervals import intervals, paired, paired_t

TRIALS = 2000
#: Four standard errors of a share of 0.95 in `TRIALS`.
SLACK = 4 * (0.95 * 0.05 / TRIALS) ** 0.5
#: Name → (the distribution of the problems' success rates, its mean): similar, all or nothing, hard, easy.
RATES = {
    "middle": (Beta(2.0, 3.0), 0.4),
    "bimodal": (Beta(0.3, 0.3), 0.5),
    "near 0": (Beta(0.5, 9.5), 0.05),
    "near 1": (Beta(9.5, 0.5), 0.95),
}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def drawn(name: str, problems: int, samples: int, trials: int = TRIALS) -> Tensor:
    """[P, trials] the share of correct samples of each problem, on problems that are new in every trial."""
    return answered(RATES[name][0].sample((problems, trials)), samples)


def answered(rates: Tensor, samples: int) -> Tensor:
    return torch.binomial(torch.full_like(rates, samples), rates).double() / samples


def coverage(values: dict[str, Tensor], truth: float) -> float:
    held = [one.low - 1e-12 <= truth <= one.high + 1e-12 for one in intervals(values)]
    return sum(held) / len(held)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("problems", [8, 16, 30, 100])
def test_intervals_cover(problems, samples, name):
    """Wilson's interval of 0/1 values oscillates around 0.95 (Brown, Cai and DasGupta 2001), so 0.92 are asked for."""
    assert coverage({"b": drawn(name, problems, samples)}, RATES[name][1]) >= 0.92


@pytest.mark.parametrize("name", RATES)
def test_the_interval_of_an_average_covers(name):
    """A benchmark of 8 problems with one sample, 30 with 16, and 100 with one."""
    values = {"a": drawn(name, 8, 1), "b": drawn(name, 30, 16), "c": drawn(name, 100, 1)}
    assert coverage(values, RATES[name][1]) >= 0.92


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("problems", [4, 8, 16, 30, 100])
def test_paired_tests_hold_their_level(problems, samples, name):
    """Two runs of the same policy."""
    rates = RATES[name][0].sample((problems, TRIALS))
    assert rejected([answered(rates, samples) for _ in range(2)]) <= 0.05 + SLACK


def test_a_paired_test_of_an_average_holds_its_level():
    rates = {key: RATES["middle"][0].sample((size, TRIALS)) for key, size in (("a", 1), ("b", 8), ("c", 60))}
    assert rejected(*[[answered(one, 4) for _ in range(2)] for one in rates.values()]) <= 0.05 + SLACK


def rejected(*pairs: list[Tensor]) -> float:
    runs = [
        {str(b): {str(i): row for i, row in enumerate(pair[side])} for b, pair in enumerate(pairs)} for side in (0, 1)
    ]
    alarms = [one.p_value < 0.05 for one in paired(*runs).columns]
    return sum(alarms) / len(alarms)


@pytest.mark.parametrize("problems", [8, 16, 30, 100])
def test_the_interval_of_a_difference_covers(problems):
    """The second run is better by 0.3 on half of the problems and equal on the others."""
    rates = RATES["middle"][0].sample((problems, TRIALS)) * 0.7
    gain = 0.3 * (torch.rand(problems, TRIALS) < 0.5)
    runs = [{"b": {str(i): row for i, row in enumerate(answered(r, 4))}} for r in (rates + gain, rates)]
    held = [one.interval.low <= 0.15 <= one.interval.high for one in paired(*runs).columns]
    assert sum(held) / TRIALS >= 0.95 - SLACK


@pytest.mark.parametrize("seeds", [3, 5])
def test_tests_over_seeds_hold_their_level(seeds):
    """Accuracies on 32 problems, whose differences are multiples of 1/32 and often equal by chance."""
    scores = torch.binomial(torch.full((2, TRIALS, seeds), 32.0), torch.tensor(0.9)).double() / 32
    runs = [[dict(enumerate(row)) for row in side.tolist()] for side in scores]
    tests = [paired_t(*pair) for pair in zip(*runs, strict=True)]
    assert sum(test is not None and test.p_value < 0.05 for test in tests) / TRIALS <= 0.05 + SLACK
