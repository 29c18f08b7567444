"""Conformance of terms and divergences that move tokens other than the sampled one (see `upge.support`)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.plan import Plan
from upge.testing import batches
from upge.testing.rules import close, require
from upge.trajectories import Trajectories
from upge.views import Distributions

#: Tokens of the vocabulary.
_VOCABULARY = 9


def check_supports(algorithm: Algorithm) -> None:
    """Check the gradient with respect to the log-probs of every token of the vocabulary.

    It must not depend on the split into micro-batches, the padding, the order of the trajectories or the blocks of
    tokens in which the output head asks for it, and must be finite for nearly deterministic distributions.

    Raises:
        ConformanceError: the first broken rule.
    """
    name, pairs = f"algorithm '{algorithm.name}'", algorithm.needs.preference_pairs
    for seed in range(2):
        batch = with_distributions(batches.random_batch(seed, pairs=pairs, rewards=algorithm.needs.rewards), seed)
        gradient = _gradient(algorithm, batch, [torch.arange(len(batch))])
        for split in batches.splits(batch, algorithm.reach, seed):
            problem = "the gradient on the vocabulary depends on the micro-batch split"
            close(name, problem, gradient, _gradient(algorithm, batch, split))
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        shuffled = _gradient(algorithm, _reordered(batch, order), [torch.arange(len(batch))])
        close(name, "the gradient on the vocabulary depends on the order", gradient[order], shuffled)
        blocks = _gradient_by_blocks(algorithm.plan(batch), batch, 5)
        close(name, "the gradient on the vocabulary depends on the head's blocks", gradient, blocks)
        outside = gradient[~batch.response_mask]
        require(bool((outside == 0).all()), f"{name}: places outside the response mask have a gradient")
    for scale in (0.0, 300.0):
        batch = with_distributions(batches.random_batch(0, pairs=pairs, rewards=algorithm.needs.rewards), 0, scale)
        extreme = _gradient(algorithm, batch, [torch.arange(len(batch))])
        problem = f"the gradient on the vocabulary is NaN or infinite for logits times {scale:g}"
        require(bool(extreme.isfinite().all()), f"{name}: {problem}")


def with_distributions(batch: Trajectories, seed: int, scale: float = 2.0) -> Trajectories:
    """The batch with random distributions of all models, whose logits have the standard deviation `scale`."""
    g = torch.Generator().manual_seed(seed)
    shape = (*batch.response_mask.shape, _VOCABULARY)
    models = [(scale * torch.randn(shape, generator=g, dtype=torch.float64)).log_softmax(dim=-1) for _ in range(3)]
    return dataclasses.replace(batch, distributions=Distributions(torch.randint(0, _VOCABULARY, shape[:2]), *models))


def _reordered(batch: Trajectories, order: Tensor) -> Trajectories:
    assert batch.distributions is not None
    return dataclasses.replace(batches.reordered(batch, order), distributions=batch.distributions.at(order))


def _gradient(algorithm: Algorithm, batch: Trajectories, split: list[Tensor]) -> Tensor:
    """[B, T, V] ∂loss/∂log π of every token, summed over micro-batches."""
    given, plan = batch.distributions, algorithm.plan(batch)
    assert given is not None and batch.logprobs is not None and batch.entropies is not None
    leaf, live = given.policy.clone().requires_grad_(), (batch.logprobs.detach(), batch.entropies.detach())
    batch = dataclasses.replace(batch, distributions=given._replace(policy=leaf))
    for rows in split:
        logprobs, entropies = (column[rows] for column in live)
        part = batch.select(rows, logprobs, entropies=entropies)
        plan.estimate(part).loss.backward()
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _gradient_by_blocks(plan: Plan, batch: Trajectories, size: int) -> Tensor:
    """The same, asked for as the output head does, for `size` tokens at a time."""
    given = batch.distributions
    assert given is not None
    at_tokens, gradient = given.at(batch.response_mask), torch.zeros_like(given.policy)
    total = torch.zeros_like(at_tokens.policy)
    estimate = plan.estimate_in_head(batch)
    for coefficients in estimate.coefficients:
        for start in range(0, len(total), size):
            block = slice(start, min(start + size, len(total)))
            candidates, k = coefficients(block, at_tokens.at(block))
            total[block] -= k if candidates is None else torch.zeros_like(total[block]).scatter_(1, candidates, k)
    gradient[batch.response_mask] = total
    return gradient
