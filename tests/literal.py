"""Small batches written out as literals: probabilities rather than log-probs, rows of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upge import Trajectories

Rows = Sequence[Sequence[float]]
#: Argument → column whose logarithm it is.
PROBABILITIES = {
    "p": "logprobs",
    "p_old": "behavior_logprobs",
    "p_sampler": "sampler_logprobs",
    "p_reference": "reference_logprobs",
}


def rows(values: Rows) -> Tensor:
    """[B, T] in float64; shorter rows are filled with zeros."""
    width = max(1, max(len(row) for row in values))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in values], dtype=torch.float64)


def trajectories(
    p: Rows | None = None,
    *,
    lengths: Sequence[int] | None = None,
    mask: Rows | None = None,
    rewards: Sequence[float] | None = None,
    group: Sequence[int] | None = None,
    demonstrations: Sequence[int] = (),
    preference: Sequence[int] | None = None,
    step: int = 0,
    **columns: Rows,
) -> Trajectories:
    """A batch from lists. `p`, `p_old`, `p_sampler`, `p_reference` are probabilities; `demonstrations` are row numbers.

    Which tokens count follows from `mask`, else `lengths`, else the lengths of the rows of `p` or of another column.
    Where only a ratio is meant, its logarithm may be given as `logprobs` above 0: the policies of a token are then
    lowered together until none is.
    """
    given = ({"p": p} if p is not None else {}) | columns
    if mask is not None:
        counts = rows(mask).bool()
    else:
        lengths = lengths or [len(row) for row in next(iter(given.values()))]
        counts = torch.arange(max(1, max(lengths))) < torch.tensor(lengths)[:, None]
    size = len(counts)
    named = {name: rows(value) for name, value in given.items()}
    tensors = {PROBABILITIES.get(n, n): v.log() if n in PROBABILITIES else v for n, v in named.items()}
    tensors = {"logprobs": torch.zeros(counts.shape, dtype=torch.float64), **tensors}
    policies = [name for name in tensors if name.endswith("logprobs")]
    lowered = torch.stack([tensors[name] for name in policies]).amax(dim=0).clamp(min=0)
    tensors |= {name: tensors[name] - lowered for name in policies}
    return Trajectories(
        **tensors,
        response_mask=counts,
        rewards=torch.tensor([0.0] * size if rewards is None else rewards, dtype=torch.float64),
        group=torch.tensor(list(range(size)) if group is None else group),
        is_demonstration=torch.tensor([i in set(demonstrations) for i in range(size)]),
        preference=None if preference is None else torch.tensor(preference),
        step=step,
    )
