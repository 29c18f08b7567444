"""From hidden states to token log-probs and entropies, without the [tokens, vocabulary] matrix.

With z = (W h + b)/τ the distribution of one token is p = softmax(z), and for the token y that was drawn

    log p_y = z_y − log Σ exp z          ∂ log p_y/∂z = 1_y − p
    H = −Σ p log p                       ∂ H/∂z = −p (log p + H)

The logits exist for one chunk of tokens at a time. Forward keeps two numbers per token (log Σ exp z and H); backward
computes the chunk's logits again. That costs 4 matrix products where the full matrix costs 3, and saves N·V numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

#: Tokens per chunk that are enough to keep the matrix products efficient. On a GPU small chunks are bound by the
#: traffic of the float32 gradient of the weight, which is read and written once per chunk.
_CHUNK_FLOOR = {"cpu": 256, "cuda": 4096}
#: Entries of a chunk's logits below which larger chunks cost no memory worth counting (small vocabularies).
_CHUNK_ENTRIES = 2**22


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"] | None]:
    """Log-prob of each target under softmax((hidden·weightᵀ + bias)/temperature), and that distribution's entropy.

    Both results carry gradients to `hidden`, `weight` and `bias`, as far as these require one. Softmax statistics and
    the sums over chunks of the weight's and bias's gradients are in float32 (float64 for float64 input).

    Safe under DeepSpeed ZeRO-3: the weight is saved as the parameter itself, never as a view or copy of its data, so
    that backward reads what the engine has gathered by then. The engine gathers it when this is called in the forward
    of a module that takes the weight from another module's attribute (`LogprobHead` does).

    Args:
        hidden: [N, D] states that predict the targets; N may be 0.
        weight: [V, D] output embedding, of the same dtype and device as `hidden`.
        targets: [N] token ids in [0, V).
        bias: [V] of the output embedding.
        temperature: divides the logits; > 0.
        entropy: whether to compute the entropies.
        chunk_size: tokens whose logits exist at the same time; default by device and vocabulary.

    Returns:
        (logprobs [N], entropies [N] or None), in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes, temperature or chunk size that cannot be used; the message names value and fix.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], hidden.device.type)
    return _TokenLogprobs.apply(hidden, weight, bias, targets, float(temperature), entropy, chunk_size)


def default_chunk_size(vocabulary: int, device_type: str) -> int:
    """Tokens per chunk: at least 256 on CPU and 4096 elsewhere, more where the vocabulary is small."""
    return max(_CHUNK_FLOOR.get(device_type, _CHUNK_FLOOR["cuda"]), _CHUNK_ENTRIES // vocabulary)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, chunk_size: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "flatten the hidden states, and under ZeRO-3 call this inside the engine's forward so that the weight is "
            "gathered"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{hidden.shape[0]}], got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"hidden, weight and bias must share one dtype, got {sorted(map(str, dtypes))}; cast them")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}; log-probs of a greedy policy do not exist")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}; leave it out for the default")


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[C, V] logits of one chunk over the temperature, a fresh tensor that the caller may overwrite."""
    logits = F.linear(hidden, weight, bias).to(_statistics_dtype(hidden.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden.dtype))
        log_normalizers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        for start in range(0, hidden.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = _scaled_logits(hidden[chunk], weight, bias, temperature)
            highest = logits.amax(dim=-1)
            logits.sub_(highest[:, None])
            chosen = logits.gather(1, targets[chunk, None])[:, 0]
            exponentials = logits.exp() if entropy else logits.exp_()
            total = exponentials.sum(dim=-1)
            log_total = total.log()
            logprobs[chunk] = chosen - log_total
            log_normalizers[chunk] = highest + log_total
            if entropy:
                entropies[chunk] = log_total - exponentials.mul_(logits).sum(dim=-1) / total
        # Under ZeRO-3 a parameter's data is released after the forward and gathered again before the backward.
        # save_for_backward keeps the parameter itself, and backward then finds its new data; weight.detach() or
        # weight.data here would hold the gathered copy alive instead.
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizers, entropies)
        ctx.weight_shape = weight.shape
        ctx.temperature = temperature
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple:
        hidden, weight, bias, targets, log_normalizers, entropies = ctx.saved_tensors
        if grad_logprobs is None and grad_entropies is None:
            return (None,) * 7
        assert weight.shape == ctx.weight_shape, (
            f"the output embedding is {tuple(weight.shape)} in the backward and was {tuple(ctx.weight_shape)} in the "
            "forward: under ZeRO-3 it was not gathered again"
        )
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits = _scaled_logits(hidden[chunk], weight, bias, ctx.temperature)
            grad_logits = _grad_logits(
                logits,
                targets[chunk],
                log_normalizers[chunk],
                None if grad_logprobs is None else grad_logprobs[chunk] / ctx.temperature,
                None if grad_entropies is None else grad_entropies[chunk] / ctx.temperature,
                None if entropies is None else entropies[chunk],
            )
            gradients.add(chunk, grad_logits)
        return *gradients.finished(), None, None, None, None


def _grad_logits(
    logits: Tensor,
    targets: Tensor,
    log_normalizers: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
    entropies: Tensor | None,
) -> Tensor:
    """[C, V] gradient of Σ g·log p_y + g_H·H with respect to the logits; overwrites `logits`."""
    logprobs = logits.sub_(log_normalizers[:, None])
    if grad_entropies is None:
        result = logprobs.exp_().mul_(-grad_logprobs[:, None])
    else:
        probabilities = logprobs.exp()
        pull = logprobs.add_(entropies[:, None]).mul_(grad_entropies[:, None])
        if grad_logprobs is not None:
            pull.add_(grad_logprobs[:, None])
        result = probabilities.mul_(pull).neg_()
    if grad_logprobs is not None:
        result.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    return result


class _Gradients:
    """The gradients of one backward, summed over chunks; those that nothing needs stay None."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self._hidden, self._weight = hidden, weight
        wide = _statistics_dtype(weight.dtype)
        self._grad_hidden = torch.empty_like(hidden) if needed[0] else None
        self._grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self._grad_bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None

    def add(self, chunk: slice, grad_logits: Tensor) -> None:
        """Add what a chunk of tokens contributes; `grad_logits` is [C, V] in the dtype of the statistics."""
        if self._grad_bias is not None:
            self._grad_bias.add_(grad_logits.sum(dim=0))
        narrow = grad_logits.to(self._hidden.dtype)
        if self._grad_hidden is not None:
            torch.mm(narrow, self._weight, out=self._grad_hidden[chunk])
        if self._grad_weight is None:
            return
        if narrow.dtype == self._grad_weight.dtype:
            self._grad_weight.addmm_(narrow.t(), self._hidden[chunk])
        else:
            # A product of half-precision matrices is rounded once; the sum over chunks must not be rounded each time.
            self._grad_weight.add_(narrow.t() @ self._hidden[chunk])

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for hidden, weight and bias, each in the dtype of its tensor."""
        dtype = self._weight.dtype
        grad_weight = None if self._grad_weight is None else self._grad_weight.to(dtype)
        grad_bias = None if self._grad_bias is None else self._grad_bias.to(dtype)
        return self._grad_hidden, grad_weight, grad_bias
