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

Legend: R rounds, n estimates, H independent estimates of the true gradient, k numbers of a gradient's sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.measure.statistics import Estimated, between, gram, jackknife, within

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
        """The sample that n single estimates make up.

        Args:
            estimates: [n, k] the estimates.
            rounds: [n] the round that each belongs to, from 0.
            total: R, the number of rounds.
        """
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
