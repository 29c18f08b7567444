"""What a step of decoding costs beside the model's products: what it copies, and, on a GPU, what it launches.

transformers' own cache copies all keys and values of a layer at every token to append one, and its attention, wherever
the batch is padded, writes them out again for every query head that shares them. Both cost more than the products once
a batch has hundreds of responses. And a step of a small model is a thousand short kernels, which take several times
longer to launch than to run: so the step is recorded as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

#: The name under which transformers knows this attention.
IMPLEMENTATION = "upge_decoding"

# Tokens by which a cache grows at least, and the share of its length; memory above what is used against copies.
_GROWTH_TOKENS, _GROWTH_SHARE = 64, 1 / 4
# Kinds of rotary embedding that look at the positions' values, which a graph cannot.
_LOOKING = ("dynamic", "longrope")

#: (token ids [b, t], mask, positions [b, t]) → logits [b, V] behind the last token.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
        """`keys` and `values` are the used part of tensors with room for more tokens, or, once `place` is set, all of
        them, and what is new is written at that place."""

        place: torch.Tensor | None = None
        _room: tuple[torch.Tensor, torch.Tensor] | None = None

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            if self.place is not None:
                self.keys.index_copy_(-2, self.place, key_states)
                self.values.index_copy_(-2, self.place, value_states)
                return self.keys, self.values
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self._room is None or end > self._room[0].shape[-2]:
                if not start:
                    self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
                self.make_room(end + max(_GROWTH_TOKENS, int(end * _GROWTH_SHARE)))
            for room, new in zip(self._room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self._room)
            return self.keys, self.values

        def make_room(self, size: int) -> None:
            """Room for `size` tokens in all; zeros, because what a mask hides is multiplied by 0."""
            used = (self.keys, self.values)
            self._room = tuple(old.new_zeros((*old.shape[:-2], size, old.shape[-1])) for old in used)
            for room, old in zip(self._room, used, strict=True):
                room[..., : old.shape[-2], :] = old

        def fix(self, size: int, place: torch.Tensor) -> None:
            """From now on of `size` tokens, and written at `place` [1]."""
            self.make_room(size)
            (self.keys, self.values), self.place = self._room, place

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._room = None

    return GrowingLayer


def steps_of(model: nn.Module, kept: Any, mask: torch.Tensor, most: int, forward: Forward) -> Steps:
    """The steps of a batch whose prompts are in the cache `kept`: replayed where a graph can be recorded, else run.

    mask: [B, T], 1 where the prompts have a token.
    most: tokens that a response may have.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    recordable = (
        mask.is_cuda
        and model.config._attn_implementation == IMPLEMENTATION
        and all(type(layer) is _growing_layer() for layer in kept.layers)
        and rope.get("rope_type", "default") not in _LOOKING
    )
    return ReplayedSteps(kept, mask, most, forward) if recordable else Steps(kept, mask, forward)


class Steps:
    """One token after the other for every row of a batch."""

    def __init__(self, kept: Any, mask: torch.Tensor, forward: Forward) -> None:
        self._cache, self._mask, self._forward = kept, mask, forward

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits [b, V] behind the rows' next token [b, 1]; valid until the next call."""
        self._mask = torch.cat([self._mask, torch.ones_like(token)], dim=1)
        return self._forward(token, self._mask, self._mask.sum(dim=1, keepdim=True) - 1)


class ReplayedSteps(Steps):
    """The same from a graph: every tensor keeps its place and its shape, the cache's with room for all tokens, and the
    mask hides what is not written yet. Which rows there are is part of the graph, so it is recorded anew for fewer."""

    def __init__(self, kept: Any, mask: torch.Tensor, most: int, forward: Forward) -> None:
        width = mask.shape[1]
        # A multiple of 8, or attention would copy the mask to align it.
        size = -(-(width + most) // 8) * 8
        whole = torch.zeros(len(mask), 1, 1, size, dtype=torch.bool, device=mask.device)
        whole[:, 0, 0, :width] = mask.bool()
        super().__init__(kept, whole, forward)
        self._place = torch.tensor([width - 1], device=mask.device)
        self._positions = mask.sum(dim=1, keepdim=True) - 1
        self._replay: Callable[[torch.Tensor], torch.Tensor] | None = None
        for layer in kept.layers:
            layer.fix(size, self._place)

    def keep(self, rows: torch.Tensor) -> None:
        super().keep(rows)
        self._positions, self._replay = self._positions[rows], None

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self._place += 1
        self._positions += 1
        self._mask.index_fill_(-1, self._place, True)
        if self._replay is None:
            self._replay = record(lambda ids: self._forward(ids, self._mask, self._positions), token)
        return self._replay(token)


def record(function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable:
    """`function` of one tensor as a CUDA graph; it reads and writes the same memory in every call.

    It is called twice, once to warm up what is made at first use, and must bear that.
    """
    argument = example.clone()
    function(argument)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a process group's, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(argument)

    def replay(value: torch.Tensor) -> torch.Tensor:
        argument.copy_(value)
        graph.replay()
        return result

    return replay
