"""From hidden states to token log-probs and entropies, without the [tokens, vocabulary] matrix.

The logits exist for one chunk of tokens at a time (`chunks`). There are two ways to a gradient:

`token_loss` gets the loss as a function of a chunk's log-probs and entropies, so it computes the gradient of the logits
while they exist: three products of N·D·V, as many as with the full matrix. A token's coefficient may depend on its own
log-prob. If it depends on other tokens' log-probs, all log-probs are computed first: four products.

`token_logprobs` is an ordinary differentiable function, whose backward computes the logits again: four products.

Legend: N tokens, D hidden, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from upge.logprobs.chunks import CandidateGradient, buffer_bytes, default_chunk_size
from upge.logprobs.functions import TokenLogprobs, TokenLoss, score_norms
from upge.logprobs.head import CandidateFunction, CheckedCoefficients, CoefficientFunction, Coefficients, Output

__all__ = [
    "CandidateFunction",
    "CandidateGradient",
    "CoefficientFunction",
    "Coefficients",
    "Output",
    "buffer_bytes",
    "default_chunk_size",
    "token_logprobs",
    "token_loss",
    "token_score_norms",
]


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

    Both results are differentiable with respect to those of `hidden`, `weight` and `bias` that require a gradient.
    Softmax statistics and the sums over chunks of the weight's and bias's gradients are in float32 (float64 for float64
    input).

    Safe under DeepSpeed ZeRO-3: the weight is saved as the parameter itself, never as a view or copy of its data, so
    backward reads the data that the engine has gathered by then. The engine gathers the weight if this function is
    called in the forward of a module that reads the weight from another module's attribute, as `LogprobHead` does.

    Args:
        hidden: [N, D] states that predict the targets; N may be 0.
        weight: [V, D] output embedding, of the same dtype and device as `hidden`.
        targets: [N] token ids in [0, V).
        bias: [V] of the output embedding.
        temperature: divides the logits; > 0.
        entropy: whether to compute the entropies.
        chunk_size: tokens whose logits exist at the same time; None = depends on device and vocabulary.

    Returns:
        (logprobs [N], entropies [N] or None), in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes, temperature or chunk size are invalid; the message names the value and the fix.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    size = chunk_size or default_chunk_size(weight.shape[0], hidden.device.type, weight.dtype)
    logprobs, entropies = TokenLogprobs.apply(hidden, weight, bias, targets, float(temperature), entropy, size)
    return logprobs, entropies if entropy else None


def token_score_norms(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "N"]:
    """The squared norm of each target's score with respect to the logits, without gradient.

    With z the logits divided by the temperature and p = softmax(z), it is ‖∂ log p_y/∂z‖² = 1 - 2p_y + Σ_v p_v².

    The arguments are those of `token_logprobs`.

    Returns:
        [N], between 0 and 2, float32 (float64 for float64 input).

    Raises:
        ValueError: as for `token_logprobs`.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    size = chunk_size or default_chunk_size(weight.shape[0], hidden.device.type, weight.dtype)
    return score_norms(hidden, weight, bias, targets, float(temperature), size)


def token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    coefficients: CoefficientFunction,
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    candidates: bool = False,
    others: Mapping[str, Output] | None = None,
    whole: bool = False,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """A loss of the tokens' log-probs and entropies, whose gradient is computed while the logits exist.

    `coefficients` is called for each chunk in turn, with gradients disabled; the loss is the sum of its losses. The
    gradients of `hidden`, `weight` and `bias` are stored until `backward` returns them, so under ZeRO-3 only the
    forward needs the weight. The precision and all other arguments are as in `token_logprobs`.

    Args:
        coefficients: returns the loss and its derivatives with respect to the log-probs and entropies of a chunk.
        entropy_gradient: whether `coefficients` returns derivatives with respect to the entropies, which takes a little
            longer.
        candidates: whether `coefficients` returns a function for derivatives with respect to the log-probs of other
            tokens of the vocabulary. It is called while the chunk's logits exist, for a block of tokens at a time.
        others: name → what another model predicts at the same tokens, for that function. Its output embedding may be
            larger than the policy's, not smaller; its log-probs are at the same temperature and get no gradient.
        whole: whether to call `coefficients` once for all tokens, because the coefficient of a token depends on other
            tokens. With more than one chunk, the logits are then computed twice.

    Returns:
        (loss, logprobs [N], entropies [N]); only the loss is differentiable. The loss has the type that `coefficients`
        returned, the others are float32 (float64 for float64 input).

    Raises:
        ValueError: as for `token_logprobs`, or the result of `coefficients` does not match its chunk or
            `entropy_gradient`.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    size = chunk_size or default_chunk_size(weight.shape[0], hidden.device.type, weight.dtype)
    for name, other in (others or {}).items():
        _check_other(name, other, hidden, weight)
    checked = CheckedCoefficients(coefficients, entropy_gradient, candidates)
    return TokenLoss.apply(hidden, weight, bias, targets, checked, float(temperature), whole, size, others or {})


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


def _check_other(name: str, other: Output, hidden: Tensor, weight: Tensor) -> None:
    if other.weight is None:
        raise ValueError(f"others.{name}: it has no output embedding; give Output(hidden, weight)")
    if other.hidden.dim() != 2 or len(other.hidden) != len(hidden) or other.hidden.shape[1] != other.weight.shape[1]:
        raise ValueError(
            f"others.{name}: hidden must be [{len(hidden)}, D] and weight [V, D], got {tuple(other.hidden.shape)} and "
            f"{tuple(other.weight.shape)}"
        )
    if len(other.weight) < len(weight):
        raise ValueError(
            f"others.{name}: it predicts {len(other.weight)} tokens and the policy {len(weight)}; give a model with at "
            "least the policy's vocabulary"
        )
