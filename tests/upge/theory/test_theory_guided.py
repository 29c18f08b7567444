"""The expected gradient of algorithms with guided rollouts, against objectives that are written out here, to 1e-10.

E[g] is over the prefix and over rollouts ~ π_θ(·|prefix). The objectives are differentiated through the table of
logits, without any part of the library.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import algorithms
import upge
from upge.theory.enumerate import Setting, SoftmaxPolicy, expectation

EXACT = 1e-10
#: Eight responses of three tokens; seven of one or two tokens.
FIXED, RAGGED = SoftmaxPolicy.random(2, 3, seed=1, end=None), SoftmaxPolicy.random(3, 2, seed=4)
#: What guided rollouts continue, with probabilities.
PREFIXES = {FIXED: {(): 0.2, (1,): 0.5, (0, 1): 0.3}, RAGGED: {(): 0.4, (2,): 0.35, (1,): 0.25}}
LENGTH = 16


def reward(policy: SoftmaxPolicy, binary: bool) -> Tensor:
    values = torch.rand(len(policy.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (values > 0.5).double() if binary else values


class Textbook:
    """The quantities of a softmax table that the objectives are made of, as functions of its logits."""

    def __init__(self, policy: SoftmaxPolicy, rewards: Tensor) -> None:
        self.logits = policy.logits.clone().requires_grad_()
        self.responses, self.rewards = policy.responses.lists(), rewards.tolist()
        self.row = {
            y[:t]: int(policy.responses.prefix[i, t]) for i, y in enumerate(self.responses) for t in range(len(y))
        }

    def logprobs(self, before: tuple[int, ...], logits: Tensor | None = None) -> Tensor:
        return (self.logits if logits is None else logits)[self.row[before]].log_softmax(dim=0)

    def continued(self, prefix: tuple[int, ...]) -> list[tuple[tuple[int, ...], float, Tensor]]:
        """(response, reward, π_θ(response|prefix)) of each response that continues the prefix."""
        n, result = len(prefix), []
        for y, r in zip(self.responses, self.rewards, strict=True):
            if y[:n] == prefix:
                logs = [self.logprobs(y[:t])[y[t]] for t in range(n, len(y))]
                result.append((y, r, torch.stack(logs).sum().exp()))
        return result

    def value(self, prefix: tuple[int, ...]) -> Tensor:
        """E[R | prefix]."""
        return torch.stack([p * r for _, r, p in self.continued(prefix)]).sum()

    def likelihoods(self, prefix: tuple[int, ...]) -> list[Tensor]:
        """log π_θ of each token of the prefix."""
        return [self.logprobs(prefix[:t])[token] for t, token in enumerate(prefix)]

    def entropy(self, before: tuple[int, ...]) -> Tensor:
        logs = self.logprobs(before)
        return -(logs.exp() * logs).sum()

    def gradient(self, objective: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(objective, self.logits)
        return slope


def normalized_slope(rate: float, n: int) -> float:
    """c with E[Σ_i Â_i ∇log π(y_i)] = c·∇P for n rollouts of rewards 0 and 1, Â = (R - mean R)/(std R + 1e-6).

    With j successes among the other n - 1, E[Â ∇log π] = Σ_j P(j)·(Â(success) - Â(failure))·∇P for each rollout.
    """

    def advantage(own: int, others: int) -> float:
        rewards = torch.tensor([own] + [1] * others + [0] * (n - 1 - others), dtype=torch.float64)
        return float((rewards[0] - rewards.mean()) / (rewards.std() + 1e-6)) if rewards.std() > 0 else 0.0

    chances = [math.comb(n - 1, j) * rate**j * (1 - rate) ** (n - 1 - j) for j in range(n)]
    return n * sum(p * (advantage(1, j) - advantage(0, j)) for j, p in enumerate(chances))


@pytest.mark.parametrize("n", [2, 3])
def test_uft(n):
    """J = E_prefix[c·E[R|prefix]/(n·m) + 0.001·(mean log π(prefix) - mean k3 + mean H)], m tokens of a continuation.

    The responses have equal lengths, so the mean over tokens is one with constant divisors. Neither the entropy's nor
    the KL's gradient passes through the probability of a rollout.
    """
    reference, rewards = FIXED.moved(0.5, seed=2), reward(FIXED, binary=True)
    book, prefixes = Textbook(FIXED, rewards), PREFIXES[FIXED]
    objective = torch.zeros((), dtype=torch.float64)
    for prefix, chance in prefixes.items():
        tokens, value = 3 - len(prefix), book.value(prefix)
        objective = objective + chance * normalized_slope(value.item(), n) * value / (n * tokens)
        if prefix:
            objective = objective + chance * 0.001 * torch.stack(book.likelihoods(prefix)).mean()
        for y, _, p in book.continued(prefix):
            for t in range(len(prefix), 3):
                ratio = book.logprobs(y[:t], reference.logits)[y[t]] - book.logprobs(y[:t])[y[t]]
                penalty = ratio.exp() - ratio - 1
                objective = objective + chance * p.item() / tokens * 0.001 * (book.entropy(y[:t]) - penalty)
    setting = Setting(FIXED, rewards, reference=reference, prefixes=prefixes)
    report = expectation(algorithms.load("uft"), setting, group_size=n)
    assert torch.allclose(report.mean, book.gradient(objective), rtol=0, atol=EXACT)
    assert report.accepted == pytest.approx(1)


@pytest.mark.parametrize(
    ("policy", "n", "guided", "binary"),
    [(FIXED, 2, 1, True), (FIXED, 3, 1, False), (RAGGED, 3, 2, False)],
    ids=["one of two", "one of three", "two of three"],
)
def test_prefix_rft(policy, n, guided, binary):
    """(n - k - 1)·∇E[R] + (k - 1)·∇E[R|prefix] + (E[R|prefix] - E[R])·Σ_top ∇log π, over n·length, mean over prefixes.

    k rollouts continue a prefix. An empty one leaves n plain rollouts. The sum is over the fifth of the prefix tokens
    with the highest entropies, rounded up, so over one token here.
    """
    rewards = reward(policy, binary)
    book, prefixes = Textbook(policy, rewards), PREFIXES[policy]
    plain, objective = book.value(()), torch.zeros((), dtype=torch.float64)
    for prefix, chance in prefixes.items():
        k = guided if prefix else 0
        value = book.value(prefix)
        terms = (n - k - 1) * plain + max(0, k - 1) * value
        if prefix:
            uncertain = max(range(len(prefix)), key=lambda t: book.entropy(prefix[:t]).item())
            terms = terms + (value - plain).detach() * book.likelihoods(prefix)[uncertain]
        objective = objective + chance * terms / (n * LENGTH)
    setting = Setting(policy, rewards, prefixes=prefixes)
    algorithm = algorithms.load("prefix_rft", [f"terms.{t}.reduction.length={LENGTH}" for t in ("rl", "prefix")])
    algorithm = dataclasses.replace(algorithm, guidance=dataclasses.replace(algorithm.guidance, rollouts=guided))
    report = expectation(algorithm, setting, group_size=n)
    assert torch.allclose(report.mean, book.gradient(objective), rtol=0, atol=EXACT)


def test_a_hint_in_the_prompt_leaves_the_gradient_of_the_rest():
    """∇E[R|hint], mean over hints: a hint's tokens have no gradient, and leave-one-out is unbiased on the others."""
    rewards, hints = reward(RAGGED, binary=False), PREFIXES[RAGGED]
    book = Textbook(RAGGED, rewards)
    guidance = upge.Guidance(upge.UniformPrefix(), in_prompt=True)
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), upge.LeaveOneOut())
    term = upge.Term("rollouts", upge.ConstantGate(), estimator, upge.SequenceMean(tokens="sum"))
    algorithm = upge.Algorithm("made here", {"rl": term}, guidance=guidance)
    report = expectation(algorithm, Setting(RAGGED, rewards, prefixes=hints))
    objective = torch.stack([chance * book.value(hint) for hint, chance in hints.items()]).sum()
    assert torch.allclose(report.mean, book.gradient(objective), rtol=0, atol=EXACT)


def test_what_is_not_a_distribution_of_prefixes_is_refused():
    rewards = reward(RAGGED, binary=True)
    with pytest.raises(upge.ConfigError, match="prefix_rft: its rollouts continue demonstrations; give `prefixes`"):
        expectation(algorithms.load("prefix_rft"), Setting(RAGGED, rewards))
    for ended in ((0,), (1, 2), (5,)):
        with pytest.raises(upge.ConfigError, match=r"prefixes: found \(.*leave at least one token"):
            Setting(RAGGED, rewards, prefixes={ended: 1.0})
    with pytest.raises(upge.ConfigError, match="prefixes: the probabilities sum to 0.9"):
        Setting(RAGGED, rewards, prefixes={(): 0.5, (1,): 0.4})
