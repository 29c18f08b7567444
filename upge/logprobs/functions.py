"""The two autograd functions: one that recomputes the logits in its backward, one that has its gradient by then."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from upge.logprobs.chunks import Chunks, statistics_dtype
from upge.logprobs.head import Asking, Head, cut


class TokenLogprobs(torch.autograd.Function):
    """(logprobs [N], entropies [N]) of `token_logprobs`; the entropies are differentiable only where asked for."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        found = hidden.new_empty(2, len(hidden), dtype=statistics_dtype(hidden.dtype))
        chunks = Chunks(weight, bias, temperature, min(size, len(hidden)))
        for chunk in cut(len(hidden), size):
            logits = chunks.logits(hidden[chunk])
            statistics = chunks.statistics(logits, targets[chunk], keep_logits=False)
            found[0, chunk], found[1, chunk] = statistics.logprobs, statistics.entropies
        logprobs, entropies = found[0].clone(), found[1].clone()
        # Under ZeRO-3 a parameter's data is released after the forward and gathered again before the backward.
        # save_for_backward keeps the parameter itself, and backward then finds its new data; weight.detach() or
        # weight.data here would hold the gathered copy alive instead.
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.weight_shape, ctx.temperature, ctx.size = weight.shape, temperature, size
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, by_logprobs: Tensor | None, by_entropies: Tensor | None) -> tuple:
        hidden, weight, bias, targets = ctx.saved_tensors
        if by_logprobs is None and by_entropies is None:
            return (None,) * 7
        assert weight.shape == ctx.weight_shape, (
            f"the output embedding is {tuple(weight.shape)} in the backward and was {tuple(ctx.weight_shape)} in the "
            "forward: under ZeRO-3 it was not gathered again"
        )
        by_logprobs = by_entropies.new_zeros(len(hidden)) if by_logprobs is None else by_logprobs
        head = Head(hidden, weight, bias, targets, ctx.temperature, ctx.size, ctx.needs_input_grad[:3])
        for chunk in cut(len(hidden), ctx.size):
            pull = None if by_entropies is None else by_entropies[chunk]
            head.again(chunk, by_logprobs[chunk], pull)
        return *head.gradients.finished(weight, bias), None, None, None, None


class TokenLoss(torch.autograd.Function):
    """(loss, logprobs [N], entropies [N]) of `token_loss`; the first alone is differentiable."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ask: Asking,
        temperature: float,
        whole: bool,
        size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, bias, targets, temperature, size, ctx.needs_input_grad[:3])
        cuts = cut(len(hidden), size)
        if whole and len(cuts) > 1:
            loss, *found = head.two_passes(cuts, ask)
        else:
            loss, *found = head.one_pass(cuts, ask)
        ctx.gradients = head.gradients.finished(weight, bias)
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, by_loss: Tensor, *_: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of this loss was handed on already; compute the loss again"
        if by_loss != 1.0:
            gradients = [g if g is None else g.mul_(by_loss) for g in gradients]
        return *gradients, None, None, None, None, None
