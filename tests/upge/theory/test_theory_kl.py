"""KL penalties to a reference policy, told apart by exact expectations: k1, k2, k3, in the loss and in the reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import upge
from tests.upge.theory.test_theory_enumerate import EXACT, NOTHING, PER_TOKEN, SPACES, algorithm, reward
from upge.theory import enumerate as theory
from upge.theory.enumerate import Setting, expectation


def kl_mean(policy, kind, place, behavior=None):
    """The expected descent direction of a KL penalty with coefficient 1: to be compared with gradients of KLs."""
    extra, advantage = {}, NOTHING
    if place == "loss":
        extra["kl"] = upge.KLPenalty(coefficient=1.0, reduction=PER_TOKEN, kind=kind)
    else:
        advantage = upge.KLShaped(NOTHING, coefficient=1.0, kind=kind, future=place == "future")
    setting = Setting(
        policy, torch.zeros(len(policy.responses)), behavior=behavior, reference=policy.moved(0.6, seed=9)
    )
    return -expectation(algorithm(advantage, **extra), setting, group_size=1).mean


def off(actual, exact):
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_kl_penalties_are_told_apart(policy):
    reference, one_step = policy.moved(0.6, seed=9), policy.horizon == 1
    reverse, forward = theory.reverse_kl_gradient(policy, reference), theory.forward_kl_gradient(policy, reference)
    assert float(kl_mean(policy, "k1", "loss").norm()) < EXACT
    assert off(kl_mean(policy, "k1", "future"), reverse) < EXACT
    # Token by token, and so exact for one token: k2 in the loss and k1 in the reward are the same thing.
    assert off(kl_mean(policy, "k2", "loss"), kl_mean(policy, "k1", "own")) < EXACT
    for kind, place, exact in (("k2", "loss", reverse), ("k1", "own", reverse), ("k3", "loss", forward)):
        distance = off(kl_mean(policy, kind, place), exact)
        assert (distance < EXACT) if one_step else (distance > 0.01)
    assert off(kl_mean(policy, "k3", "loss"), reverse) > 0.01
    if one_step:
        assert torch.allclose(kl_mean(policy, "k3", "own"), reverse - forward, rtol=0, atol=EXACT)
    assert all(off(kl_mean(policy, kind, "future"), reverse) > 0.5 for kind in ("k2", "k3"))
    elsewhere = policy.moved(0.5, seed=3)
    assert float(kl_mean(policy, "k1", "loss", elsewhere).norm()) > 0.01
    assert all(off(kl_mean(policy, k, "loss", elsewhere), reverse) > 0.01 for k in ("k2", "k3"))


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_k1_under_a_token_mean_has_a_gradient_where_lengths_differ(policy):
    """It points away from short responses, and not to the reference policy."""
    setting = Setting(policy, torch.zeros(len(policy.responses)), reference=policy.moved(0.6, seed=9))
    penalty = {"kl": upge.KLPenalty(coefficient=1.0, reduction=upge.TokenMean(), kind="k1")}
    mean = expectation(algorithm(NOTHING, **penalty), setting, group_size=2).mean
    lengths = torch.tensor([len(tokens) for tokens in policy.responses.lists()], dtype=torch.float64)
    if lengths.unique().numel() == 1:
        assert float(mean.norm()) < EXACT
    else:
        longer = theory.exact_gradient(policy, lengths)
        assert torch.nn.functional.cosine_similarity(mean.flatten(), longer.flatten(), dim=0) > 0.3
        other = replace(setting, reference=policy.moved(0.6, seed=1))
        assert torch.allclose(mean, expectation(algorithm(NOTHING, **penalty), other, group_size=2).mean, atol=EXACT)


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_kl_in_the_reward_over_time(policy):
    """GAE with λ = 1 over rewards with a k1 penalty: the exact gradient of E[R] - c·KL, whatever the critic says."""
    rewards, reference = reward(policy, binary=False), policy.moved(0.6, seed=9)
    values = torch.linspace(-1, 1, policy.responses.prefixes, dtype=torch.float64)
    paid = upge.KLPenalizedReward(upge.OutcomeReward(), coefficient=0.3, kind="k1")
    setting = Setting(policy, rewards, reference=reference, values=values)
    target = setting.objectives["reward"] + 0.3 * setting.objectives["proximity"]
    for advantage in (upge.GAE(discount=1.0, lam=1.0, reward=paid), upge.ReturnToGo(discount=1.0, reward=paid)):
        assert expectation(algorithm(advantage), setting, group_size=1, target=target).relative_bias < EXACT
