"""Several rewards, exactly: the expected gradient of `gdpo` is that of its formula, and normalising each is linear."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

import algorithms
from upge.errors import ConfigError
from upge.theory.enumerate import Setting, SoftmaxPolicy, expectation

POLICY = SoftmaxPolicy.random(3, 2, seed=4)
SMALL = SoftmaxPolicy.random(2, 2, seed=5, end=None)
#: Name → (weight, reward): whether the sum of the tokens is right, which few responses reach, and their length.
REWARDS = {
    "correct": (1.0, lambda tokens: float(sum(tokens) % 3 == 0)),
    "short": (0.4, lambda tokens: 1.0 - 0.3 * len(tokens) + 0.2 * (tokens[0] == 1)),
}


def setting(policy: SoftmaxPolicy) -> Setting:
    def total(tokens: tuple[int, ...]) -> float:
        return sum(weight * one(tokens) for weight, one in REWARDS.values())

    return Setting(policy, total, named_rewards=REWARDS)


def normalised(values: list[float], epsilon: float) -> list[float]:
    """(x - mean)/(std + ε), std unbiased; 0 where all are equal."""
    if len(set(values)) < 2:
        return [0.0] * len(values)
    return [(x - statistics.fmean(values)) / (statistics.stdev(values) + epsilon) for x in values]


def advantages(questions: list[list[tuple[int, ...]]]) -> list[list[float]]:
    """Â of each response of each question, as the paper writes it."""
    summed = [
        [
            sum(parts)
            for parts in zip(
                *([w * a for a in normalised([r(y) for y in one], 1e-6)] for w, r in REWARDS.values()), strict=True
            )
        ]
        for one in questions
    ]
    every = list(itertools.chain(*summed))
    mean, variance = statistics.fmean(every), statistics.variance(every)
    return [[(a - mean) / math.sqrt(variance + 1e-8) for a in one] for one in summed]


def written(policy: SoftmaxPolicy, group_size: int, questions: int) -> Tensor:
    """[P, V] Σ over all draws, in order, of their probability times (1/Q) Σ_q (1/n) Σ_τ (1/|τ|) Σ_t Â·∇log π."""
    space, chances = policy.responses.lists(), policy.probabilities.tolist()
    means = [policy.token_scores[y, : len(one)].mean(dim=0) for y, one in enumerate(space)]
    total = torch.zeros_like(policy.logits)
    for drawn in itertools.product(range(len(space)), repeat=group_size * questions):
        batch = [list(drawn[q * group_size : (q + 1) * group_size]) for q in range(questions)]
        chance = math.prod(chances[y] for y in drawn)
        for members, own in zip(batch, advantages([[space[y] for y in one] for one in batch]), strict=True):
            for y, a in zip(members, own, strict=True):
                total = total + chance * a * means[y] / (group_size * questions)
    return total.detach()


@pytest.mark.parametrize(("policy", "group_size", "questions"), [(POLICY, 3, 1), (SMALL, 2, 2)], ids=["one", "two"])
def test_gdpo_climbs_what_its_formula_says(policy, group_size, questions):
    """One prompt whose responses have different lengths, and two groups that are whitened together."""
    found = expectation(algorithms.load("gdpo"), setting(policy), group_size=group_size, questions=questions)
    assert torch.allclose(found.mean, written(policy, group_size, questions), rtol=0, atol=1e-10)
    assert float(found.mean.norm()) > 0.05


def test_without_whitening_each_reward_adds_the_gradient_of_grpo():
    alone = "{_target_: upge.RewardDecoupled, advantage: {_target_: upge.GroupRelative}}"
    plain = algorithms.load("gdpo", [f"terms.rl.estimator.advantage={alone}"])
    grpo = algorithms.load("grpo")
    expected = sum(
        weight * expectation(grpo, Setting(POLICY, one), group_size=3).mean for weight, one in REWARDS.values()
    )
    found = expectation(plain, setting(POLICY), group_size=3).mean
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    of_sum = expectation(grpo, setting(POLICY), group_size=3).mean
    assert float((of_sum - found).norm()) > 0.01, "normalising the sum is another objective"


def test_the_reward_is_the_weighted_sum():
    with pytest.raises(ConfigError, match="reward: it is not the weighted sum of correct, short; give this sum"):
        Setting(POLICY, REWARDS["correct"][1], named_rewards=REWARDS)
