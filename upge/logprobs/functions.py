"""The two autograd functions: one recomputes the logits in its backward, the other has the gradients by then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upge.logprobs.chunks import Chunks, statistics_dtype
from upge.logprobs.head import CheckedCoefficients, Coefficients, Head, Output, cut

# `ctx` is Any because torch's class for it does not declare the attributes that a forward stores for its backward.
# `once_differentiable` makes it positional-only, so the types of the backwards differ from torch's declaration.


class TokenLogprobs(torch.autograd.Function):
    """(logprobs [N], entropies [N]) of `token_logprobs`; the entropies are differentiable only if requested."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        columns = hidden.new_empty(2, len(hidden), dtype=statistics_dtype(hidden.dtype))
        chunks = Chunks(weight, bias, temperature, min(size, len(hidden)))
        for chunk in cut(len(hidden), size):
            logits = chunks.logits(hidden[chunk])
            statistics = chunks.statistics(logits, targets[chunk], keep_logits=False)
            columns[0, chunk], columns[1, chunk] = statistics.logprobs, statistics.entropies
        logprobs, entropies = columns[0].clone(), columns[1].clone()
        # Under ZeRO-3 a parameter's data is released after the forward and gathered again before the backward.
        # save_for_backward stores the parameter itself, so backward sees its new data. weight.detach() or weight.data
        # would keep the gathered copy alive instead.
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.weight_shape, ctx.temperature, ctx.size = weight.shape, temperature, size
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_logprobs: Tensor | None, by_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        if by_logprobs is None and by_entropies is None:
            return (None,) * 7
        assert weight.shape == ctx.weight_shape, (
            f"the output embedding is {tuple(weight.shape)} in the backward and was {tuple(ctx.weight_shape)} in the "
            "forward: under ZeRO-3 it was not gathered again"
        )
        if by_logprobs is None:
            assert by_entropies is not None
            by_logprobs = by_entropies.new_zeros(len(hidden))
        head = Head(hidden, weight, bias, targets, ctx.temperature, ctx.size, ctx.needs_input_grad[:3])
        for chunk in cut(len(hidden), ctx.size):
            entropies = None if by_entropies is None else by_entropies[chunk]
            head.again(chunk, Coefficients(by_logprobs.new_zeros(()), by_logprobs[chunk], entropies))
        return *head.gradients.finished(weight, bias), None, None, None, None


@torch.no_grad()
def score_norms(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, size: int
) -> Tensor:
    """[N] ‖∂ log p_y/∂z‖² = ‖1_y - p‖², the result of `token_score_norms`."""
    norms = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))
    chunks = Chunks(weight, bias, temperature, min(size, len(hidden)))
    for chunk in cut(len(hidden), size):
        logits = chunks.logits(hidden[chunk])
        chunks.statistics(logits, targets[chunk], keep_logits=False)
        # The logits are now p - 1_y.
        norms[chunk] = torch.linalg.vector_norm(logits, dim=-1, dtype=norms.dtype).square()
    return norms


class TokenLoss(torch.autograd.Function):
    """(loss, logprobs [N], entropies [N]) of `token_loss`; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: CheckedCoefficients,
        temperature: float,
        whole: bool,
        size: int,
        others: Mapping[str, Output],
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, bias, targets, temperature, size, ctx.needs_input_grad[:3], others)
        cuts = cut(len(hidden), size)
        if whole and len(cuts) > 1:
            loss, logprobs, entropies = head.two_passes(cuts, coefficients)
        else:
            loss, logprobs, entropies = head.one_pass(cuts, coefficients)
        ctx.gradients = head.gradients.finished(weight, bias)
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of this loss was already used; compute the loss again"
        # Multiplied even if `by_loss` is 1: reading the number would synchronize with the device.
        return *(g if g is None else g.mul_(by_loss) for g in gradients), None, None, None, None, None, None
