"""What a step of decoding moves: a cache that grows in place, and attention that reads each key once.

transformers' own cache copies all keys and values of a layer at every token to append one, and its attention, wherever
the batch is padded, writes them out again for every query head that shares them. Both cost more than the model's
products once a batch has hundreds of responses.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

#: The name under which transformers knows this attention.
IMPLEMENTATION = "upge_decoding"

# Tokens by which a cache grows at least, and the share of its length; memory above what is used against copies.
_GROWTH_TOKENS, _GROWTH_SHARE = 64, 1 / 4


def prepare(model: nn.Module) -> None:
    """Lets a causal LM that runs torch's SDPA decode with `attention`; any other keeps what it has."""
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, but for one query token [B, heads, 1, d] with fewer heads of keys [B, kv_heads, T, d]: then
    the query heads that share keys are the rows of one product, and no key is repeated. → [B, 1, heads, d]"""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads, shared = query.shape[1], key.shape[1]
    if query.shape[2] != 1 or heads == shared or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    rows = query.unflatten(1, (shared, heads // shared)).squeeze(3)
    output = nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=others.get("scaling")
    )
    return output.flatten(1, 2)[:, None], None


def growing_cache(config: Any) -> Any:
    """An empty cache for a model of this configuration, whose layers with full attention grow in place."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    grown = DynamicCache(config=config)
    layer = _growing_layer()
    grown.layers = [layer() if type(old) is DynamicLayer else old for old in grown.layers]
    return grown


@cache
def _growing_layer() -> type:
    # Defined when first asked for: importing transformers takes seconds.
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """`keys` and `values` are the used part of tensors with room for more tokens."""

        _room: tuple[torch.Tensor, torch.Tensor] | None = None

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self._room is None or end > self._room[0].shape[-2]:
                size = end + max(_GROWTH_TOKENS, int(end * _GROWTH_SHARE))
                self._room = tuple(new.new_empty((*new.shape[:-2], size, new.shape[-1]))
                                   for new in (key_states, value_states))
                if start:
                    for room, used in zip(self._room, (self.keys, self.values), strict=True):
                        room[..., :start, :] = used
            for room, new in zip(self._room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self._room)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._room = None

    return GrowingLayer
