"""Whose tokens a regularizer penalises, and over how many it averages: by hand, for each source."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import upge
from tests.literal import trajectories

#: Source → the weight of each of four tokens: two and one of two rollouts, one of a demonstration between them.
EXPECTED = {
    "rollouts": [[1 / 3, 1 / 3], [0.0, 0.0], [1 / 3, 0.0]],
    "demonstrations": [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
    "all": [[1 / 4, 1 / 4], [1 / 4, 0.0], [1 / 4, 0.0]],
}


def algorithm(regularizer: upge.Regularizer, demonstrations: bool = True) -> upge.Algorithm:
    """Rollouts and demonstrations with an advantage of 0, so that only the regularizer has a gradient."""
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), upge.ConstantAdvantage(0.0))
    sources = ("rollouts", "demonstrations") if demonstrations else ("rollouts",)
    terms = {source: upge.Term(source, upge.ConstantGate(), estimator, upge.TokenMean()) for source in sources}
    return upge.Algorithm("test", terms, {"penalty": regularizer})


def gradient(one: upge.Algorithm, column: str) -> torch.Tensor:
    """[B, T] the derivative of the loss by the entropies or the log-probs."""
    batch = trajectories(
        [[0.5, 0.25], [0.5], [0.125]],
        p_reference=[[0.5] * 2, [0.5], [0.5]],
        demonstrations=[1],
        group=[0, 0, 0],
        entropies=[[0.3, 0.4], [0.5], [0.6]],
    )
    leaf = getattr(batch, column).clone().requires_grad_()
    one.estimate(dataclasses.replace(batch, **{column: leaf})).loss.backward()
    return leaf.grad


@pytest.mark.parametrize("source", EXPECTED)
def test_an_entropy_bonus_acts_on_its_source_alone(source):
    """Coefficient 0.5: the loss has -0.5·w·H, where w is one over the source's tokens."""
    bonus = upge.EntropyBonus(coefficient=0.5, reduction=upge.TokenMean(), source=source)
    expected = -0.5 * torch.tensor(EXPECTED[source], dtype=torch.float64)
    assert torch.allclose(gradient(algorithm(bonus), "entropies"), expected, atol=1e-12)


def test_an_entropy_bonus_leaves_demonstrations_alone_unless_asked():
    bonus = upge.EntropyBonus(coefficient=0.5, reduction=upge.TokenMean())
    expected = -0.5 * torch.tensor(EXPECTED["rollouts"], dtype=torch.float64)
    assert torch.allclose(gradient(algorithm(bonus), "entropies"), expected, atol=1e-12)


@pytest.mark.parametrize("source", EXPECTED)
def test_a_kl_penalty_acts_on_its_source_alone(source):
    """k2: d²/2 with d = log π_0 - log π_θ, whose derivative by log π_θ is -d."""
    penalty = upge.KLPenalty(coefficient=2.0, reduction=upge.TokenMean(), kind="k2", source=source)
    ratio = torch.tensor([[1.0, 2.0], [1.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    expected = -2.0 * torch.tensor(EXPECTED[source], dtype=torch.float64) * ratio.log()
    assert torch.allclose(gradient(algorithm(penalty), "logprobs"), expected, atol=1e-12)


def test_a_regularizer_counts_only_trajectories_of_some_term():
    """Without a term on demonstrations, "all" is the rollouts."""
    bonus = upge.EntropyBonus(coefficient=0.5, reduction=upge.TokenMean(), source="all")
    expected = -0.5 * torch.tensor(EXPECTED["rollouts"], dtype=torch.float64)
    assert torch.allclose(gradient(algorithm(bonus, demonstrations=False), "entropies"), expected, atol=1e-12)
