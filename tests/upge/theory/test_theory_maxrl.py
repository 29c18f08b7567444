"""What an advantage divided by the group's mean reward maximizes, exactly."""

from __future__ import annotations

import pytest
import torch

import upge
from tests.upge.theory.test_theory_enumerate import EXACT, RAGGED, algorithm, reward
from upge.theory import enumerate as theory
from upge.theory.enumerate import Setting, expectation


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_expected_gradient_is_that_of_a_truncated_log_likelihood(n):
    """The first n - 1 terms of log P = -Σ_k (1 - P)^k/k: their gradient is Σ_{k<n-1} (1 - P)^k·∇P."""
    rewards = reward(RAGGED)
    success, slope = float((RAGGED.probabilities * rewards).sum()), theory.exact_gradient(RAGGED, rewards)
    actual = expectation(algorithm(upge.MeanNormalized()), Setting(RAGGED, rewards), group_size=n).mean
    assert 0.1 < success < 0.9
    assert torch.allclose(actual, sum((1 - success) ** k for k in range(n - 1)) * slope, rtol=0, atol=EXACT)
    assert not torch.allclose(actual, sum((1 - success) ** k for k in range(n)) * slope, rtol=0, atol=1e-4)
