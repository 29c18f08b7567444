"""Trajectories of many lengths in one row without padding, and their split into micro-batches.

A packed row holds the sequences (prompt + response) one after another. The last response token is left out of it: the
hidden state there predicts nothing that is asked for. Legend: B trajectories, S sequences of the row, N packed tokens,
n response tokens of all trajectories, T the longest response.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B trajectories as one row. Sequences stand in it by falling length, so that equal lengths are neighbours.

    Attributes:
        input_ids: [1, N] tokens.
        position_ids: [1, N] place of each token in its own sequence, from 0.
        cu_seqlens: [S + 1] int32, where each sequence starts; the last entry is N.
        lengths: the S lengths as plain numbers, known without a read from the device.
        predictors: [n] index in the row of the hidden state that predicts each response token.
        targets: [n] the response tokens.
        rows: [n] the trajectory that each response token belongs to, as numbered in the call of `pack`.
        columns: [n] its place in the response, from 0.
        shape: (B, T) of the padded form.
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

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

    def pad(self, values: Float[Tensor, "n"], fill: float = 0.0) -> Float[Tensor, "B T"]:
        """One number per response token, as [B, T] with `fill` behind each response; gradients flow to `values`."""
        return values.new_full(self.shape, fill).index_put((self.rows, self.columns), values)

    def unpad(self, padded: Float[Tensor, "B T"]) -> Float[Tensor, "n"]:
        """The reverse of `pad`: the entries of [B, T] that stand for response tokens, in packed order."""
        return padded[self.rows, self.columns]

    @property
    def response_mask(self) -> Bool[Tensor, "B T"]:
        """[B, T] True on response tokens."""
        return self.pad(torch.ones_like(self.rows, dtype=torch.bool), fill=False)


def packed_length(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> int:
    """Tokens that a trajectory takes in a packed row: prompt and response without the last response token."""
    return len(prompt_ids) + max(len(response_ids) - 1, 0)


def pack(
    trajectories: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Pack (prompt_ids, response_ids) pairs into one row.

    No trajectories at all give a row of one token that predicts nothing (B = T = n = 0): a rank without work for a
    micro-batch runs it forward and backward with a loss of zero, because ZeRO-3's collectives need every rank.

    Raises:
        ValueError: a prompt without tokens, whose first response token nothing could predict.
    """
    for index, (prompt_ids, _) in enumerate(trajectories):
        if not len(prompt_ids):
            raise ValueError(f"trajectory {index} has an empty prompt; a prompt needs at least one token (such as bos)")
    if not trajectories:
        return _assemble([[0]], [], [], [], [], (0, 0), device)
    order = sorted(range(len(trajectories)), key=lambda i: -packed_length(*trajectories[i]))
    sequences, predictors, targets, rows, columns = [], [], [], [], []
    start = 0
    for index in order:
        prompt_ids, response_ids = trajectories[index]
        sequences.append([*prompt_ids, *response_ids[:-1]])
        first = start + len(prompt_ids) - 1
        predictors.extend(range(first, first + len(response_ids)))
        targets.extend(response_ids)
        rows.extend([index] * len(response_ids))
        columns.extend(range(len(response_ids)))
        start += len(sequences[-1])
    shape = (len(trajectories), max(len(response_ids) for _, response_ids in trajectories))
    return _assemble(sequences, predictors, targets, rows, columns, shape, device)


def _assemble(
    sequences: list[list[int]],
    predictors: list[int],
    targets: list[int],
    rows: list[int],
    columns: list[int],
    shape: tuple[int, int],
    device: torch.device | str,
) -> PackedBatch:
    lengths = tuple(len(sequence) for sequence in sequences)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)

    def whole(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return PackedBatch(
        input_ids=whole([token for sequence in sequences for token in sequence])[None],
        position_ids=whole([place for length in lengths for place in range(length)])[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=lengths,
        predictors=whole(predictors),
        targets=whole(targets),
        rows=whole(rows),
        columns=whole(columns),
        shape=shape,
    )


def plan_micro_batches(
    lengths: Sequence[int], token_budget: int, blocks: Sequence[int] | None = None
) -> list[list[int]]:
    """Split trajectories into micro-batches of at most `token_budget` tokens: `distribute` for one rank."""
    return distribute(lengths, 1, token_budget, blocks)[0]


def distribute(
    lengths: Sequence[int], ranks: int, token_budget: int, blocks: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Which trajectories each rank runs in each of its micro-batches; the same on every rank that asks.

    Each trajectory occurs once. Trajectories of one block stay in one micro-batch. A block longer than the budget has
    a micro-batch of its own. All ranks get the same number of micro-batches (some may be empty), because ZeRO-3's
    collectives must match; those that run at the same time hold about as many tokens as each other.

    Args:
        lengths: tokens of each trajectory (`packed_length`).
        ranks: number of processes.
        token_budget: most tokens of a micro-batch.
        blocks: for each trajectory the block it belongs to (its group, where a part's reach demands the whole group);
            None = every trajectory alone.

    Returns:
        For each rank a list of micro-batches, each a rising list of indices into `lengths`.

    Raises:
        ValueError: a budget or a number of ranks below 1, or `blocks` of another size than `lengths`.
    """
    if token_budget < 1 or ranks < 1:
        raise ValueError(f"token_budget and ranks must be at least 1, got {token_budget} and {ranks}")
    if blocks is not None and len(blocks) != len(lengths):
        raise ValueError(f"blocks names {len(blocks)} trajectories and lengths {len(lengths)}; give one block for each")
    units = _units(lengths, blocks)
    fitted = _first_fit(units, token_budget)
    slots = math.ceil(len(fitted) / ranks) * ranks
    bins = _even(units, slots, token_budget) or fitted + [(0, [])] * (slots - len(fitted))
    bins = sorted(bins, key=lambda unit: (-unit[0], unit[1]))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn, first in enumerate(range(0, slots, ranks)):
        together = bins[first : first + ranks]
        # Turning the order round each time keeps the rank with the longest micro-batch from being always the same.
        for rank, (_, members) in enumerate(together if turn % 2 == 0 else together[::-1]):
            plan[rank].append(sorted(members))
    return plan


#: Tokens of a block or a micro-batch, and the trajectories in it.
_Unit = tuple[int, list[int]]


def _units(lengths: Sequence[int], blocks: Sequence[int] | None) -> list[_Unit]:
    """The blocks, longest first; ties in order of first appearance."""
    members: dict[int, list[int]] = {}
    for index, block in enumerate(range(len(lengths)) if blocks is None else blocks):
        members.setdefault(int(block), []).append(index)
    units = [(sum(lengths[i] for i in indices), indices) for indices in members.values()]
    return sorted(units, key=lambda unit: -unit[0])


def _first_fit(units: list[_Unit], token_budget: int) -> list[_Unit]:
    """Few micro-batches: each block goes into the first one with room for it."""
    bins: list[_Unit] = []
    for load, members in units:
        for place, (taken, held) in enumerate(bins):
            if taken + load <= token_budget:
                bins[place] = (taken + load, held + members)
                break
        else:
            bins.append((load, members))
    return bins


def _even(units: list[_Unit], slots: int, token_budget: int) -> list[_Unit] | None:
    """Even micro-batches: each block goes into the emptiest of `slots`; None where that breaks the budget."""
    heap: list[tuple[int, int, list[int]]] = [(0, slot, []) for slot in range(slots)]
    for load, members in units:
        taken, slot, held = heap[0]
        if held and taken + load > token_budget:
            return None
        heapq.heapreplace(heap, (taken + load, slot, held + members))
    return [(taken, held) for taken, _, held in heap]
