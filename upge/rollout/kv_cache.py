"""A cache whose layers with full attention grow in place. Importing this imports transformers, which takes seconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens by which a layer grows at least, and the share of its length; memory above what is used against copies.
_GROWTH_TOKENS, _GROWTH_SHARE = 64, 1 / 4


def growing_kv_cache(config: Any, max_length: int) -> DynamicCache:
    """An empty cache for a model of this configuration.

    max_length: tokens that a prompt and its response may have together.
    """
    grown = DynamicCache(config=config)
    grown.layers = [GrowingLayer(max_length) if type(old) is DynamicLayer else old for old in grown.layers]
    return grown


class GrowingLayer(DynamicLayer):
    """`keys` and `values` are the used part of tensors with room for more tokens, or, once `fix` was called, all of
    them, and what is new is written at a place.

    max_length: tokens beyond which it makes no room in advance.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        self._place: torch.Tensor | None = None
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Keep keys and values [B, heads, t, d] of t new tokens; those of all tokens."""
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
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def fix(self, size: int, place: torch.Tensor) -> None:
        """From now on it has `size` tokens, and what is new is written at `place` [1]."""
        self._make_room(size)
        (self.keys, self.values), self._place = self._room, place

    def _has_room(self, size: int) -> bool:
        """Whether `keys` are the beginning of something as long; they are not after rows were chosen."""
        room = self._room
        return room is not None and room[0].data_ptr() == self.keys.data_ptr() and size <= room[0].shape[-2]

    def _make_room(self, size: int) -> None:
        """Room for `size` tokens in all; zeros, because what a mask hides is multiplied by 0."""
        used = (self.keys, self.values)
        self._room = tuple(old.new_zeros((*old.shape[:-2], size, old.shape[-1])) for old in used)
        for room, old in zip(self._room, used, strict=True):
            room[..., : old.shape[-2], :] = old
