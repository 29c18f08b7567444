"""Unbiased inner products of noisy means, and confidence intervals of functions of them.

A mean m is observed R times with independent noise: m_r, r = 1 .. R. The squared length of the average of these is
biased upwards, because the noise adds to it. Products of different rounds are not:

    ⟨m, m⟩ ≈ Σ_{r≠s} w_r w_s ⟨m_r, m_s⟩ / Σ_{r≠s} w_r w_s,

a U-statistic. Standard errors come from the jackknife, which recomputes every estimate without each round.

Legend: R rounds, H parts of another independent sample, k numbers of a gradient's sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

#: The quantile of Student's distribution at the upper end of a 95 % interval.
_UPPER_QUANTILE = 0.975


class Estimated(NamedTuple):
    """An estimate with the ends of its 95 % interval; NaN where the sample does not determine it."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimated:
        """A value that is known without error."""
        return cls(value, value, value)

    def within(self, low: float, high: float) -> Estimated:
        """The estimate clamped to its possible range [low, high]; NaN is unchanged.

        If the value lies outside the range, the interval is shifted with it to the edge before it is clamped. Otherwise
        an interval that lies entirely outside would collapse to a point, as if the value were known exactly.
        """
        moved = min(max(self.value, low), high) - self.value
        return Estimated(*(end if math.isnan(end) else min(max(end + moved, low), high) for end in self))

    def root(self) -> Estimated:
        """The square roots; a number that noise has pushed below 0 becomes 0."""
        return Estimated(*(value if math.isnan(value) else math.sqrt(max(value, 0.0)) for value in self))

    def inverse_root(self) -> Estimated:
        """1/√x of the value and of the ends, which swap places.

        An end that is 0 or negative becomes infinite, because nothing bounds it there. Such a value becomes NaN.
        """
        value = math.nan if not self.value > 0 else self.value**-0.5
        ends = (end if math.isnan(end) else math.inf if end <= 0 else end**-0.5 for end in (self.high, self.low))
        return Estimated(value, *ends)


def gram(a: Float[Tensor, "R k"], b: Float[Tensor, "H k"]) -> Float[Tensor, "R H"]:
    """All inner products of rows of `a` with rows of `b`, accumulated in float64."""
    return a.double() @ b.double().T


def between(products: Float[Tensor, "R H"], left: Float[Tensor, "R"], right: Float[Tensor, "H"]) -> Tensor:
    """⟨m, t⟩ from the products of two independent weighted samples."""
    return left @ products @ right / (left.sum() * right.sum())


def within(products: Float[Tensor, "R R"], weights: Float[Tensor, "R"]) -> Tensor:
    """⟨m, m′⟩ from products of different rounds of one weighted sample; NaN with fewer than two rounds."""
    own = (weights.square() * products.diagonal()).sum()
    return (weights @ products @ weights - own) / (weights.sum().square() - weights.square().sum())


def jackknife(statistics: Callable[[list[Tensor]], Tensor], weights: Sequence[Float[Tensor, "n"]]) -> list[Estimated]:
    """Jackknife estimates of statistics of independent samples, with intervals value ± t·σ:

        σ² = Σ_samples (n - 1)/n · Σ_i (statistic without i - mean of these)²

    where t is a quantile of Student's distribution with the degrees of freedom of Welch and Satterthwaite.

    Args:
        statistics: maps the weights of the members of every sample to a vector of statistics.
        weights: [n] of each sample. A member of weight 0 counts as absent. A sample with fewer than two members adds
            no error.

    Returns:
        An estimate of each statistic.
    """
    value = statistics(list(weights))
    variance, freedom = torch.zeros_like(value), torch.zeros_like(value)
    for place, own in enumerate(weights):
        members = (own != 0).nonzero()[:, 0].tolist()
        if len(members) < 2:
            continue
        without = []
        for member in members:
            less = own.clone()
            less[member] = 0
            without.append(statistics([*weights[:place], less, *weights[place + 1 :]]))
        left_out = torch.stack(without)
        part = (left_out - left_out.mean(dim=0)).square().sum(dim=0) * (len(members) - 1) / len(members)
        variance += part
        freedom += part.square() / (len(members) - 1)
    estimates = []
    for v, s2, f in zip(value.tolist(), variance.tolist(), freedom.tolist(), strict=True):
        if math.isinf(v) or not math.isfinite(s2):
            # A statistic that is undefined without one of the members counts as unknown. An infinite one (from a
            # noise of 0) is known.
            estimates.append(Estimated.exactly(v if math.isinf(v) else math.nan))
            continue
        # A statistic that does not change without any member has no error, and so no degrees of freedom.
        half = float(stats.t.ppf(_UPPER_QUANTILE, s2 * s2 / f)) * math.sqrt(s2) if f > 0 else 0.0
        estimates.append(Estimated(v, v - half, v + half))
    return estimates
