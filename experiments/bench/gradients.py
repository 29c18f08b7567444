"""Whether two methods compute the same gradient: what is measured against each other must solve the same problem."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two entries, relative to the largest entry that is expected."""
    scale = float(expected.abs().max())
    # Row by row: a gradient of an output embedding in float64 is large, and the check must not need much more.
    blocks = zip(_blocks(found), _blocks(expected), strict=True)
    gaps = torch.stack([(a.to(expected.dtype) - b).abs().max() for a, b in blocks])
    return float(gaps.max()) / (scale or 1.0)


def checked(pairs: Iterable[tuple[Tensor | None, Tensor]], tolerance: float, who: str) -> float:
    """The largest `difference` over (found, expected) pairs.

    Raises:
        AssertionError: one is missing, of another shape, not finite, or further off than `tolerance`.
    """
    worst = 0.0
    for found, expected in pairs:
        if found is None or found.shape != expected.shape:
            raise AssertionError(f"{who}: a gradient is missing or of another shape than {tuple(expected.shape)}")
        gap = difference(found, expected)
        if not gap <= tolerance:
            raise AssertionError(f"{who}: a gradient off by {gap:.1e} of its largest entry; tolerated is {tolerance:g}")
        worst = max(worst, gap)
    return worst


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.atleast_1d(tensor.detach()).split(4096)
