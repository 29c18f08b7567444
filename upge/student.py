"""Student's t distribution."""

from __future__ import annotations

import math
from statistics import NormalDist

import mpmath


def two_sided(t: float, degrees: float) -> float:
    """P(|T| ≥ |t|): the regularised incomplete beta I_x(ν/2, 1/2) at x = ν/(ν + t²), ν degrees of freedom."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def quantile(share: float, degrees: float) -> float:
    """The t below which a `share` of more than one half of the distribution lies.

    By Newton's method from the normal distribution's, which is nearer to 0: both tails are convex there, so every step
    stays on that side, and a few are enough.
    """
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    t = NormalDist().inv_cdf(share)
    for _ in range(200):
        density = math.exp(constant - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (two_sided(t, degrees) - 2 * (1 - share)) / (2 * density)
        t += step
        if abs(step) <= 1e-12 * t:
            break
    return t
