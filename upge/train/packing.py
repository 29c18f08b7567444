"""Trajectories of different lengths in one row without padding, with shared prompts computed once.

A packed row holds the sequences (prompt + response) one after another, each without its last response token, because
the hidden state there predicts nothing that is needed. A prompt with several responses occurs in the row once: its
hidden states do not depend on what follows. Legend: B trajectories, S sequences, N packed tokens, n response tokens of
all trajectories, T the longest response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Shared prompts are computed once if that saves at least this share of the tokens: attention copies a prompt's keys
#: and values for each response, which in a very small model costs about as much as a few tokens.
WORTH_SHARING = 1 / 16


class Sharing(NamedTuple):
    """How sequences are composed of the segments of a row in which shared prompts occur once.

    Attributes:
        segments: tokens of each segment of the row, in order: a shared prompt, a response to one, or a whole sequence.
        order: the segments of the sequences, sequence after sequence. A shared prompt occurs in each of its sequences,
            every other segment once. The row has the segments in the order of their first occurrence.
    """

    segments: tuple[int, ...]
    order: tuple[int, ...]

    def spread(self, row: Float[Tensor, "1 heads N size"]) -> Float[Tensor, "1 heads M size"]:
        """The sequences one after another, each with a copy of its prompt."""
        parts = row.split(self.segments, dim=2)
        return torch.cat([parts[i] for i in self.order], dim=2)

    def gathered(self, sequences: Float[Tensor, "1 M heads size"]) -> Float[Tensor, "1 N heads size"]:
        """The reverse of `spread`, which keeps the first of each prompt's equal copies."""
        parts = sequences.split([self.segments[i] for i in self.order], dim=1)
        first = dict(reversed(list(zip(self.order, parts, strict=True))))
        return torch.cat([first[i] for i in range(len(self.segments))], dim=1)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B trajectories as one row, in order of descending length, so that sequences of equal length are adjacent.

    Attributes:
        input_ids: [1, N] tokens.
        position_ids: [1, N] position of each token in its own sequence, from 0.
        cu_seqlens: [S + 1] int32, the cumulative lengths of the sequences, from 0.
        lengths: the S lengths as plain numbers, known without a device synchronization.
        predictors: [n] index in the row of the hidden state that predicts each response token.
        targets: [n] the response tokens.
        rows: [n] the trajectory that each response token belongs to, as numbered in the call of `pack`.
        columns: [n] its position in the response, from 0.
        shape: (B, T) of the padded form.
        sharing: how sequences share prompts; None if the row holds every sequence whole.
    """

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    cu_seqlens: Int[Tensor, "S1"]
    lengths: tuple[int, ...]
    predictors: Int[Tensor, "n"]
    targets: Int[Tensor, "n"]
    rows: Int[Tensor, "n"]
    columns: Int[Tensor, "n"]
    shape: tuple[int, int]
    sharing: Sharing | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

    def pad(self, values: Float[Tensor, "n"], fill: float = 0.0) -> Float[Tensor, "B T"]:
        """One number per response token, as [B, T] with `fill` after each response; gradients flow to `values`."""
        return values.new_full(self.shape, fill).index_put((self.rows, self.columns), values)

    def unpad(self, padded: Float[Tensor, "B T"]) -> Float[Tensor, "n"]:
        """The reverse of `pad`: the entries of [B, T] on response tokens, in packed order."""
        return padded[self.rows, self.columns]

    def reordered(self, values: Tensor, other: PackedBatch) -> Tensor:
        """[n, ...] values in the packed order of `other`, which has the same responses to other prompts."""
        place = self.pad(torch.arange(len(self.rows), device=self.rows.device))
        return values[place[other.rows, other.columns]]

    @property
    def response_mask(self) -> Bool[Tensor, "B T"]:
        """[B, T] True on response tokens."""
        return self.pad(torch.ones_like(self.rows, dtype=torch.bool), fill=False)


def packed_length(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> int:
    """Tokens of a trajectory in a packed row: prompt and response without the last response token."""
    return len(prompt_ids) + max(len(response_ids) - 1, 0)


def pack(
    trajectories: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu", share: bool = True
) -> PackedBatch:
    """Pack (prompt_ids, response_ids) pairs into one row.

    Without trajectories the row is one token that predicts nothing (B = T = n = 0). Ranks without work run it forward
    and backward with a loss of zero, because ZeRO-3's collectives need every rank.

    Args:
        trajectories: the pairs; an empty response is allowed.
        device: the result's device.
        share: compute shared prompts once, if that saves enough.

    Raises:
        ValueError: a prompt has no tokens, so nothing could predict the first response token.
    """
    for index, (prompt_ids, _) in enumerate(trajectories):
        if not len(prompt_ids):
            raise ValueError(f"trajectory {index} has an empty prompt; a prompt needs at least one token (such as bos)")
    row = _Row()
    if not trajectories:
        row.add((0,), 0)
        return row.batch((0, 0), [1], device)
    lengths = [packed_length(*pair) for pair in trajectories]
    prompts = [tuple(prompt_ids) for prompt_ids, _ in trajectories]
    times = Counter(prompts)
    saved = sum((count - 1) * len(prompt) for prompt, count in times.items())
    worth = share and saved >= WORTH_SHARING * sum(lengths)
    common = {prompt for prompt, count in times.items() if count > 1} if worth else set()
    order = sorted(range(len(trajectories)), key=lambda i: -lengths[i])
    for index in order:
        row.sequence(index, prompts[index], trajectories[index][1], prompts[index] in common)
    shape = (len(trajectories), max(len(response_ids) for _, response_ids in trajectories))
    return row.batch(shape, [lengths[i] for i in order], device)


class _Row:
    """A packed row that sequences are added to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.places: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.segments: list[int] = []
        self.order: list[int] = []
        self.start: dict[tuple[int, ...], tuple[int, int]] = {}

    def add(self, tokens: Sequence[int], place: int) -> int:
        """Add a segment whose first token has the given position in its sequence; return its start in the row."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.places.extend(range(place, place + len(tokens)))
        self.order.append(len(self.segments))
        self.segments.append(len(tokens))
        return start

    def sequence(self, index: int, prompt: tuple[int, ...], response: Sequence[int], common: bool) -> None:
        """Add a trajectory, without its prompt if that is shared and already in the row."""
        if not common:
            last = self.add([*prompt, *response[:-1]], 0) + len(prompt) - 1
            following = last + 1
        else:
            if prompt in self.start:
                self.order.append(self.start[prompt][1])
            else:
                self.start[prompt] = self.add(prompt, 0), len(self.segments) - 1
            last = self.start[prompt][0] + len(prompt) - 1
            following = self.add(response[:-1], len(prompt)) if len(response) > 1 else 0
        self.predictors.extend([last, *range(following, following + len(response) - 1)] if len(response) else [])
        self.targets.extend(response)
        self.rows.extend([index] * len(response))
        self.columns.extend(range(len(response)))

    def batch(self, shape: tuple[int, int], lengths: list[int], device: torch.device | str) -> PackedBatch:
        """The row as tensors on the device; `lengths` are those of the sequences, in order."""

        def whole(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        return PackedBatch(
            input_ids=whole(self.tokens)[None],
            position_ids=whole(self.places)[None],
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            lengths=tuple(lengths),
            predictors=whole(self.predictors),
            targets=whole(self.targets),
            rows=whole(self.rows),
            columns=whole(self.columns),
            shape=shape,
            sharing=Sharing(tuple(self.segments), tuple(self.order)) if self.start else None,
        )
