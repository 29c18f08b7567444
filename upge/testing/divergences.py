"""Conformance of divergences: the advantage must be the derivative of minus the value."""

from __future__ import annotations

import torch
from torch import Tensor

from upge.candidates import CandidateView
from upge.components.distillation import Divergence
from upge.reduction import TokenMean
from upge.regularizers import DivergencePenalty
from upge.testing import batches
from upge.testing.rules import close, require
from upge.views import Distributions

#: Tokens of the vocabulary, and the step of the central difference in the logits.
_VOCABULARY, _STEP = 9, 1e-4


def check_divergence(advantage: Divergence) -> None:
    """Check `Divergence.divergence` against the advantage, by central differences on random distributions.

    Raises:
        ConformanceError: the value is not one finite number per token, or Â/π_ref is not minus its derivative.
    """
    name, batch = type(advantage).__name__, batches.random_batch(0)
    penalty = DivergencePenalty(1.0, TokenMean(), advantage).precompute_parts(batch)
    assert isinstance(penalty, DivergencePenalty)
    tokens, g = batch.pack(), torch.Generator().manual_seed(0)
    shape = len(tokens), _VOCABULARY
    logits, direction, *others = (torch.randn(shape, dtype=torch.float64, generator=g) for _ in range(4))
    sampled = torch.randint(0, _VOCABULARY, shape[:1], generator=g)

    def view(moved: Tensor) -> CandidateView:
        given = Distributions(sampled, moved.log_softmax(-1), *(other.log_softmax(-1) for other in others))
        return CandidateView.of(tokens, given, None)

    value = penalty(view(logits))
    require(value.shape == shape[:1], f"{name}.divergence returns {list(value.shape)} for {shape[0]} tokens")
    require(bool(value.isfinite().all()), f"{name}.divergence returns NaN or infinity on well-formed distributions")
    require(not value.requires_grad, f"{name}.divergence lets a gradient through; return `.detach()` of what it reads")
    slope = (penalty(view(logits + _STEP * direction)) - penalty(view(logits - _STEP * direction))) / (2 * _STEP)
    k = penalty.estimator.weight(view(logits)).expand(shape)
    by_logits = k - k.sum(dim=-1, keepdim=True) * logits.softmax(dim=-1)
    problem = "has another gradient than its divergence: Â/π_ref must be minus the derivative by π_θ(v)"
    close(name, problem, -(by_logits * direction).sum(dim=-1), slope, 1e-6)
