"""Attention over a packed row in a Hugging Face causal LM: no sequence attends to another.

The sequence lengths are passed as keyword arguments from the trunk's forward to the attention function. Their names are
those of transformers' own variable-length kernels, plus `sequence_lengths`, the lengths as plain numbers, and
`sharing`, if shared prompts occur in the row once.

On CPU, and on CUDA in float32, attention is a loop of causal SDPA over runs of sequences of equal length. On CUDA in
half precision it is torch.nn.attention.varlen, which runs FlashAttention 3 on Hopper GPUs if it is installed.
"""

from __future__ import annotations

import importlib.util
import warnings
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upge.errors import ModelError
from upge.train.packing import Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The name under which this attention is registered in transformers.
IMPLEMENTATION = "upge_packed"

_LAYER_TYPES = {"full_attention", "sliding_attention"}
#: Settings that change a model's logits W h + b, and the value (besides None) at which they do not.
_LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "output_logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
    "dim_model_base": None,
}
#: Arguments of an attention function that change its scores in ways not supported here.
_SCORE_ARGUMENTS = ("softcap", "s_aux", "position_bias")
#: FlashAttention 3's name in torch, its package, and the only major compute capability that it supports (Hopper).
_FLASH_3, _FLASH_3_MODULE, _FLASH_3_CAPABILITY = "FA3", "flash_attn_interface", 9
#: The largest head size that the variable-length kernel supports.
_VARLEN_HEAD_LIMIT = 256


def prepare(model: PreTrainedModel) -> None:
    """Change a causal LM in place so that it runs packed rows, without dropout.

    Raises:
        ModelError: the architecture's attention or logits cannot be reproduced here.
    """
    check_supported(model)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    _without_dropout(model)


def _without_dropout(model: nn.Module) -> None:
    """Turn dropout off: log-probs must be deterministic and independent of the micro-batches."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def register() -> None:
    """Register this attention in transformers. Its mask is None, because the lengths determine what is masked."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def choose_kernel(device: torch.device) -> None:
    """Make torch's attention use FlashAttention 3 in this process, if it is installed and the GPU is a Hopper GPU.

    An implementation that is already active is kept.
    """
    from torch.nn import attention

    if (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _FLASH_3_CAPABILITY
        and attention.current_flash_attention_impl() is None
        and _FLASH_3 in attention.list_flash_attention_impls()
        and importlib.util.find_spec(_FLASH_3_MODULE) is not None
    ):
        try:
            attention.activate_flash_attention_impl(_FLASH_3)
        except (ImportError, OSError, RuntimeError) as error:
            warnings.warn(f"FlashAttention 3 is installed but cannot be used: {error}", stacklevel=2)


def kernel_name(device: torch.device, dtype: str, head_size: int) -> str:
    """What computes the attention of a model on a device, for the records of a run."""
    from torch.nn import attention

    if device.type != "cuda" or dtype == "float32" or head_size > _VARLEN_HEAD_LIMIT:
        return "loop of SDPA"
    return f"variable-length kernel, {attention.current_flash_attention_impl() or 'FA2'}"


def check_supported(model: PreTrainedModel) -> None:
    """Check that the model is a decoder whose attention can be replaced and whose logits are W h + b.

    Raises:
        ModelError: it is not.
    """
    config = model.config
    kind = f"model type '{config.model_type}'"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder; choose a decoder-only causal LM such as Qwen2 or Llama")
    if not model._supports_attention_backend:
        raise ModelError(
            f"{kind}: its code in transformers does not take attention from AttentionInterface, so packed sequences "
            "would see each other; choose a model such as Qwen2, Qwen3, Llama or Mistral"
        )
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ModelError(f"{kind} has no output embedding over a trunk; load it with AutoModelForCausalLM")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if strange:
        raise ModelError(f"{kind} has layers of type {strange}; choose a model with only {sorted(_LAYER_TYPES)}")
    for name, neutral in _LOGIT_SETTINGS.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise ModelError(
                f"{kind} changes its logits after the output embedding ({name} = {value}), which the chunked head does "
                "not support; choose a model without it"
            )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ModelError(f"{kind} caps its attention scores (attn_logit_softcapping); choose a model without it")


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads N size"],
    key: Float[Tensor, "1 kv_heads N size"],
    value: Float[Tensor, "1 kv_heads N size"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    sharing: Sharing | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 N heads size"], None]:
    """Causal attention within each sequence of the row, with transformers' signature for attention functions.

    Raises:
        ModelError: the call has no lengths, or the layer needs something that is not supported.
    """
    if sharing is not None:
        query, key, value = (sharing.spread(x) for x in (query, key, value))
    lengths = _checked_lengths(module, query, attention_mask, dropout, sliding_window, sequence_lengths, others)
    if max_length_q is not None and sliding_window is not None and max_length_q <= sliding_window:
        sliding_window = None
    if _varlen_takes(query, value):
        assert cu_seq_lens_q is not None and max_length_q is not None
        output = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        runs = [(length, len(list(same))) for length, same in groupby(lengths)]
        sizes = [length * count for length, count in runs]
        # One split and one cat: with a slice per run, autograd would allocate a gradient of the whole row for each run.
        parts = zip(runs, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
        outputs = [_run_of_equal_length(*run, q, k, v, scaling, sliding_window) for run, q, k, v in parts]
        output = torch.cat(outputs, dim=1)
    return output if sharing is None else sharing.gathered(output), None


def _run_of_equal_length(
    length: int,
    count: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal SDPA of `count` adjacent sequences at once, [1, heads, count·length, ·] → [1, count·length, heads, ·]."""
    query, key, value = (x.unflatten(2, (count, length))[0].transpose(0, 1) for x in (query, key, value))
    window = None
    if sliding_window is not None and length > sliding_window:
        places = torch.arange(length, device=query.device)
        distance = places[:, None] - places
        window = (distance >= 0) & (distance < sliding_window)
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    output = F.scaled_dot_product_attention(query, key, value, window, is_causal=window is None, **settings)
    return output.transpose(1, 2).reshape(1, count * length, query.shape[1], value.shape[-1])


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] == value.shape[-1] <= _VARLEN_HEAD_LIMIT


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """The CUDA kernel for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if sliding_window is None else sliding_window - 1
    # Not x[0], because its backward pass copies the gradient into a tensor of zeros.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    output = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(left, 0), **settings)
    return cast(Tensor, output)[None]


def _checked_lengths(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    sequence_lengths: tuple[int, ...] | None,
    others: dict[str, Any],
) -> tuple[int, ...]:
    """The sequence lengths of a call.

    Raises:
        ModelError: the call or the layer is not supported.
    """
    name = type(module).__name__
    if sequence_lengths is None:
        raise ModelError(
            f"{name} got no sequence lengths. Either the model was called directly (call it through PackedPolicy, or "
            "reset its attention implementation first), or its code does not pass keyword arguments on to its "
            "attention; then choose a model such as Qwen2, Qwen3, Llama or Mistral"
        )
    if query.shape[0] != 1 or query.shape[2] != sum(sequence_lengths) or attention_mask is not None:
        raise ModelError(f"{name} got an input other than the packed row; choose a model such as Qwen2 or Llama")
    if dropout:
        raise ModelError(f"{name} uses dropout {dropout}, so log-probs would be random; set attention_dropout to 0")
    asked = [key for key in _SCORE_ARGUMENTS if others.get(key) is not None]
    if asked:
        raise ModelError(f"{name} changes its attention scores ({', '.join(asked)}); choose a model without that")
    layer: Any = module  # of some architecture
    layer_types = getattr(layer.config, "layer_types", None)
    if layer_types and layer_types[layer.layer_idx] == "sliding_attention" and sliding_window is None:
        raise ModelError(f"{name} does not pass its sliding window to its attention; choose a model without it")
    return sequence_lengths


def _no_mask(*_: Any, **__: Any) -> None:
    return None
