"""Expressions: parsed as a whole by latex2sympy2_extended, and compared by their values.

Two expressions are equal if they have equal values, to 100 digits, at all points where both are defined. A point gives
each letter a pseudo-random real number. If neither expression contains the imaginary unit, all parts must also be real
(∛-8 is -2), and points where a part is not real are left out. sympy compares expressions whose value is not certain,
because a part is huge, tiny, cancelled or unknown to `_rules`. This may take hours for an answer such as i^{9^{9^9}}:
call it in a process that can be killed.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

from upge.verify.magnitude import Parsed, have_other_sizes

Value = Any  # a number of mpmath, which has no types
_SCALES = (1.0, 5.3, 1.0, 0.29, 2.7, 11.0)
"""At each of these points, a letter's number has a size between one and two times this scale."""
_FEWEST = 2
"""The minimum number of points at which two expressions with letters are compared."""
_DIGITS = 200
_LARGEST, _TINIEST = 1e50, 1e-30
"""Bounds of every evaluated part: between them, `_DIGITS` digits make a value certain, and evaluation is fast."""
_CANCELLED = 1e-20
"""Relative size below which a sum, or a distance from the negative axis, may be an inexact 0."""
_EQUAL = 1e-100
"""Relative difference of equal values. Two fractions within the bounds above differ by more."""
_ROUNDED = 5e-7
"""Difference of numbers that are equal to 6 decimals."""


@functools.cache
def _parser() -> Any:
    """The parser class of latex2sympy2_extended, restricted to whole expressions and without its heuristics.

    It selects antlr's SLL prediction, which is faster and "will either return a correct parse tree (i.e. the same parse
    tree that would be returned with the LL prediction mode), or it will report a syntax error" (PredictionMode). Only
    after an error is the text parsed again, in LL mode.
    """
    from antlr4 import Token
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy

    class Expressions(_Latex2Sympy):
        def __init__(self):
            super().__init__(is_real=True, convert_degrees=True, config=ConversionConfig(lowercase_symbols=False))

        def parse(self, latex_str):  # the name of the argument is the library's
            try:
                return self.convert_expr(self.tree(latex_str, PredictionMode.SLL))
            except Exception:
                return self.convert_expr(self.tree(latex_str, PredictionMode.LL))

        def tree(self, latex, mode):
            parser = self.create_parser(latex)
            parser._interp.predictionMode = mode
            tree = parser.expr()
            token: Any = parser.getCurrentToken()
            if token.type != Token.EOF:
                raise ValueError("only a part of the text is an expression")
            return tree

        def convert_postfix_list(self, arr, i=0):
            """A product. The library would read 3(5) as a mixed number."""
            return functools.reduce(self.mul_flat, [self.convert_postfix(part) for part in arr])

    return Expressions


@functools.lru_cache(maxsize=4096)
def expression(latex: str) -> Parsed | None:
    """The sympy expression of a text from `upge.verify.notation.write`; None if it is not an expression."""
    from sympy import Expr

    try:
        parsed = _parser()().parse(latex)
    except Exception:  # antlr or sympy refuse the text
        return None
    return parsed if isinstance(parsed, Expr) and not parsed.has(*_undefined()) else None


@functools.cache
def _undefined() -> tuple[Parsed, ...]:
    from sympy import nan, zoo

    return nan, zoo


def are_equal(gold: Parsed, given: Parsed, is_decimal: bool = False) -> bool:
    """Whether two expressions are equal.

    Args:
        gold: an expression.
        given: another one.
        is_decimal: whether one of them contains a decimal. Numbers are then compared to 6 decimals, and below 0.001 to
            6 significant digits.
    """
    if gold == given:
        return True
    if have_other_sizes(gold, given):
        return False
    known = _equal_by_value(gold, given, is_decimal)
    return _equal_by_sympy(gold, given, is_decimal) if known is None else known


def ratio_of(gold: Parsed, given: Parsed) -> Value | None:
    """The constant c with given = c·gold at every point; None if there is no such constant or it is not certain."""
    pairs = _value_pairs(gold, given, has_imaginary_unit(gold) or has_imaginary_unit(given))
    ratios = [given / gold for gold, given in pairs or () if gold and given]
    if not pairs or len(ratios) < min(len(pairs), _FEWEST) or not ratios:
        return None
    return ratios[0] if all(_are_close(ratios[0], ratio) for ratio in ratios) else None


def real_value(parsed: Parsed) -> float | None:
    """The value of a real number; None if it has letters or is not certain."""
    if parsed.free_symbols:
        return None
    if parsed.is_infinite:
        return math.inf if parsed.is_extended_positive else -math.inf
    try:
        return float(_value(parsed, 0, True))
    except Exception:
        return None


def has_imaginary_unit(parsed: Parsed) -> bool:
    """Whether an expression contains i."""
    from sympy import I

    return parsed.has(I)


def _equal_by_value(gold: Parsed, given: Parsed, is_decimal: bool) -> bool | None:
    is_complex = has_imaginary_unit(gold) or has_imaginary_unit(given)
    pairs = _value_pairs(gold, given, is_complex)
    if pairs == [] and not is_complex:  # not real at any point
        is_complex, pairs = True, _value_pairs(gold, given, True)
    if not pairs:
        return None
    letters = bool(gold.free_symbols | given.free_symbols)
    if not letters and is_decimal:
        return _equal_rounded(*pairs[0])
    same = [_are_close(a, b) for a, b in pairs]
    if is_complex and letters and True in same and False in same:
        return None  # they may be on different branches of a root
    if False in same:
        return False
    return True if not letters or len(same) >= _FEWEST else None


def _are_close(a: Value, b: Value) -> bool:
    return abs(a - b) <= _EQUAL * max(abs(a), abs(b))


def _equal_rounded(gold: Value, given: Value) -> bool:
    if abs(gold) < 1e-3:
        return abs(gold - given) <= 5e-6 * abs(gold) if gold else abs(given) <= 1e-12
    difference = gold - given
    return max(abs(difference.real), abs(difference.imag)) <= _ROUNDED


def _equal_by_sympy(gold: Parsed, given: Parsed, is_decimal: bool) -> bool:
    from sympy import simplify

    gold, given = gold.doit(), given.doit()
    if gold == given:
        return True
    difference = simplify(gold - given)
    if not difference.is_number or difference.is_zero:
        return bool(difference.is_zero)
    if is_decimal:
        return _equal_rounded(*(complex(part.evalf(30)) for part in (gold, given)))
    # Relative, because 1/2004! is not 1/2006!. sympy evaluates a difference to the requested number of digits.
    return difference.is_zero is None and bool(abs(difference.evalf(30)) <= 1e-30 * abs(gold.evalf(30)))


class _UncertainError(Exception):
    """A value is not certain."""


class _UndefinedError(Exception):
    """An expression has no real value at a point."""


def _value_pairs(gold: Parsed, given: Parsed, is_complex: bool) -> list[tuple[Value, Value]] | None:
    """The values of both expressions at the points where both are defined and certain.

    Returns:
        None if there is no such point because a value is uncertain.
    """
    points = range(len(_SCALES)) if gold.free_symbols or given.free_symbols else range(1)
    pairs, is_certain = [], True
    for point in points:
        values = _value_at(gold, point, not is_complex), _value_at(given, point, not is_complex)
        is_certain &= "uncertain" not in values
        if "uncertain" not in values and "undefined" not in values:
            pairs.append(values)
    return pairs if pairs or is_certain else None


@functools.lru_cache(maxsize=4096)
def _value_at(parsed: Parsed, point: int, is_real: bool) -> Value | str:
    try:
        return _value(parsed, point, is_real)
    except _UndefinedError:
        return "undefined"
    except Exception:  # mpmath cannot evaluate it, so the value is not certain
        return "uncertain"


def _value(parsed: Parsed, point: int, is_real: bool) -> Value:
    """The value of an expression, computed from the inside out so that a part that is too large ends it early."""
    name = type(parsed).__name__
    rule = _rules().get(name)
    if rule is None:
        raise _UncertainError
    if not parsed.args:
        value = rule(parsed, point, is_real)
    else:
        parts = [_value(part, point, is_real) for part in parsed.args]
        if name == "Pow" and is_real and parts[0].real < 0:
            value = _real_power(parts[0], parsed.args[1])
        else:
            value = rule(*parts)
    if is_real and value.imag:
        raise _UndefinedError
    if value and not _TINIEST < abs(value) < _LARGEST:
        raise _UncertainError
    return value


def _real_power(base: Value, exponent: Parsed) -> Value:
    """The real power of a negative number, such as -2 for ∛-8."""
    if not exponent.is_Rational or exponent.q % 2 == 0:
        raise _UndefinedError
    size = (-base) ** _rules()["Rational"](exponent)
    return -size if exponent.p % 2 else size


def _number(letter: Parsed, point: int, is_real: bool) -> float:
    """The number for a letter at a point; it depends only on the letter's name. Some are negative if `is_real`."""
    code = zlib.crc32(letter.name.encode())
    is_negative = is_real and (point == 2 or point > 2 and code >> point & 1)
    return (-1.0 if is_negative else 1.0) * _SCALES[point] * (1.0 + code / 2**32)


@functools.cache
def _rules() -> dict[str, Callable[..., Value]]:
    """Class name → the value as a function of the parts' values or, without parts, of (expression, point, is_real)."""
    import mpmath

    exact = mpmath.MPContext()  # not the shared context, whose precision sympy changes
    exact.dps = _DIGITS

    def total(*terms: Value) -> Value:
        value = sum(terms)
        if abs(value) <= _CANCELLED * max(map(abs, terms)) and any(terms):
            raise _UncertainError
        return value

    def off_branch_cut(value: Value) -> Value:
        """Return `value` if it is certain on which side of the branch cut of roots and logarithms it lies."""
        if value.real < 0 and 0 < abs(value.imag) <= _CANCELLED * abs(value):
            raise _UncertainError
        return value

    def logarithm(number: Value, *base: Value) -> Value:
        return exact.ln(off_branch_cut(number)) / (exact.ln(off_branch_cut(*base)) if base else 1)

    def binomial(above: Value, below: Value) -> Value:
        if min(above.real, below.real) < 0:  # sympy and mpmath may differ here
            raise _UncertainError
        return exact.binomial(above, below)

    def whole(value: Value) -> Value:
        """Return `value` if it is certain between which integers it lies."""
        if value.imag or abs(value - exact.nint(value)) < _CANCELLED:
            raise _UncertainError
        return value

    def rational(number: Parsed, *_: object) -> Value:
        if max(abs(number.p), number.q) > _LARGEST:  # 1 - 2^-1000 is not 1
            raise _UncertainError
        return exact.mpf(number.p) / number.q

    constants = {"Pi": exact.pi, "Exp1": exact.e, "ImaginaryUnit": exact.mpc(0, 1)}
    functions = "sin cos tan cot sec csc sinh cosh tanh asin acos atan acot asec acsc exp factorial".split()
    return {
        **dict.fromkeys(("Integer", "Rational", "Half", "One", "Zero", "NegativeOne"), rational),
        **{name: lambda *_, value=value: +value for name, value in constants.items()},
        "Symbol": lambda letter, point, is_real: exact.mpf(_number(letter, point, is_real)),
        **{"Add": total, "log": logarithm, "binomial": binomial},
        "Mul": lambda *factors: math.prod(factors),
        "Pow": lambda base, exponent: off_branch_cut(base) ** exponent,
        **{"floor": lambda value: exact.floor(whole(value)), "ceiling": lambda value: exact.ceil(whole(value))},
        **{"Abs": abs, "Max": max, "Min": min},
        **{name: getattr(exact, name) for name in functions},
    }
