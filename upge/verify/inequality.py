r"""Fast proofs that two expressions differ, tried before math-verify evaluates and simplifies them.

There are two tests. Each either proves that the expressions differ, or proves nothing.

- By size (`magnitude_of`): bounds of ln|x| follow from the structure of an expression in microseconds, by rules such as
  ln|b^e| = e·ln|b|. `9^{9^{9^9}}` has more digits than fit into memory, and $\binom{10^9}{5\cdot10^8}$ takes hours to
  evaluate, but both are too large to be 3.5.
- By value: equal expressions have equal values when the same numbers are substituted for the same letters.

Neither test ever grants a reward; only math-verify does. What they refuse, math-verify would also refuse after
simplification, or would never finish.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

MARGIN = math.log(1e6)
"""Two sizes differ for certain if one is over a million times the other, more than rounding or a percent sign does."""
_HUGE = 1e300

Parsed = Any  # what math-verify parses: an expression, set, matrix or relation of sympy, which has no types


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
    """(n/k)^k ≤ C(n, k) ≤ 2^n for integers 1 ≤ k ≤ n; k·ln(n/k) is concave in k, so least at one of the bounds of k."""
    if above.sign != 1 or below.sign != 1 or not (above.is_whole and below.is_whole) or below.high > above.low:
        return None
    low = min(_at_least(size) * (above.low - size) for size in below[:2])
    return _bounded(low, _times(_at_most(above.high), math.log(2)), 1, True)


def _bounded(low: float, high: float, sign: int, is_whole: bool = False) -> Size:
    """Bounds slightly widened against rounding. Beyond ±1e300 they are limited so that x is never taken for 0 or ∞."""
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


SMALLEST = 1e-2
"""If both values are below this, they prove nothing, because math-verify rounds to 6 decimals."""
DIFFERENCE = 1e-3
"""The smallest difference, relative to the larger value, that proves anything."""
_LEAST = -4.6
"""ln of `SMALLEST`."""
_POINTS = (1.0, 37.0)
"""A letter gets a number between one and two times each of these; at one of them a root's branch may differ."""
_DIGITS = 150
_LARGEST, _TINIEST = 1e50, 1e-30
"""Bounds of every evaluated part: between them, `_DIGITS` digits make a value certain, and evaluation is fast."""
_CANCELLED = 1e-20
"""Relative size below which a sum, or a distance from the negative axis, may be an inexact 0."""

Value = Any  # a number of mpmath, which has no types


def are_unequal(gold: Parsed, given: Parsed) -> bool:
    """Whether a parsed answer provably differs from the ground truth.

    Only expressions are compared. Sets, matrices and relations are not, except that of an answer's equation the last
    side is compared if the ground truth is no equation, as in math-verify. Names are not compared, because math-verify
    compares them as texts, and neither is anything with a percent sign, which may or may not mean 1/100.
    """
    from math_verify.grader import is_equation, take_last_relation

    if not is_equation(gold) and is_equation(given):
        given = take_last_relation(given).rhs
    if gold == given or not _is_expression(gold) or not _is_expression(given):
        return False
    gold_size, given_size = magnitude_of(gold), magnitude_of(given)
    if gold_size is not None and given_size is not None:
        smaller, larger = sorted((gold_size, given_size))
        if larger.low > max(smaller.high + MARGIN, _LEAST):
            return True
    return _have_other_values(gold, given)


def _is_expression(parsed: Parsed) -> bool:
    from sympy import Expr, Symbol, UnevaluatedExpr

    return isinstance(parsed, Expr) and not isinstance(parsed, Symbol) and not parsed.has(UnevaluatedExpr)


def _have_other_values(gold: Parsed, given: Parsed) -> bool:
    gold_values, given_values = _values(gold), _values(given)
    if gold_values is None or given_values is None:
        return False
    return all(_differ(a, b) for a, b in zip(gold_values, given_values, strict=True))


def _differ(a: complex, b: complex) -> bool:
    larger = max(abs(a), abs(b))
    return larger > SMALLEST and abs(a - b) > DIFFERENCE * larger


@functools.lru_cache(maxsize=1024)
def _values(expression: Parsed) -> tuple[complex, ...] | None:
    """The values of an expression at `_POINTS`; None if they are uncertain, hard to compute, or not finite."""
    try:
        return tuple(complex(_value(expression, point)) for point in _POINTS)
    except Exception:  # what mpmath cannot evaluate proves nothing
        return None


class _UncertainValueError(Exception):
    """A value is not certain."""


def _value(expression: Parsed, point: float) -> Value:
    """The value of an expression, from the innermost parts outwards, so that a part that is too large ends it early."""
    rule = _rules().get(type(expression).__name__)
    if rule is None:
        raise _UncertainValueError
    if not expression.args:
        value = rule(expression, point)
    else:
        value = rule(*[_value(part, point) for part in expression.args])
    if value and not _TINIEST < abs(value) < _LARGEST:
        raise _UncertainValueError
    return value


def _number(letter: Parsed, point: float) -> float:
    """The number for a letter. It depends on the letter's name only, not on sympy's assumptions about it."""
    return point * (1.0 + zlib.crc32(letter.name.lower().encode()) / 2**32)


@functools.cache
def _rules() -> dict[str, Callable[..., Value]]:
    """Class name of an expression → function of its parts' values, or of itself and the point if it has no parts."""
    import mpmath

    exact = mpmath.MPContext()  # not the shared context, whose precision sympy changes
    exact.dps = _DIGITS

    def total(*terms: Value) -> Value:
        value = sum(terms)
        if abs(value) <= _CANCELLED * max(map(abs, terms)) and any(terms):
            raise _UncertainValueError
        return value

    def off_branch_cut(value: Value) -> Value:
        """`value`, if it is certain on which side of the branch cut of roots and logarithms it lies."""
        if value.real < 0 and 0 < abs(value.imag) <= _CANCELLED * abs(value):
            raise _UncertainValueError
        return value

    def logarithm(number: Value, *base: Value) -> Value:
        value = exact.ln(off_branch_cut(number))
        return value / exact.ln(off_branch_cut(*base)) if base else value

    def binomial(above: Value, below: Value) -> Value:
        if min(above.real, below.real) < 0:  # sympy and mpmath may differ here
            raise _UncertainValueError
        return exact.binomial(above, below)

    def rational(number: Parsed, _: float) -> Value:
        return exact.mpf(number.p) / number.q

    return {
        **dict.fromkeys(("Integer", "Rational", "Half", "One", "Zero", "NegativeOne"), rational),
        "Float": lambda number, _: exact.make_mpf(number._mpf_),
        "Pi": lambda *_: +exact.pi,
        "Exp1": lambda *_: +exact.e,
        "ImaginaryUnit": lambda *_: exact.mpc(0, 1),
        "Symbol": lambda letter, point: exact.mpf(_number(letter, point)),
        "Add": total,
        "Mul": lambda *factors: math.prod(factors),
        "Pow": lambda base, exponent: off_branch_cut(base) ** exponent,
        "exp": exact.exp,
        "log": logarithm,
        "sin": exact.sin,
        "cos": exact.cos,
        "tan": exact.tan,
        "factorial": exact.factorial,
        "binomial": binomial,
        "Abs": abs,
    }
