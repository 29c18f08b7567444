"""pass@k against its definition: all subsets counted, exact integers at full size, and what must be monotone."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from torch import Tensor

from upge.evaluation.scores import log_fail_at_k, pass_at_k, powers_of_two

TIGHT = 1e-12


def one(n: int, c: int, ks: list[int]) -> Tensor:
    return pass_at_k(torch.tensor([n]), torch.tensor([c]), ks)[0]


@pytest.mark.parametrize("n", range(1, 10))
def test_every_subset_is_counted(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            solved = sum(min(subset) < c for subset in subsets)  # responses 0 to c−1 are the correct ones
            assert one(n, c, [k]).item() == pytest.approx(solved / len(subsets), rel=1e-14, abs=0)


def test_full_size_is_exact():
    """n = 2048 and k to 1024 and beyond, against integers; both the value and what is missing to 1."""
    n = 2048
    ks = [1, 2, 3, 5, 64, 100, 512, 777, 1023, 1024, 1025, 1500, 2047, 2048]
    cs = [0, 1, 2, 3, 10, 100, 500, 1000, 1023, 1024, 1025, 1500, 2000, 2046, 2047, 2048]
    values = pass_at_k(torch.full((len(cs),), n), torch.tensor(cs), ks)
    logarithms = log_fail_at_k(torch.full((len(cs),), n), torch.tensor(cs), ks)
    tiny = 0
    for row, c in enumerate(cs):
        for column, k in enumerate(ks):
            fail = Fraction(math.comb(n - c, k), math.comb(n, k))
            value, logarithm = values[row, column].item(), logarithms[row, column].item()
            assert value == pytest.approx(float(1 - fail), rel=TIGHT, abs=0)
            if fail == 0:
                assert value == 1.0 and logarithm == -math.inf
            elif fail > Fraction(1, 10**290):
                assert math.exp(logarithm) == pytest.approx(float(fail), rel=TIGHT, abs=0)
                tiny += fail < Fraction(1, 10**100)
            else:  # below what a float can hold its logarithm is still right
                assert logarithm == pytest.approx(math.log(fail.numerator) - math.log(fail.denominator), rel=TIGHT)
                tiny += 1
    assert tiny > 5


def test_the_smallest_values_are_exact():
    """One correct response of n: pass@k = k/n, down to 1/n."""
    for n in (7, 2048, 1_000_003):
        assert one(n, 1, [1, 2, 5]).tolist() == pytest.approx([1 / n, 2 / n, 5 / n], rel=TIGHT, abs=0)


def test_more_draws_and_more_correct_responses_never_hurt():
    n = 2048
    values = pass_at_k(torch.full((n + 1,), n), torch.arange(n + 1), list(range(1, 1025)))
    assert (values.diff(dim=0) >= 0).all() and (values.diff(dim=1) >= 0).all()
    assert (values[0] == 0).all() and not values.signbit().any() and (values[-1] == 1).all()
    assert values.min() == 0 and values.max() == 1


def test_pass_at_1_is_the_share_and_pass_at_n_is_any():
    n = torch.tensor([5, 9, 32, 32])
    c = torch.tensor([0, 4, 1, 32])
    assert pass_at_k(n, c, [1])[:, 0].tolist() == pytest.approx((c.double() / n).tolist(), rel=1e-14)
    assert pass_at_k(n[2:], c[2:], [32])[:, 0].tolist() == [1.0, 1.0]


def test_problems_and_ks_do_not_influence_each_other():
    n, c = torch.tensor([8, 40, 8, 2048, 40]), torch.tensor([3, 0, 3, 17, 39])
    ks = [8, 1, 3, 3]
    together = pass_at_k(n, c, ks)
    assert together.dtype == torch.float64 and together.shape == (5, 4)
    for row in range(5):
        for column, k in enumerate(ks):
            assert together[row, column] == one(int(n[row]), int(c[row]), [k])[0]


def test_it_is_unbiased():
    """Over binomial counts its mean is 1 − (1 − p)^k, exactly: the plug-in 1 − (1 − c/n)^k misses that."""
    n, k, p = 12, 4, Fraction(1, 5)
    mean = plug_in = 0.0
    for c in range(n + 1):
        chance = float(math.comb(n, c) * p**c * (1 - p) ** (n - c))
        mean += chance * one(n, c, [k]).item()
        plug_in += chance * (1 - (1 - c / n) ** k)
    truth = float(1 - (1 - p) ** k)
    assert mean == pytest.approx(truth, rel=1e-13)
    assert abs(plug_in - truth) > 0.01


@pytest.mark.parametrize(("n", "ks"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))])
def test_powers_of_two(n, ks):
    assert powers_of_two(n) == ks


def test_bad_counts_are_named():
    n, c = torch.tensor([4, 8]), torch.tensor([1, 8])
    with pytest.raises(ValueError, match="k is 5, .* the smallest n is 4"):
        pass_at_k(n, c, [1, 5])
    with pytest.raises(ValueError, match="k is 0"):
        pass_at_k(n, c, [0])
    with pytest.raises(ValueError, match="problem 1 has 9 correct responses of 8"):
        pass_at_k(n, torch.tensor([1, 9]), [1])
    with pytest.raises(ValueError, match="problem 0 has -1 correct"):
        pass_at_k(n, torch.tensor([-1, 9]), [1])
    with pytest.raises(ValueError, match="ks is empty"):
        pass_at_k(n, c, [])
    with pytest.raises(ValueError, match="correct: found torch.float32"):
        pass_at_k(n, c.float(), [1])
    with pytest.raises(ValueError, match="no problems"):
        pass_at_k(n[:0], c[:0], [1])
    with pytest.raises(ValueError, match="2 problems and correct has 1"):
        pass_at_k(n, c[:1], [1])
    with pytest.raises(ValueError, match="n is 0"):
        powers_of_two(0)
