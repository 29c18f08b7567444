"""The figures of an estimator: mean, bias, noise, and how much of a step goes the right way.

g is an estimate, m = E g its mean, t the true gradient; an algorithm's own scale (a division by lengths or by a
standard deviation) is no error, so most figures do not depend on it:

    cosine     ⟨m, t⟩ / (‖m‖‖t‖)
    bias       min_{c ≥ 0} ‖c·m - t‖ / ‖t‖ = √(1 - max(cosine, 0)²): what remains with the best scale, the sine
    scale      ⟨m, t⟩ / ‖t‖²: how much of t there is in m
    raw_bias   ‖m - t‖ / ‖t‖: with the scale that the algorithm has
    noise      √(E‖g - m‖²) / ‖m‖
    snr        ‖m‖² / E‖g - m‖², of one estimate
    alignment  E⟨g, t⟩ / √(E‖g‖²·‖t‖²) = cosine / √(1 + 1/snr): bias and noise in one figure. A step of a given length
               along g gains this share of what one along t would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.measure.statistics import Estimated, between, gram, jackknife, within

#: A share of E‖g‖² below which a variance is a rounding error of gradients in float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sample:
    """What is known of an estimator after R rounds.

    Attributes:
        means: [R, k] the mean estimate of each round, independent of each other.
        power: [R] the mean of ‖g‖² over the estimates of the round.
        counts: [R] how many estimates that is; 0 where the round has none.
    """

    means: Float[Tensor, "R k"]
    power: Float[Tensor, "R"]
    counts: Float[Tensor, "R"]

    @classmethod
    def of(cls, estimates: Float[Tensor, "n k"], rounds: Tensor, total: int) -> Sample:
        """From single estimates; `rounds` [n] says which of `total` rounds each is of."""
        sums = estimates.new_zeros(total, estimates.shape[1]).index_add(0, rounds, estimates)
        power = torch.zeros(total, dtype=torch.float64)
        power = power.index_add(0, rounds, estimates.double().square().sum(dim=1))
        counts = torch.bincount(rounds, minlength=total).double()
        least = counts.clamp(min=1)
        return cls(sums / least[:, None].to(sums.dtype), power / least, counts)


@dataclass(frozen=True)
class Figures:
    """See the module; `power` is E‖g‖², `signal` ‖m‖², both as they are, without any scale taken out."""

    cosine: Estimated
    bias: Estimated
    scale: Estimated
    raw_bias: Estimated
    noise: Estimated
    snr: Estimated
    alignment: Estimated
    power: Estimated
    signal: Estimated


def figures(sample: Sample, target: Float[Tensor, "H k"]) -> Figures:
    """The figures of an estimator against the mean of H independent estimates of the true gradient."""
    own, cross, true = gram(sample.means, sample.means), gram(sample.means, target), gram(target, target)

    def all_of(weights: list[Tensor]) -> Tensor:
        rounds, parts = weights
        mm, mt, tt = within(own, rounds), between(cross, rounds, parts), within(true, parts)
        power = (rounds * sample.power).sum() / rounds.sum()
        return _derived(mm, mt, tt, power)

    found = jackknife(all_of, [sample.counts, torch.ones(len(target), dtype=torch.float64)])
    return _named(found)


def exact_figures(mean: Float[Tensor, "k"], power: float, target: Float[Tensor, "k"]) -> Figures:
    """The same where mean, E‖g‖² and the true gradient are known."""
    mean, target = mean.double(), target.double()
    products = mean @ mean, mean @ target, target @ target, torch.tensor(power, dtype=torch.float64)
    return _named([Estimated.exactly(value) for value in _derived(*products).tolist()])


def _derived(mm: Tensor, mt: Tensor, tt: Tensor, power: Tensor) -> Tensor:
    """[8] the figures but for the noise; of bias and raw_bias the squares: those have an error that is even on both
    sides."""
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
    """Its root; NaN where noise, or no signal at all, leaves a squared length that is not positive."""
    return torch.where(square > 0, square, math.nan).sqrt()


def without_rounding(variance: Tensor, power: Tensor) -> Tensor:
    """The variance, 0 where it is only what float32 leaves of the difference of two equal numbers."""
    return torch.where(variance.abs() < _ROUNDING * power, torch.zeros_like(variance), variance)


def _named(found: list[Estimated]) -> Figures:
    cosine, bias, scale, raw_bias, snr, alignment, power, signal = found
    # The noise is nothing but the snr, whose error is even where ‖m‖² is nearly lost in it: there the noise has no end.
    return Figures(
        cosine.within(-1, 1), bias.within(0, 1).root(), scale, raw_bias.root(), snr.inverse_root(), snr,
        alignment.within(-1, 1), power, signal,
    )  # fmt: skip


def cosine_of(a: Sample, b: Sample) -> Estimated:
    """The cosine of the means of two estimators of the same rounds, each of any number of estimates."""
    products = [gram(x, y) for x, y in ((a.means, b.means), (a.means, a.means), (b.means, b.means))]
    there = ((a.counts > 0) & (b.counts > 0)).double()

    def cosine(weights: list[Tensor]) -> Tensor:
        ab, aa, bb = (within((one + one.T) / 2, weights[0]) for one in products)
        return (ab / (length(aa) * length(bb)))[None]

    return jackknife(cosine, [there])[0].within(-1, 1)


def cosine_with(sample: Sample, direction: Float[Tensor, "H k"]) -> Estimated:
    """The cosine of an estimator's mean with that of an independent sample, or with one direction that is known."""
    own, cross, other = gram(sample.means, sample.means), gram(sample.means, direction), gram(direction, direction)

    def cosine(weights: list[Tensor]) -> Tensor:
        rounds, parts = weights
        square = within(other, parts) if len(direction) > 1 else other[0, 0]
        return (between(cross, rounds, parts) / (length(within(own, rounds)) * length(square)))[None]

    parts = torch.ones(len(direction), dtype=torch.float64)
    return jackknife(cosine, [sample.counts, parts])[0].within(-1, 1)
