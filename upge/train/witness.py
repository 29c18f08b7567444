"""The tokens that weigh most in an update, and the text that they stand in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upge.data import Example
from upge.estimate import Estimate
from upge.train.trajectory import Trajectory

#: Trajectories that are kept of each term, each of another prompt.
KEPT = 4
#: Tokens that are kept of a response, around the one with the largest weight.
WINDOW = 512


class Watch(NamedTuple):
    """What is looked at in a step's first update besides its sums: the heaviest tokens, the pull of each term."""

    tokens: bool = False
    pulls: bool = False


NOTHING = Watch()


class Heavy(NamedTuple):
    """A trajectory that is among those with the largest weights of a term.

    Attributes:
        row: its place in the update's batch.
        gate: its coefficient, the term's included, at the largest weight.
        largest: the absolute of that weight, infinite where a weight is no number.
        weights: of each response token, the number in front of ∇log π_θ; 0 where the token has no part in the term.
        relative: the same relative to the absolute of its scale gate·reduction.
    """

    term: str
    row: int
    trajectory: Trajectory
    gate: float
    largest: float
    weights: list[float]
    relative: list[float]


class Witness:
    """Sees the estimates of one update's pieces, on one rank, and tells the trajectories with the largest weights."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[Tensor, ...]]] = {}

    def see(self, estimate: Estimate) -> None:
        """Notes the weights of some tokens."""
        for name, factors in estimate.terms.items():
            scale = (factors.gate * factors.reduction).abs()
            columns = (*estimate.batch.places, factors.weights, scale, factors.gate)
            noted = tuple(column[scale != 0].detach().cpu() for column in columns)
            self._seen.setdefault(name, []).append(noted)

    def heaviest(self, members: Sequence[Trajectory]) -> list[Heavy]:
        """Of each term the `KEPT` heaviest seen here; `members` are the trajectories of the update."""
        return [heavy for name in self._seen for heavy in self._of_term(name, members)]

    def _of_term(self, name: str, members: Sequence[Trajectory]) -> Iterator[Heavy]:
        row, place, weight, scale, gate = (torch.cat(column) for column in zip(*self._seen[name], strict=True))
        size = torch.nan_to_num(weight.abs(), nan=math.inf)
        largest = torch.zeros(len(members), dtype=size.dtype).scatter_reduce(0, row, size, "amax")
        seen = [(float(largest[r]), r, members[r].group) for r in row.unique().tolist()]
        for _, chosen, _ in _first(entry for entry in seen if entry[0] > 0):
            own = row == chosen
            full = [torch.zeros(len(members[chosen].response_ids), dtype=weight.dtype) for _ in range(2)]
            for column, values in zip(full, (weight, weight / scale), strict=True):
                column[place[own]] = values[own]
            at_largest = float(gate[own][int(size[own].argmax())])
            lists = (column.tolist() for column in full)
            yield Heavy(name, chosen, members[chosen], at_largest, float(largest[chosen]), *lists)


def heaviest(found: Iterable[Heavy]) -> list[Heavy]:
    """Of each term the `KEPT` heaviest of all ranks, the heaviest first."""
    terms: dict[str, dict[int, Heavy]] = {}
    for heavy in found:
        terms.setdefault(heavy.term, {})[heavy.row] = heavy
    return [
        rows[row]
        for _, rows in sorted(terms.items())
        for _, row, _ in _first((one.largest, one.row, one.trajectory.group) for one in rows.values())
    ]


def _first(entries: Iterable[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Of (weight, row, group) the `KEPT` with the largest weights, one of a group: all rollouts of a prompt often weigh
    the same, and one of them tells it all. Weights that differ by rounding count as equal, so that the choice does not
    depend on how the batch was cut."""
    found: dict[int, tuple[float, int, int]] = {}
    for entry in sorted(entries, key=lambda one: (-float(f"{one[0]:.5g}"), one[1])):
        found.setdefault(entry[2], entry)
    return list(found.values())[:KEPT]


def token_line(heavy: Heavy, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """A line of tokens/step_*.jsonl, see docs/metrics.md.

    Args:
        examples: the training set.
        decode: token ids as text, special tokens included.
    """
    trajectory, size = heavy.trajectory, [_size(w) for w in heavy.weights]
    problem = examples[trajectory.example].problem
    first = max(0, min(size.index(max(size)) - WINDOW // 2, len(size) - WINDOW))
    window = slice(first, first + WINDOW)
    return {
        "term": heavy.term,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "level": problem.level,
        "reward": trajectory.reward,
        "is_demonstration": trajectory.is_demonstration,
        "gate": _short(heavy.gate),
        "tokens": token_texts(trajectory.response_ids[window], decode),
        "weights": [_short(w) for w in heavy.weights[window]],
        "relative": [_short(w) for w in heavy.relative[window]],
        "first": first,
        "length": len(size),
    }


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to those before it; together they are the whole text.

    Of a character that several tokens make, the last of them has it all and the others have nothing. A tokenizer may
    write a token's space only after another token, so each is read behind the one before it.
    """
    found, before, start, shown = [], "", 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        start, shown = shown, end
        before = decode(ids[start:shown])
    return found


def _size(weight: float) -> float:
    return math.inf if math.isnan(weight) else abs(weight)


def _short(value: float) -> float | None:
    """Six digits, which is what the model's precision gives; JSON has no NaN or infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
