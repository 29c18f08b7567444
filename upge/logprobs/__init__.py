"""From hidden states to token log-probs and entropies, without the [tokens, vocabulary] matrix.

The logits exist for one chunk of tokens at a time (`chunks`). Two ways to a gradient:

`token_loss` knows the loss as a function of a chunk's log-probs and entropies, so it makes the gradient of the logits
while they are there: three products of N·D·V, as many as the full matrix takes. That a token's coefficient depends on
its log-prob does no harm. Where it depends on other tokens' log-probs, all are computed first: four products.

`token_logprobs` is an ordinary differentiable function, whose backward computes the logits again: four products.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from upge.logprobs.chunks import buffer_bytes, default_chunk_size
from upge.logprobs.functions import TokenLogprobs, TokenLoss
from upge.logprobs.head import Asking, CoefficientFunction, Coefficients

__all__ = ["CoefficientFunction", "Coefficients", "buffer_bytes", "default_chunk_size", "token_logprobs", "token_loss"]


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
    size = chunk_size or default_chunk_size(weight.shape[0], hidden.device.type, weight.dtype)
    logprobs, entropies = TokenLogprobs.apply(hidden, weight, bias, targets, float(temperature), entropy, size)
    return logprobs, entropies if entropy else None


def token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    coefficients: CoefficientFunction,
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    whole: bool = False,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """A loss of the tokens' log-probs and entropies, its gradient computed while the logits are there.

    `coefficients` is called, without gradient mode, for each chunk in turn; the loss is the sum of its losses. The
    gradients of `hidden`, `weight` and `bias` are kept until `backward` hands them on, so under ZeRO-3 the weight is
    needed in the forward alone. Precision as for `token_logprobs`.

    Args:
        hidden, weight, targets, bias, temperature, chunk_size: as for `token_logprobs`.
        coefficients: what the loss is and how it changes with the log-probs and entropies of a chunk.
        entropy_gradient: whether `coefficients` gives any for the entropies, which takes a little longer.
        whole: call it once for all tokens, because one's coefficient depends on others; with more than one chunk the
            logits are then computed twice.

    Returns:
        (loss, logprobs [N], entropies [N]): a gradient flows through the loss alone. The loss is of the type that
        `coefficients` gave, the others float32 (float64 for float64 input).

    Raises:
        ValueError: as for `token_logprobs`, and coefficients that do not fit their chunk or what was announced.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    size = chunk_size or default_chunk_size(weight.shape[0], hidden.device.type, weight.dtype)
    ask = Asking(coefficients, entropy_gradient)
    return TokenLoss.apply(hidden, weight, bias, targets, ask, float(temperature), whole, size)


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
