r"""Fast proofs that two expressions differ, tried before math-verify evaluates and simplifies them.

There are two tests. Each either proves that the expressions differ, or proves nothing.

- By size (`upge.verify.magnitude`): `9^{9^{9^9}}` cannot be evaluated, but it is too large to be 3.5.
- By value: equal expressions have equal values when the same numbers are substituted for the same letters.

Neither test ever grants a reward; only math-verify does. What they refuse, math-verify would also refuse after
simplification, or would never finish.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

from upge.verify.magnitude import MARGIN, Parsed, magnitude_of

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
