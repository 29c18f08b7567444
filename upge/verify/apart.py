r"""Are two expressions certainly different? What can be said at once, before math-verify evaluates and simplifies them.

Two tests, each of which proves that they differ or says nothing. By size (`upge.verify.size`): `9^{9^{9^9}}`, which
nobody can evaluate, is known not to be 3.5. By value: equal expressions have equal values wherever the same numbers are
put for the same letters. Neither is ever the reason for a reward, so that a reward is math-verify's as before; what
they refuse, math-verify refuses after simplifying it, or never gets done with.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

from upge.verify.size import MARGIN, size_of

SMALLEST = 1e-2
"""Values below, of both, prove nothing: math-verify rounds to 6 decimals."""
DIFFERENCE = 1e-3
"""What values differ by, relative to the larger, to prove something."""
_LEAST = -4.6
"""ln of `SMALLEST`."""
_TAME = 700.0
"""Largest ln|x| of a part that is evaluated here."""
_NUMBERS = {"Integer", "Rational", "Half", "One", "Zero", "NegativeOne", "Float", "Pi", "Exp1", "ImaginaryUnit"}
_FUNCTIONS = {"Add", "Mul", "Pow", "exp", "log", "sin", "cos", "tan", "factorial", "binomial", "Abs"}
_POINTS = (1.0, 37.0)
"""Letters stand for numbers between once and twice that; a branch of a root or logarithm may differ at one of them."""


def are_apart(gold: Any, given: Any) -> bool:
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
    sizes = size_of(gold), size_of(given)
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
    """Its values at `_POINTS`, to 15 digits; None where they may be hard to find, or are not finite numbers."""
    if not _is_tame(expression):
        return None
    try:
        values = [complex(expression.evalf(15, subs=_numbers(expression, point))) for point in _POINTS]
    except (TypeError, ValueError, ArithmeticError):
        return None
    return tuple(values) if all(abs(value) < 1e100 for value in values) else None


def _numbers(expression: Any, point: float) -> dict[Any, float]:
    """For each letter a number that depends on its name only, not on whether it was taken for real."""
    names = {letter: letter.name.lower() for letter in expression.free_symbols}
    return {letter: point * (1.0 + zlib.crc32(name.encode()) / 2**32) for letter, name in names.items()}


def _is_tame(expression: Any) -> bool:
    """Has it nothing but arithmetic and elementary functions in it, and no huge number?"""
    name = type(expression).__name__
    if name in _NUMBERS or name == "Symbol":
        return True
    if name not in _FUNCTIONS or not all(_is_tame(part) for part in expression.args):
        return False
    if expression.free_symbols:
        return True
    size = size_of(expression)
    return size is None or -_TAME < size.low and size.high < _TAME
