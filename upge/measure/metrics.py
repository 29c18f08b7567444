"""The metrics of an estimator: its mean, its bias, its noise, and the progress that a step along it makes.

Let g be an estimate, m = E g its mean and t the true gradient. An algorithm's own scale (a division by lengths or by a
standard deviation) is not an error, so most metrics do not depend on it:

    cosine     ⟨m, t⟩ / (‖m‖‖t‖)
    bias       min_{c ≥ 0} ‖c·m - t‖ / ‖t‖ = √(1 - max(cosine, 0)²): the error that the best scale c leaves (the sine)
    scale      ⟨m, t⟩ / ‖t‖²: the coefficient of t in m
    raw_bias   ‖m - t‖ / ‖t‖: the bias with the algorithm's own scale
    noise      √(E‖g - m‖²) / ‖m‖
    snr        ‖m‖² / E‖g - m‖², the signal-to-noise ratio of one estimate
    alignment  E⟨g, t⟩ / √(E‖g‖²·‖t‖²) = cosine / √(1 + 1/snr): combines bias and noise. To first order, a step of a
               given length along g gains this fraction of what a step along t gains.

Means are observed R times with independent noise: m_r, r = 1 .. R. The squared length of their average is biased
upwards, because the noise adds to it. Products of different rounds are not, so inner products are U-statistics:

    ⟨m, m⟩ ≈ Σ_{r≠s} w_r w_s ⟨m_r, m_s⟩ / Σ_{r≠s} w_r w_s.

Standard errors come from the jackknife, which recomputes every estimate without each round.

Legend: R rounds, n estimates, H independent estimates of the true gradient, k numbers of a gradient's sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        weights: [n] the weights of each sample's members. A member of weight 0 counts as absent. A sample with fewer
            than two members adds no error.
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


#: Below this fraction of E‖g‖², a variance is a rounding error of float32 gradients.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sample:
    """Sufficient statistics of an estimator after R rounds.

    Attributes:
        means: [R, k] the mean estimate of each round; the rounds are independent.
        power: [R] the mean of ‖g‖² over the estimates of each round.
        counts: [R] the number of estimates in each round; 0 where a round has none.
    """

    means: Float[Tensor, "R k"]
    power: Float[Tensor, "R"]
    counts: Float[Tensor, "R"]

    @classmethod
    def of(cls, estimates: Float[Tensor, "n k"], rounds: Tensor, total: int) -> Sample:
        """The sample of n single estimates, each with the round that it belongs to, from 0; R = `total`."""
        sums = estimates.new_zeros(total, estimates.shape[1]).index_add(0, rounds, estimates)
        power = torch.zeros(total, dtype=torch.float64)
        power = power.index_add(0, rounds, estimates.double().square().sum(dim=1))
        counts = torch.bincount(rounds, minlength=total).double()
        least = counts.clamp(min=1)
        return cls(sums / least[:, None].to(sums.dtype), power / least, counts)


@dataclass(frozen=True)
class Metrics:
    """The metrics that the module's docstring defines; `power` is E‖g‖² and `signal` is ‖m‖², both unscaled."""

    cosine: Estimated
    bias: Estimated
    scale: Estimated
    raw_bias: Estimated
    noise: Estimated
    snr: Estimated
    alignment: Estimated
    power: Estimated
    signal: Estimated


def metrics(sample: Sample, target: Float[Tensor, "H k"]) -> Metrics:
    """The metrics of an estimator relative to the mean of H independent estimates of the true gradient."""
    own, cross, true = gram(sample.means, sample.means), gram(sample.means, target), gram(target, target)

    def metrics_of(weights: list[Tensor]) -> Tensor:
        rounds, parts = weights
        mm, mt, tt = within(own, rounds), between(cross, rounds, parts), within(true, parts)
        power = (rounds * sample.power).sum() / rounds.sum()
        return _derived(mm, mt, tt, power)

    return _named(jackknife(metrics_of, [sample.counts, torch.ones(len(target), dtype=torch.float64)]))


def exact_metrics(mean: Float[Tensor, "k"], power: float, target: Float[Tensor, "k"]) -> Metrics:
    """The metrics of an estimator whose mean, E‖g‖² (`power`) and true gradient (`target`) are known exactly."""
    mean, target = mean.double(), target.double()
    products = mean @ mean, mean @ target, target @ target, torch.tensor(power, dtype=torch.float64)
    return _named([Estimated.exactly(value) for value in _derived(*products).tolist()])


def _derived(mm: Tensor, mt: Tensor, tt: Tensor, power: Tensor) -> Tensor:
    """[8] all metrics except the noise, with bias and raw_bias squared, because their squares have symmetric errors."""
    variance = without_rounding(power - mm, power)
    cosine = mt / (length(mm) * length(tt))
    return torch.stack(
        [
            cosine,
            1 - cosine.clamp(min=0).square(),
            mt / length(tt).square(),
            (mm - 2 * mt + tt) / length(tt).square(),
            mm / variance,
            mt / (power.sqrt() * length(tt)),
            power,
            mm,
        ]
    )


def length(square: Tensor) -> Tensor:
    """The square root of a squared length; NaN where noise, or a lack of signal, makes it zero or negative."""
    return torch.where(square > 0, square, math.nan).sqrt()


def without_rounding(variance: Tensor, power: Tensor) -> Tensor:
    """The variance, set to 0 where it is only the float32 rounding error of a difference of equal numbers."""
    return torch.where(variance.abs() < _ROUNDING * power, torch.zeros_like(variance), variance)


def _named(derived: list[Estimated]) -> Metrics:
    cosine, bias, scale, raw_bias, snr, alignment, power, signal = derived
    # The noise follows from the snr, whose error stays symmetric where ‖m‖² is barely above its error. There the
    # interval of the noise has no upper end.
    return Metrics(
        cosine.within(-1, 1), bias.within(0, 1).root(), scale, raw_bias.root(), snr.inverse_root(), snr,
        alignment.within(-1, 1), power, signal,
    )  # fmt: skip


def cosine_of(a: Sample, b: Sample) -> Estimated:
    """The cosine between the means of two estimators on the same rounds, each with any number of estimates."""
    products = [gram(x, y) for x, y in ((a.means, b.means), (a.means, a.means), (b.means, b.means))]
    in_both = ((a.counts > 0) & (b.counts > 0)).double()

    def cosine(weights: list[Tensor]) -> Tensor:
        ab, aa, bb = (within((one + one.T) / 2, weights[0]) for one in products)
        return (ab / (length(aa) * length(bb)))[None]

    return jackknife(cosine, [in_both])[0].within(-1, 1)


def cosine_with(sample: Sample, direction: Float[Tensor, "H k"]) -> Estimated:
    """The cosine between an estimator's mean and the mean of an independent sample, or one known direction (H = 1)."""
    own, cross, other = gram(sample.means, sample.means), gram(sample.means, direction), gram(direction, direction)

    def cosine(weights: list[Tensor]) -> Tensor:
        rounds, parts = weights
        square = within(other, parts) if len(direction) > 1 else other[0, 0]
        return (between(cross, rounds, parts) / (length(within(own, rounds)) * length(square)))[None]

    parts = torch.ones(len(direction), dtype=torch.float64)
    return jackknife(cosine, [sample.counts, parts])[0].within(-1, 1)
