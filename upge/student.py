"""Student's t distribution."""

from __future__ import annotations

import mpmath


def two_sided(t: float, degrees: float) -> float:
    """P(|T| ≥ |t|): the regularised incomplete beta I_x(ν/2, 1/2) at x = ν/(ν + t²), ν degrees of freedom."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def quantile(share: float, degrees: float) -> float:
    """The t below which a `share` of more than one half of the distribution lies."""
    low, high = 0.0, 1.0
    while two_sided(high, degrees) > 2 * (1 - share):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > 2 * (1 - share) else (low, middle)
    return (low + high) / 2
