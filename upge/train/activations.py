"""Activation checkpointing: what a layer stores for the backward pass, and what it recomputes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checkpointing = Literal["none", "selective", "full"]

#: Matrix product → position of its left factor among the arguments.
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
#: A product with a smaller inner dimension, as with a LoRA adapter's B, is cheaper to recompute than to store.
_LEAST_INNER = 64
_ATTENTION = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "torch_attn._varlen_attn",
)


def checkpoint_activations(network: PreTrainedModel, mode: Checkpointing, has_adapters: bool = False) -> None:
    """Recompute activations of each layer in the backward pass instead of storing them.

    'full' stores a layer's input and recomputes everything else. 'selective' also stores the results of attention and
    of matrix products, and recomputes norms, rotary embeddings, activation functions and sums. It computes no product
    twice, except the small ones of LoRA adapters. It does not store the output of the MLP, because no gradient needs
    it. With adapters it does, because recomputing the adapter's product would also recompute that output.
    """
    if mode == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        policy = partial(_policy, None if has_adapters else network.config.get_text_config().intermediate_size)
        arguments["context_fn"] = partial(_contexts, policy)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if has_adapters:
        # With adapters, transformers enables gradients of the embedded tokens, which only re-entrant checkpoints need.
        network.disable_input_require_grads()
    network.config.use_cache = False


def _contexts(policy: Any) -> Any:
    """torch's contexts of a layer's first and second forward pass."""
    # DeepSpeed's replacement adds the bias to a stored product in place, and the second pass would add it again.
    assert F.linear.__module__ != "deepspeed.runtime.zero.linear", "linear layers must not be DeepSpeed's"
    return create_selective_checkpoint_contexts(policy)


def _policy(without: int | None, context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Whether to store the result of an operation; a product with the inner dimension `without` is recomputed."""
    if operation in _PRODUCTS:
        inner = arguments[_PRODUCTS[operation]].shape[1]
        keep = inner >= _LEAST_INNER and inner != without
    else:
        keep = str(operation).removesuffix(".default") in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
