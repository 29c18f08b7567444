"""Faster decoding with transformers: a cache that grows in place, its attention, and steps recorded as CUDA graphs.

transformers' own cache copies all keys and values of a layer to append one token. If the batch is padded, its attention
also repeats them for every query head that shares them. A step of a small model launches a thousand short kernels from
Python; on a GPU the step is therefore recorded as a CUDA graph and replayed. See docs/experiment_log.md for
measurements. This module imports transformers, which takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from upge.models.loading import ModelConfig

#: The name under which this attention is registered with transformers.
IMPLEMENTATION = "upge_decoding"

# A layer grows by this number of tokens or by this share of its length, whichever is larger. More means fewer copies
# but more unused memory.
_GROWTH_TOKENS, _GROWTH_SHARE = 64, 1 / 4
# Kinds of rotary embedding that read the values of the positions on the host, which a graph cannot record.
_LOOKING = ("dynamic", "longrope")

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def prepare(model: PreTrainedModel) -> None:
    """Set `attention` as the attention of a causal LM that uses torch's SDPA.

    Other models keep their attention, and so do models that select the keys of a token themselves, because they depend
    on the name of the attention.
    """
    chooses = any(hasattr(module, "indexer") for module in model.modules())
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend or chooses:
        return
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,  # Any: arguments that transformers passes on
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, with a fast path for one query token and grouped key heads.

    In the fast path the query heads that share keys are the rows of one product, so no key is repeated.

    Args:
        module, **others: as for transformers' attention functions.
        query: [B, heads, t, d].
        key, value: [B, kv_heads, T, d].
        attention_mask: [B, 1, t, T], or [B, heads, t, T], or None.

    Returns:
        The output [B, t, heads, d], and None in place of the attention weights.
    """
    heads, shared = query.shape[1], key.shape[1]
    own_masks = attention_mask is not None and attention_mask.shape[1] != 1
    if query.shape[2] != 1 or heads == shared or own_masks or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    rows, scale = query.unflatten(1, (shared, heads // shared)).squeeze(3), others.get("scaling")
    output = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scale)
    return output.flatten(1, 2)[:, None], None


def growing_kv_cache(config: ModelConfig, max_length: int) -> DynamicCache:
    """An empty cache for a model. A prompt and its response together have at most `max_length` tokens."""
    grown = DynamicCache(config=config)
    grown.layers = [GrowingLayer(max_length) if type(old) is DynamicLayer else old for old in grown.layers]
    return grown


class GrowingLayer(DynamicLayer):
    """A layer of the cache that has room for more tokens.

    `keys` and `values` [B, heads, T, d] are the used part of larger tensors. After `fix` they are the whole tensors,
    and new tokens are written at a given place. Beyond `max_length` tokens it reserves no room in advance.
    """

    # transformers declares both as optional; here they are tensors whenever they are read.
    keys: torch.Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: torch.Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        self._place: torch.Tensor | None = None
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, t, d] of t new tokens. Return those of all tokens."""
        if self._place is not None:
            self.keys.index_copy_(-2, self._place, key_states)
            self.values.index_copy_(-2, self._place, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not start:
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        if not self._has_room(end):
            more = max(_GROWTH_TOKENS, int(end * _GROWTH_SHARE))
            self._make_room(max(end, min(end + more, self._max_length)))
        assert self._room is not None
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def fix(self, size: int, place: torch.Tensor) -> None:
        """Fix the number of tokens at `size`. From now on, `update` writes at `place` [1]."""
        self._make_room(size)
        assert self._room is not None
        (self.keys, self.values), self._place = self._room, place

    def _has_room(self, size: int) -> bool:
        """Whether `keys` are the beginning of tensors of at least this size. After rows are selected they are not."""
        room = self._room
        return room is not None and room[0].data_ptr() == self.keys.data_ptr() and size <= room[0].shape[-2]

    def _make_room(self, size: int) -> None:
        """Make room for `size` tokens in total, filled with zeros, because masked values are multiplied by 0."""
        used = (self.keys, self.values)
        keys, values = (old.new_zeros((*old.shape[:-2], size, old.shape[-1])) for old in used)
        self._room = (keys, values)
        for room, old in zip(self._room, used, strict=True):
            room[..., : old.shape[-2], :] = old


def steps_of(
    model: PreTrainedModel, cache: DynamicCache, mask: torch.Tensor, max_tokens: int, forward: Forward
) -> Steps:
    """The decoding steps of a batch whose prompts are in the cache, as a CUDA graph if the model allows it.

    Args:
        model: the causal LM, which `forward` runs.
        cache: of `growing_kv_cache`.
        mask: [B, T], 1 for the tokens of the prompts, 0 for padding.
        max_tokens: maximum number of tokens of a response.
        forward: (token ids [b, t], mask, positions [b, t]) → logits [b, V] after the last token.
    """
    recordable = (
        mask.is_cuda
        and model.config._attn_implementation == IMPLEMENTATION
        and all(hasattr(layer, "fix") for layer in cache.layers)
        and not _looks_at_positions(getattr(model.config.get_text_config(), "rope_parameters", None))
    )
    return ReplayedSteps(cache, mask, max_tokens, forward) if recordable else Steps(cache, mask, forward)


def _looks_at_positions(rope: object) -> bool:
    """Whether a rotary embedding is one of `_LOOKING`. `rope` may hold parameters or, per kind of layer, parameters."""
    if not isinstance(rope, Mapping):
        return False
    return rope.get("rope_type") in _LOOKING or any(map(_looks_at_positions, rope.values()))


class Steps:
    """Decodes one token after another for every row of a batch; the arguments are those of `steps_of`."""

    def __init__(self, cache: DynamicCache, mask: torch.Tensor, forward: Forward) -> None:
        self._cache, self._mask, self._forward = cache, mask, forward

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these rows only."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits [b, V] after the rows' next token [b, 1]. They are valid until the next call."""
        self._mask = torch.cat([self._mask, torch.ones_like(token)], dim=1)
        return self._forward(token, self._mask, self._mask.sum(dim=1, keepdim=True) - 1)


class ReplayedSteps(Steps):
    """`Steps` that replays a CUDA graph.

    Every tensor keeps its address and shape. The cache has room for all tokens, and the mask hides those that are not
    written yet. The rows are part of the graph, so `keep` makes the next step record a new one.
    """

    def __init__(self, cache: DynamicCache, mask: torch.Tensor, max_tokens: int, forward: Forward) -> None:
        width = mask.shape[1]
        # A multiple of 8, because attention would otherwise copy the mask to align it.
        size = -(-(width + max_tokens) // 8) * 8
        whole = torch.zeros(len(mask), 1, 1, size, dtype=torch.bool, device=mask.device)
        whole[:, 0, 0, :width] = mask.bool()
        super().__init__(cache, whole, forward)
        self._place = torch.tensor([width - 1], device=mask.device)
        self._positions = mask.sum(dim=1, keepdim=True) - 1
        self._replay: Callable[[torch.Tensor], torch.Tensor] | None = None
        for layer in cast("list[GrowingLayer]", cache.layers):  # as `steps_of` has checked
            layer.fix(size, self._place)

    def keep(self, rows: torch.Tensor) -> None:
        self._replay = None  # also frees the graph's memory, before the cache is copied
        super().keep(rows)
        self._positions = self._positions[rows]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self._place += 1
        self._positions += 1
        self._mask.index_fill_(-1, self._place, True)
        if self._replay is None:
            self._replay = record(lambda ids: self._forward(ids, self._mask, self._positions), token)
        return self._replay(token)


def record(
    function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Record `function` as a CUDA graph, which reads and writes the same memory in every call.

    `function` is called twice, the first time to initialize what is created at first use, so a second call must have
    the same result. All arguments have the shape and type of `example`.

    Returns:
        The recorded function, or, with a warning, `function` itself if it cannot be recorded, for example because it
        waits for the GPU.
    """
    argument = example.clone()
    function(argument)
    try:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a process group, may use the device at the same time.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(argument)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        warnings.warn(f"sampling is slower: a step of this model cannot be recorded ({reason})", stacklevel=2)
        return function

    def replay(value: torch.Tensor) -> torch.Tensor:
        argument.copy_(value)
        graph.replay()
        return result

    return replay
