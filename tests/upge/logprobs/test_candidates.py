"""Derivatives with respect to the log-probs of any tokens of the vocabulary, against autograd on full logits."""

from __future__ import annotations

import itertools

import pytest
import torch

from upge.logprobs import CandidateGradient, Coefficients, Output, token_loss

N, D, WIDE, V = 23, 5, 9, 11


def tensors(dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    policy = random(N, D), random(V, D), random(V) if bias else None
    with torch.no_grad():
        teacher = Output(random(N, WIDE).detach(), random(V + 3, WIDE).detach(), random(V + 3).detach())
    targets = torch.randint(0, V, (N,), generator=g)
    return policy, teacher, targets


def objective(logits, teacher, targets, temperature):
    """A loss with all three kinds of derivatives: the sampled token's, the entropy's and those of all tokens."""
    logprobs = (logits / temperature).log_softmax(-1)
    target = (teacher[:, :V] / temperature).log_softmax(-1)
    sampled = logprobs.gather(1, targets[:, None])[:, 0]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    kl = (logprobs.exp() * (logprobs - target)).sum(-1)
    top = target.topk(3).indices
    of_top = -(target.gather(1, top).exp() * logprobs.gather(1, top)).sum(-1)
    return (0.3 * sampled * torch.arange(N) + 0.2 * entropies + kl + 0.5 * of_top).sum()


def of_candidates(block, logprobs, others):
    """The reverse KL to the teacher over the vocabulary, and its cross-entropy over its three likeliest tokens."""
    teacher = others["teacher"]
    top = teacher.topk(3).indices
    assert len(logprobs) == block.stop - block.start == len(teacher)
    return [
        CandidateGradient(None, logprobs.exp() * (logprobs - teacher)),
        CandidateGradient(top, -0.5 * teacher.gather(1, top).exp()),
    ]


def coefficients(entropy):
    def function(logprobs, entropies, chunk):
        by_entropies = torch.full_like(logprobs, 0.2) if entropy else None
        values = 0.3 * torch.arange(N, dtype=logprobs.dtype)[chunk]
        return Coefficients((values * logprobs).sum(), values, by_entropies, of_candidates)

    return function


def leaves(policy):
    return [one for one in policy if one is not None]


@pytest.mark.parametrize(
    ("chunk", "temperature", "whole", "bias"),
    list(itertools.product([1, 4, 100], [1.0, 0.7], [False, True], [True, False])),
)
def test_gradients_are_those_of_full_logits(chunk, temperature, whole, bias):
    policy, teacher, targets = tensors(bias=bias)
    hidden, weight, offset = policy
    logits = hidden @ weight.t() + (0 if offset is None else offset)
    expected = torch.autograd.grad(
        objective(logits, teacher.hidden @ teacher.weight.t() + teacher.bias, targets, temperature), leaves(policy)
    )
    loss, logprobs, _ = token_loss(
        hidden,
        weight,
        targets,
        coefficients(entropy=True),
        bias=offset,
        temperature=temperature,
        entropy_gradient=True,
        candidates=True,
        others={"teacher": teacher},
        whole=whole,
        chunk_size=chunk,
    )
    for actual, right in zip(torch.autograd.grad(loss, leaves(policy)), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)
    sampled = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, sampled.detach())


def test_blocks_of_a_whole_batch_are_numbered_from_its_start():
    policy, teacher, targets = tensors()
    seen: list[int] = []

    def function(logprobs, entropies, chunk):
        def record(block, logprobs, others):
            seen.extend(range(block.start, block.stop))
            return of_candidates(block, logprobs, others)

        return Coefficients(logprobs.sum(), torch.ones_like(logprobs), None, record)

    hidden, weight, bias = policy
    common = {"bias": bias, "candidates": True, "others": {"teacher": teacher}, "chunk_size": 4}
    token_loss(hidden, weight, targets, function, whole=True, **common)
    assert seen == list(range(N))
    seen.clear()
    token_loss(hidden, weight, targets, function, whole=False, **common)
    assert seen == [row % 4 for row in range(N)], "without `whole` they are numbered within each call"


def test_half_precision_is_close():
    policy, teacher, targets = tensors()
    exact = torch.autograd.grad(
        objective(
            policy[0] @ policy[1].t() + policy[2], teacher.hidden @ teacher.weight.t() + teacher.bias, targets, 1.0
        ),
        leaves(policy),
    )
    half = [one.detach().bfloat16().requires_grad_() for one in leaves(policy)]
    other = Output(*(one.bfloat16() for one in teacher))
    loss, *_ = token_loss(
        half[0],
        half[1],
        targets,
        coefficients(entropy=True),
        bias=half[2],
        entropy_gradient=True,
        candidates=True,
        others={"teacher": other},
        chunk_size=6,
    )
    for actual, right in zip(torch.autograd.grad(loss, half), exact, strict=True):
        assert (actual.double() - right).norm() < 2e-2 * right.norm()


def test_errors():
    policy, teacher, targets = tensors()
    hidden, weight, _ = policy
    with pytest.raises(ValueError, match="has a function for other tokens"):
        token_loss(hidden, weight, targets, coefficients(entropy=False))
    small = Output(teacher.hidden, teacher.weight[: V - 1])
    with pytest.raises(ValueError, match="give a model with at least the policy's vocabulary"):
        token_loss(hidden, weight, targets, coefficients(entropy=False), candidates=True, others={"teacher": small})
    short = Output(teacher.hidden[1:], teacher.weight)
    with pytest.raises(ValueError, match="others.teacher: hidden must be"):
        token_loss(hidden, weight, targets, coefficients(entropy=False), candidates=True, others={"teacher": short})
