"""RMSNorm, rotary embedding and gated activation of a Hugging Face causal LM as compiled functions.

In plain PyTorch every elementwise operation reads its input from memory and writes its result back. torch.compile fuses
a norm, a rotation or an activation into one forward and one backward kernel. Matrix products, attention and the
modules' hooks are unchanged, so ZeRO-3, LoRA and activation checkpointing see the same modules and products.

A module is changed only if its code in transformers is that of Llama or Gemma 3, which the functions here reproduce.
The number of tokens is dynamic: a new length causes no recompilation. TORCH_COMPILE_DISABLE=1 disables compilation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import unwrap
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The devices for which models are compiled. On a CPU, compilation takes longer than the short runs there.
DEVICES = frozenset({"cuda"})
#: How many kinds of input a function is compiled for: with and without gradient, of several models and widths.
_KINDS = 32


def compile_elementwise(network: PreTrainedModel) -> Mapping[str, int]:
    """Compile a model's norms, rotary embeddings and gated activations in place, where their code is known.

    Args:
        network: before or after DeepSpeed has partitioned it.

    Returns:
        How many modules of each kind were changed: 'norm', 'rotary', 'activation'.
    """
    counts: Counter[str] = Counter()
    for module in network.modules():
        for kind, forward in (("norm", _norm(module)), ("rotary", _rotary(module)), ("activation", _gated(module))):
            if forward is not None:
                module.forward = MethodType(forward, module)
                counts[kind] += 1
    return counts


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w · x / √(mean x² + ε), with the quotient in float32 and the product in the input's dtype, as in Llama."""
    wide = hidden.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normalized.to(hidden.dtype)


def offset_rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """(1 + w) · x / √(mean x² + ε) in float32, as in Gemma 3."""
    wide = hidden.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normalized * (1.0 + weight.float())).to(hidden.dtype)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys [1, heads, N, size] with cos and sin [1, N, size]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + _half_rotated(query) * sin, key * cos + _half_rotated(key) * sin


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, with the tanh approximation."""
    return F.gelu(gate, approximate="tanh") * up


def _half_rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiler: Any = torch.compile  # its overloads lack the limit
    return compiler(function, fullgraph=True, recompile_limit=_KINDS)


def _call(function: Callable[..., Any], dims: Sequence[int], *arguments: Any) -> Any:
    """The function's compiled result; `dims` are the dimensions of the tokens in the first arguments.

    A single token, as on a rank without work, is computed without compilation.
    """
    tensors = arguments[: len(dims)]
    if tensors[0].shape[dims[0]] == 1:
        return function(*arguments)
    for tensor, dim in zip(tensors, dims, strict=True):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return _compiled(function)(*arguments)


def _norm(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward of a norm, or None if the module is not a known one."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kind: Any = type(module)
    if _same_code(kind.forward, LlamaRMSNorm.forward):
        function, epsilon = rms_norm, "variance_epsilon"
    elif _same_code(kind.forward, Gemma3RMSNorm.forward) and _same_code(kind._norm, Gemma3RMSNorm._norm):
        function, epsilon = offset_rms_norm, "eps"
    else:
        return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        # Tokens are the dimension before the last, except for heads of queries and keys [1, N, heads, size]. Gemma 3
        # norms these as [1, heads, N, size].
        tokens = 1 if hidden.dim() < 4 or function is rms_norm else 2
        if hidden.dim() == 4 and hidden.shape[3 - tokens] == 1:
            # A view of a single head has strides that would cause a recompilation for each number of tokens.
            return function(hidden, self.weight, getattr(self, epsilon))
        return _call(function, (tokens,), hidden, self.weight, getattr(self, epsilon))

    return forward


def _rotary(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention layer with a compiled rotary embedding, or None if its rotation is not the known one.

    It is the layer's own forward, in which `apply_rotary_pos_emb` refers to the compiled function.
    """
    from transformers.models.llama import modeling_llama as llama

    forward = type(module).forward
    if not isinstance(forward, FunctionType) or "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None
    given = forward.__globals__
    known = (llama.apply_rotary_pos_emb, llama.rotate_half)
    if not all(_same_code(given.get(function.__name__), function) for function in known):
        return None

    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        assert unsqueeze_dim == 1, "heads come before tokens"
        return _call(rotate, (2, 2, 1, 1), query, key, cos, sin)

    names = {**given, "apply_rotary_pos_emb": apply}
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _gated(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward of an MLP with a gated activation, or None if the module is not a known one."""
    from transformers.activations import ACT2FN
    from transformers.models.llama.modeling_llama import LlamaMLP

    if not _same_code(type(module).forward, LlamaMLP.forward):
        return None
    functions = {type(ACT2FN["silu"]): silu_gated, type(ACT2FN["gelu_pytorch_tanh"]): gelu_gated}
    function = functions.get(type(module.act_fn))
    if function is None:
        return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(_call(function, (1, 1), gate, up))

    return forward


def _same_code(given: Any, known: Any) -> bool:
    """Whether two functions have the same code, apart from docstrings and annotations."""
    one, other = (getattr(unwrap(function), "__code__", None) for function in (given, known))
    if one is None or other is None:
        return False
    constants = [[c for c in code.co_consts if not isinstance(c, str)] for code in (one, other)]
    return (one.co_code, one.co_names, constants[0]) == (other.co_code, other.co_names, constants[1])
