r"""Bounds of the size of a number that follow from its structure, in microseconds.

`9^{9^{9^9}}` has more digits than fit into memory, and $\binom{10^9}{5\cdot10^8}$ takes hours to evaluate, but rules
such as ln|b^e| = e·ln|b| show that both are too large to be 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

_MARGIN = math.log(1e6)
"""Two sizes certainly differ if one is over a million times the other, which no rounding or percent sign explains."""
_LEAST = math.log(1e-2)
_HUGE = 1e300

Parsed = Any  # an expression of sympy, which has no types


class Size(NamedTuple):
    """Bounds of ln|x| for a number x, real or not.

    Attributes:
        low: the lower bound; -∞ if x may be 0.
        high: the upper bound.
        sign: 1, -1, or 0 if the sign is unknown or x is not real.
        is_whole: whether x is known to be an integer.
    """

    low: float
    high: float
    sign: int = 0
    is_whole: bool = False


def magnitude_of(expression: Parsed) -> Size | None:
    """The size of a number; None for 0, for anything with letters, and for unknown functions."""
    name = type(expression).__name__
    if name in _CONSTANTS:
        return Size(_CONSTANTS[name], _CONSTANTS[name], 1)
    if name == "Float":
        return _of_float(expression)
    if getattr(expression, "is_Rational", False):
        return _of_rational(expression)
    rule = _RULES.get(name)
    if rule is None:
        return None
    parts: list[Size] = []
    for part in expression.args:
        size = magnitude_of(part)
        if size is None:
            return None
        parts.append(size)
    return rule(*parts)


def _of_rational(number: Parsed) -> Size | None:
    if not number.p:
        return None
    size = math.log(abs(number.p)) - math.log(number.q)
    return _bounded(size, size, 1 if number.p > 0 else -1, number.q == 1)


def _of_float(number: Parsed) -> Size | None:
    """Bounds of ±m·2^k: if m has b bits, it is between 2^(k + b - 1) and 2^(k + b)."""
    is_negative, mantissa, exponent, bits = number._mpf_
    if not mantissa:  # 0, ∞ or NaN
        return None
    high = (exponent + bits) * math.log(2)
    return _bounded(high - math.log(2), high, -1 if is_negative else 1)


def _product(*parts: Size) -> Size:
    low, high = sum(part.low for part in parts), sum(part.high for part in parts)
    return _bounded(low, high, math.prod(part.sign for part in parts), all(part.is_whole for part in parts))


def _sum(*parts: Size) -> Size:
    """|x + Σy| ≤ n·max. It is ≥ |x| if all have one sign, and ≥ |x| - Σ|y| ≥ |x|/2 if |x| ≥ 2Σ|y|."""
    *others, largest = sorted(parts)
    count, is_whole = math.log(len(parts)), all(part.is_whole for part in parts)
    high = max(part.high for part in parts) + count
    if largest.sign and all(part.sign == largest.sign for part in others):
        return _bounded(largest.low, high, largest.sign, is_whole)
    if largest.low > max(part.high for part in others) + count + math.log(2):
        sign = largest.sign if all(part.sign for part in others) else 0
        return _bounded(largest.low - math.log(2), high, sign, is_whole)
    return _bounded(-math.inf, high, 0, is_whole)


def _power(base: Size, exponent: Size) -> Size | None:
    """ln|b^e| = e·ln|b| for every b and every real e."""
    if not exponent.sign:
        return None
    least, most = _at_least(exponent.low), _at_most(exponent.high)
    low = _times(least if base.low >= 0 else most, base.low)
    high = _times(most if base.high >= 0 else least, base.high)
    if exponent.sign < 0:
        low, high = -high, -low
    return _bounded(low, high, max(base.sign, 0), base.is_whole and exponent.is_whole and exponent.sign > 0)


def _exponential(exponent: Size) -> Size | None:
    return _power(Size(1.0, 1.0, 1), exponent)


def _factorial(number: Size) -> Size | None:
    """ln n! = lgamma(n + 1), which is 0 at n = 1 and increases from there."""
    if number.sign != 1 or not number.is_whole:
        return None
    low, most = math.lgamma(_at_least(number.low) + 1.0), _at_most(number.high)
    return _bounded(max(low, 0.0), math.inf if most == math.inf else math.lgamma(most + 1.0), 1, True)


def _binomial(above: Size, below: Size) -> Size | None:
    """(n/k)^k ≤ C(n, k) ≤ 2^n for integers 1 ≤ k ≤ n; k·ln(n/k) is concave in k, so smallest at a bound of k."""
    if above.sign != 1 or below.sign != 1 or not (above.is_whole and below.is_whole) or below.high > above.low:
        return None
    low = min(_at_least(size) * (above.low - size) for size in below[:2])
    return _bounded(low, _times(_at_most(above.high), math.log(2)), 1, True)


def _bounded(low: float, high: float, sign: int, is_whole: bool = False) -> Size:
    """Bounds slightly widened for rounding. Beyond ±1e300 they are limited so that x is never taken for 0 or ∞."""
    low, high = low - 1e-9 * abs(low) - 1e-9, high + 1e-9 * abs(high) + 1e-9
    low = min(low, _HUGE) if low > -_HUGE else -math.inf
    high = max(high, -_HUGE) if high < _HUGE else math.inf
    return Size(low, high, sign, is_whole)


def _at_least(log: float) -> float:
    return math.exp(min(log, 660.0))


def _at_most(log: float) -> float:
    return math.exp(log) if log < 660.0 else math.inf


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0.0 or b == 0.0 else a * b


_CONSTANTS = {"Pi": math.log(math.pi), "Exp1": 1.0}
_RULES: dict[str, Callable[..., Size | None]] = {
    "Mul": _product,
    "Add": _sum,
    "Pow": _power,
    "exp": _exponential,
    "factorial": _factorial,
    "binomial": _binomial,
}


def have_other_sizes(gold: Parsed, given: Parsed) -> bool:
    """Whether the sizes of two numbers prove that they differ; two sizes below 0.01 never do."""
    sizes = magnitude_of(gold), magnitude_of(given)
    if sizes[0] is None or sizes[1] is None:
        return False
    smaller, larger = sorted((sizes[0], sizes[1]))
    return larger.low > max(smaller.high + _MARGIN, _LEAST)
