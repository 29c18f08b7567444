"""A cache whose layers with full attention grow in place. This module imports transformers, which takes seconds."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from upge.models.loading import ModelConfig

# A layer grows by this number of tokens or by this share of its length, whichever is larger. More means fewer copies
# but more unused memory.
_GROWTH_TOKENS, _GROWTH_SHARE = 64, 1 / 4


def growing_kv_cache(config: ModelConfig, max_length: int) -> DynamicCache:
    """An empty cache for a model.

    Args:
        config: the model's configuration.
        max_length: the most tokens of a prompt and its response together.
    """
    grown = DynamicCache(config=config)
    grown.layers = [GrowingLayer(max_length) if type(old) is DynamicLayer else old for old in grown.layers]
    return grown


class GrowingLayer(DynamicLayer):
    """A layer of the cache that has room for more tokens.

    `keys` and `values` [B, heads, T, d] are the used part of larger tensors. After `fix` they are the whole tensors,
    and new tokens are written at a given place.

    Args:
        max_length: number of tokens beyond which the layer reserves no room in advance.
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
        """Appends keys and values [B, heads, t, d] of t new tokens. Returns those of all tokens."""
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
        """Fixes the number of tokens at `size`. From now on, `update` writes at `place` [1]."""
        self._make_room(size)
        assert self._room is not None
        (self.keys, self.values), self._place = self._room, place

    def _has_room(self, size: int) -> bool:
        """Whether `keys` are the beginning of tensors of at least this size. After rows are selected they are not."""
        room = self._room
        return room is not None and room[0].data_ptr() == self.keys.data_ptr() and size <= room[0].shape[-2]

    def _make_room(self, size: int) -> None:
        """Makes room for `size` tokens in total, filled with zeros, because masked values are multiplied by 0."""
        used = (self.keys, self.values)
        keys, values = (old.new_zeros((*old.shape[:-2], size, old.shape[-1])) for old in used)
        self._room = (keys, values)
        for room, old in zip(self._room, used, strict=True):
            room[..., : old.shape[-2], :] = old
