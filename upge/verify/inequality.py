r"""Are two expressions certainly different? What can be said at once, before math-verify evaluates and simplifies them.

Two tests, each of which proves that they differ or nothing. By size (`upge.verify.magnitude`): `9^{9^{9^9}}`, which
nobody can evaluate, is known not to be 3.5. By value: equal expressions have equal values wherever the same numbers are
put for the same letters. Neither is ever the reason for a reward, so that a reward is math-verify's as before; what
they refuse, math-verify refuses after simplifying it, or never gets done with.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

from upge.verify.magnitude import MARGIN, magnitude_of

SMALLEST = 1e-2
"""Values below, of both, prove nothing: math-verify rounds to 6 decimals."""
DIFFERENCE = 1e-3
"""What values differ by, relative to the larger, to prove something."""
_LEAST = -4.6
"""ln of `SMALLEST`."""
_POINTS = (1.0, 37.0)
"""Letters stand for numbers between once and twice that; a branch of a root or logarithm may differ at one of them."""
_DIGITS = 150
_LARGEST, _TINIEST = 1e50, 1e-30
"""Of a part that is evaluated: with `_DIGITS` a value is certain, and nothing takes long."""
_CANCELLED = 1e-20
"""What may be left of a sum, and how near the negative axis a number may be: less may be a 0 that was not met."""


def are_unequal(gold: Any, given: Any) -> bool:
    """Is it proved that a parsed answer is not the ground truth?

    Only expressions are compared: no sets, matrices, relations (but the last side of an answer's equation where the
    ground truth has none, as math-verify does it), no names, which are compared as texts, and nothing with a percent
    sign, which may or may not count as 1/100.
    """
    from math_verify.grader import is_equation, take_last_relation

    if not is_equation(gold) and is_equation(given):
        given = take_last_relation(given).rhs
    if gold == given or not _is_expression(gold) or not _is_expression(given):
        return False
    sizes = magnitude_of(gold), magnitude_of(given)
    if None not in sizes:
        smaller, larger = sorted(sizes)
        if larger.low > max(smaller.high + MARGIN, _LEAST):
            return True
    return _have_other_values(gold, given)


def _is_expression(parsed: Any) -> bool:
    from sympy import Expr, Symbol, UnevaluatedExpr

    return isinstance(parsed, Expr) and not isinstance(parsed, Symbol) and not parsed.has(UnevaluatedExpr)


def _have_other_values(gold: Any, given: Any) -> bool:
    values = _values(gold), _values(given)
    if None in values:
        return False
    return all(_differ(a, b) for a, b in zip(*values, strict=True))


def _differ(a: complex, b: complex) -> bool:
    larger = max(abs(a), abs(b))
    return larger > SMALLEST and abs(a - b) > DIFFERENCE * larger


@functools.lru_cache(maxsize=1024)
def _values(expression: Any) -> tuple[complex, ...] | None:
    """Its values at `_POINTS`; None where they are not certain, hard to find, or not finite numbers."""
    try:
        return tuple(complex(_value(expression, point)) for point in _POINTS)
    except Exception:  # whatever mpmath cannot do; it proves nothing
        return None


class _Unknown(Exception):
    """A value that is not certain."""


def _value(expression: Any, point: float) -> Any:
    """Worked out from the innermost parts outwards, so that a part that is too large stops it before it takes long."""
    find = _rules().get(type(expression).__name__)
    if find is None:
        raise _Unknown
    if not expression.args:
        value = find(expression, point)
    else:
        value = find(*[_value(part, point) for part in expression.args])
    if value and not _TINIEST < abs(value) < _LARGEST:
        raise _Unknown
    return value


def _number(letter: Any, point: float) -> float:
    """A number that depends on the letter's name only, not on whether it was taken for real."""
    return point * (1.0 + zlib.crc32(letter.name.lower().encode()) / 2**32)


@functools.cache
def _rules() -> dict[str, Any]:
    """How to find the value of each kind of expression: of its parts' values, or of itself where it has no parts."""
    import mpmath

    exact = mpmath.MPContext()  # one of its own: sympy changes the precision of the common one
    exact.dps = _DIGITS

    def total(*terms: Any) -> Any:
        value = sum(terms)
        if abs(value) <= _CANCELLED * max(map(abs, terms)) and any(terms):
            raise _Unknown
        return value

    def off_the_cut(value: Any) -> Any:
        """The value, unless it cannot be said on which side of the branch cut of roots and logarithms it is."""
        if value.real < 0 and 0 < abs(value.imag) <= _CANCELLED * abs(value):
            raise _Unknown
        return value

    def logarithm(number: Any, *base: Any) -> Any:
        value = exact.ln(off_the_cut(number))
        return value / exact.ln(off_the_cut(*base)) if base else value

    def choices(above: Any, below: Any) -> Any:
        if min(above.real, below.real) < 0:  # mpmath's convention may not be sympy's
            raise _Unknown
        return exact.binomial(above, below)

    def rational(number: Any, _: float) -> Any:
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
        "Pow": lambda base, exponent: off_the_cut(base) ** exponent,
        "exp": exact.exp,
        "log": logarithm,
        "sin": exact.sin,
        "cos": exact.cos,
        "tan": exact.tan,
        "factorial": exact.factorial,
        "binomial": choices,
        "Abs": abs,
    }
