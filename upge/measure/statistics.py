"""Unbiased inner products of means that are known with noise, and how sure what follows from them is.

A mean m is seen R times, each time with independent noise: m_r, r = 1 .. R. Its squared length must not be taken from
the average of these, whose noise adds to it; products of different rounds have none of it in their expectation:

    ⟨m, m⟩ ≈ Σ_{r≠s} w_r w_s ⟨m_r, m_s⟩ / Σ_{r≠s} w_r w_s,

a U-statistic. Errors are those of the jackknife: every figure is computed again without each round.

Legend: R rounds, H parts of another, independent sample, k numbers of a gradient's sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

#: Of the distribution, below the upper end of a 95 % interval.
_BELOW = 0.975


class Estimated(NamedTuple):
    """A figure with the ends of its 95 % interval; NaN where the sample does not tell."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimated:
        """Known without error."""
        return cls(value, value, value)

    def within(self, low: float, high: float) -> Estimated:
        """The same cut to where the figure can lie; NaN stays.

        A value beyond takes its interval along to the edge: cut alone, one that lies wholly beyond would be a point, as
        if the figure were known exactly.
        """
        moved = min(max(self.value, low), high) - self.value
        return Estimated(*(end if math.isnan(end) else min(max(end + moved, low), high) for end in self))

    def root(self) -> Estimated:
        """The square roots; what noise has pushed below 0 is 0."""
        return Estimated(*(value if math.isnan(value) else math.sqrt(max(value, 0.0)) for value in self))

    def inverse_root(self) -> Estimated:
        """1/√ of it, with the ends of the interval changed over. Of 0 and below, ends are infinite: nothing bounds
        them; the value is NaN, as nothing is known of it."""
        value = math.nan if not self.value > 0 else self.value**-0.5
        ends = (end if math.isnan(end) else math.inf if end <= 0 else end**-0.5 for end in (self.high, self.low))
        return Estimated(value, *ends)


def gram(a: Float[Tensor, "R k"], b: Float[Tensor, "H k"]) -> Float[Tensor, "R H"]:
    """All inner products, added up in float64."""
    return a.double() @ b.double().T


def between(products: Float[Tensor, "R H"], left: Float[Tensor, "R"], right: Float[Tensor, "H"]) -> Tensor:
    """⟨m, t⟩ from the products of two independent samples with weights."""
    return left @ products @ right / (left.sum() * right.sum())


def within(products: Float[Tensor, "R R"], weights: Float[Tensor, "R"]) -> Tensor:
    """⟨m, m′⟩ from products of different rounds of one sample; NaN for fewer than two rounds."""
    own = (weights.square() * products.diagonal()).sum()
    return (weights @ products @ weights - own) / (weights.sum().square() - weights.square().sum())


def jackknife(figures: Callable[[list[Tensor]], Tensor], weights: Sequence[Float[Tensor, "n"]]) -> list[Estimated]:
    """The figures of independent samples, and their intervals: value ± t·σ with

        σ² = Σ_samples (n - 1)/n · Σ_i (figure without i - their mean)²

    and t of Student's distribution, whose degrees of freedom are those of Welch and Satterthwaite.

    Args:
        figures: from the weights of every sample's members to a vector of figures.
        weights: of each sample; members of weight 0 are not there. A sample of fewer than two adds no error.
    """
    value = figures(list(weights))
    variance, freedom = torch.zeros_like(value), torch.zeros_like(value)
    for place, own in enumerate(weights):
        there = (own != 0).nonzero()[:, 0].tolist()
        if len(there) < 2:
            continue
        without = []
        for member in there:
            less = own.clone()
            less[member] = 0
            without.append(figures([*weights[:place], less, *weights[place + 1 :]]))
        left_out = torch.stack(without)
        part = (left_out - left_out.mean(dim=0)).square().sum(dim=0) * (len(there) - 1) / len(there)
        variance += part
        freedom += part.square() / (len(there) - 1)
    found = []
    for v, s2, f in zip(value.tolist(), variance.tolist(), freedom.tolist(), strict=True):
        if math.isinf(v) or not math.isfinite(s2):
            # What cannot be computed without one of the members is not known with it either; a noise of 0 is.
            found.append(Estimated.exactly(v if math.isinf(v) else math.nan))
            continue
        # What is the same without each member has no error, and so no degrees of freedom.
        half = float(stats.t.ppf(_BELOW, s2 * s2 / f)) * math.sqrt(s2) if f > 0 else 0.0
        found.append(Estimated(v, v - half, v + half))
    return found
