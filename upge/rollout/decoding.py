"""What a step of decoding costs beside the model's products: what it copies, and, on a GPU, what it launches.

transformers' own cache copies all keys and values of a layer at every token to append one, and its attention, wherever
the batch is padded, writes them out again for every query head that shares them. And a step of a small model is a
thousand short kernels, each launched by Python: so on a GPU the step is recorded as a CUDA graph and replayed.
docs/experiment_log.md has what was measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

#: The name under which transformers knows this attention.
IMPLEMENTATION = "upge_decoding"

# Kinds of rotary embedding that look at the positions' values, which a graph cannot.
_LOOKING = ("dynamic", "longrope")

#: (token ids [b, t], mask, positions [b, t]) → logits [b, V] behind the last token.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def prepare(model: nn.Module) -> None:
    """Lets a causal LM that runs torch's SDPA decode with `attention`; any other keeps what it has, and so do models
    that choose the keys of a token themselves, which look at the attention's name."""
    chooses = any(hasattr(module, "indexer") for module in model.modules())
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend or chooses:
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
    own_masks = attention_mask is not None and attention_mask.shape[1] != 1
    if query.shape[2] != 1 or heads == shared or own_masks or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    rows = query.unflatten(1, (shared, heads // shared)).squeeze(3)
    output = nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=others.get("scaling")
    )
    return output.flatten(1, 2)[:, None], None


def steps_of(model: nn.Module, cache: Any, mask: torch.Tensor, max_tokens: int, forward: Forward) -> Steps:
    """The steps of a batch whose prompts are in the cache: replayed where a graph can be recorded, else run.

    mask: [B, T], 1 where the prompts have a token.
    max_tokens: that a response may have.
    """
    recordable = (
        mask.is_cuda
        and model.config._attn_implementation == IMPLEMENTATION
        and all(hasattr(layer, "fix") for layer in cache.layers)
        and not _looks_at_positions(getattr(model.config.get_text_config(), "rope_parameters", None))
    )
    return ReplayedSteps(cache, mask, max_tokens, forward) if recordable else Steps(cache, mask, forward)


def _looks_at_positions(rope: Any) -> bool:
    """Whether a rotary embedding of the model does; its parameters may stand under the kinds of layers."""
    if not isinstance(rope, Mapping):
        return False
    return rope.get("rope_type") in _LOOKING or any(map(_looks_at_positions, rope.values()))


class Steps:
    """One token after the other for every row of a batch."""

    def __init__(self, cache: Any, mask: torch.Tensor, forward: Forward) -> None:
        self._cache, self._mask, self._forward = cache, mask, forward

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

    def __init__(self, cache: Any, mask: torch.Tensor, max_tokens: int, forward: Forward) -> None:
        width = mask.shape[1]
        # A multiple of 8, or attention would copy the mask to align it.
        size = -(-(width + max_tokens) // 8) * 8
        whole = torch.zeros(len(mask), 1, 1, size, dtype=torch.bool, device=mask.device)
        whole[:, 0, 0, :width] = mask.bool()
        super().__init__(cache, whole, forward)
        self._place = torch.tensor([width - 1], device=mask.device)
        self._positions = mask.sum(dim=1, keepdim=True) - 1
        self._replay: Callable[[torch.Tensor], torch.Tensor] | None = None
        for layer in cache.layers:
            layer.fix(size, self._place)

    def keep(self, rows: torch.Tensor) -> None:
        self._replay = None  # and with it the graph's memory, before the cache is copied
        super().keep(rows)
        self._positions = self._positions[rows]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self._place += 1
        self._positions += 1
        self._mask.index_fill_(-1, self._place, True)
        if self._replay is None:
            self._replay = record(lambda ids: self._forward(ids, self._mask, self._positions), token)
        return self._replay(token)


def record(function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable:
    """`function` of one tensor as a CUDA graph; it reads and writes the same memory in every call.

    It is called twice, once to warm up what is made at first use, and must bear that. Where it cannot be recorded,
    since it waits for the GPU within, it is returned as it is.
    """
    argument = example.clone()
    function(argument)
    try:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a process group's, may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(argument)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        warnings.warn(f"sampling goes on more slowly: a step of this model cannot be recorded ({reason})", stacklevel=2)
        return function

    def replay(value: torch.Tensor) -> torch.Tensor:
        argument.copy_(value)
        graph.replay()
        return result

    return replay
