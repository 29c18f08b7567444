"""The unbiased pass@k: the probability that at least one of k responses, drawn without replacement from n, is correct.

With c correct responses among n (Chen et al., arXiv 2107.03374):

    pass@k = 1 − C(n−c, k)/C(n, k)

Legend: P problems, K values of k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pass_at_k(samples: Int[Tensor, " P"], correct: Int[Tensor, " P"], ks: Sequence[int]) -> Float[Tensor, "P K"]:
    """pass@k of P problems for every k in `ks`, in float64, with a relative error of about 1e-12.

    Args:
        samples: [P] n, the number of responses to each problem; it may differ between problems.
        correct: [P] c, the number of correct responses.
        ks: the K values of k, each from 1 to the smallest n.

    Returns:
        [P, K].

    Raises:
        ValueError: a k is below 1 or above a problem's n, or a c is below 0 or above n.
    """
    return torch.expm1(log_fail_at_k(samples, correct, ks)).abs()  # expm1 is never positive; abs also removes −0


def log_fail_at_k(samples: Int[Tensor, " P"], correct: Int[Tensor, " P"], ks: Sequence[int]) -> Float[Tensor, "P K"]:
    """log(1 − pass@k), with a relative error of about 1e-12 even where pass@k rounds to 1; −inf where k > n − c.

    C(n−c, k)/C(n, k) = ∏_{i<k} (1 − c/(n−i)). The logarithms of all factors have the same sign, so their sum has no
    cancellation, unlike differences of log-factorials. The partial sums give all k at once.

    Args, Returns and Raises are those of `pass_at_k`.
    """
    _check(samples, correct, ks)
    # Problems with equal counts share a row, so there are at most n + 1 rows per n.
    counts, row = torch.unique(torch.stack([samples, correct]).long(), dim=1, return_inverse=True)
    n, c = counts.to(torch.float64).unsqueeze(-1)
    drawn = torch.arange(max(ks), dtype=torch.float64)
    # Once at most c responses remain, all of them are correct, and the factor stays 0.
    logarithms = torch.log1p(-(c / (n - drawn)).clamp(max=1.0)).cumsum(dim=1)
    return logarithms[:, [k - 1 for k in ks]][row]


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, … up to n, and n itself: the values of k at which pass@k is reported.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; pass@k needs at least one sample")
    return tuple(dict.fromkeys([2**power for power in range(n.bit_length())] + [n]))


def _check(samples: Tensor, correct: Tensor, ks: Sequence[int]) -> None:
    for name, counts in (("samples", samples), ("correct", correct)):
        if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(f"{name}: found {counts.dtype} of shape {list(counts.shape)}, expected integers [P]")
    if len(samples) != len(correct):
        raise ValueError(f"samples has {len(samples)} problems and correct has {len(correct)}; give one count for each")
    if len(samples) == 0:
        raise ValueError("there are no problems; pass@k needs at least one")
    if not ks:
        raise ValueError("ks is empty; give at least one k")
    for problem, (n, c) in enumerate(zip(samples.tolist(), correct.tolist(), strict=True)):
        if not 0 <= c <= n:
            raise ValueError(f"problem {problem} has {c} correct responses of {n}; the count must be from 0 to {n}")
    least = int(samples.min())
    for k in ks:
        if not 1 <= k <= least:
            raise ValueError(f"k is {k}, but pass@k needs 1 ≤ k ≤ n, and the smallest n is {least}")
