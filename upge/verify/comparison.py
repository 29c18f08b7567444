"""Whether two answers are the same: within each kind, and across kinds by the table `BRIDGES`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from upge.verify.answer import (
    Answer,
    Bracket,
    Cases,
    Clock,
    Equation,
    Interval,
    Matrix,
    Named,
    Numeral,
    Ratio,
    Reals,
    Relation,
    Scalar,
    Set,
    Several,
    Text,
    as_reals,
    clock_of,
    merged,
)
from upge.verify.magnitude import Parsed
from upge.verify.scalar import are_equal, expression, ratio_of
from upge.verify.tokens import UnreadableError

Holds = Callable[[Any, Any], bool]  # (ground truth, answer), each of the kind that a table's key names


def same(gold: Answer, given: Answer) -> bool:
    """Whether an answer equals the ground truth, in whatever form."""
    if type(gold) is type(given):
        return _WITHIN[type(gold)](gold, given)
    for first, second, holds, is_mutual, _, _ in BRIDGES:
        if isinstance(gold, first) and isinstance(given, second):
            return holds(gold, given)
        if is_mutual and isinstance(gold, second) and isinstance(given, first):
            return holds(given, gold)
    return False


def _parsed(scalar: Scalar) -> Parsed:
    return expression(scalar.latex)


def _scalars(gold: Scalar, given: Scalar) -> bool:
    is_decimal = gold.is_decimal or given.is_decimal
    if are_equal(_parsed(gold), _parsed(given), is_decimal):
        return True
    for mark, factor in _SIGNS.items():
        if getattr(gold, mark) != getattr(given, mark):
            left, right = (_parsed(_times(side, factor) if getattr(side, mark) else side) for side in (gold, given))
            if are_equal(left, right, is_decimal):
                return True
    return False


def _times(scalar: Scalar, factor: str) -> Scalar:
    return Scalar(rf"({scalar.latex})\cdot ({factor})")


_ZERO = Scalar("0")
_SIGNS = {"is_percent": r"\frac{1}{100}", "is_degrees": r"\frac{(\pi )}{180}"}
"""Signs after a number, each of which may be a unit or this factor."""


def _difference(sides: Sequence[Scalar]) -> Parsed:
    return expression(f"({sides[0].latex})-({sides[1].latex})")


def _named(gold: Named, given: Named) -> bool:
    are_words = any(len(named.name) > 3 and named.name.isalpha() for named in (gold, given))
    return (gold.name == given.name or are_words) and same(gold.value, given.value) and _is_derived(given)


def _is_derived(given: Named) -> bool:
    """Whether the sides between a name and its value, as in x = 3+5 = 8, have that value."""
    value = given.value
    return all(isinstance(value, Scalar) and _scalars(value, other) for other in given.others)


def _equations(gold: Equation, given: Equation) -> bool:
    if len(gold.sides) != len(given.sides):
        return False
    if len(gold.sides) > 2:
        return _in_order(gold.sides, given.sides)
    return bool(ratio_of(_difference(gold.sides), _difference(given.sides)))


def _relations(gold: Relation, given: Relation) -> bool:
    if gold.operators != given.operators:
        return False
    if len(gold.sides) > 2:
        return _in_order(gold.sides, given.sides)
    ratio = ratio_of(_difference(gold.sides), _difference(given.sides))
    return ratio is not None and (gold.operators[0] == r"\ne" or ratio.real > 0)


def _reals(gold: Reals, given: Reals) -> bool:
    if gold.name and given.name and gold.name != given.name:
        return False
    if _in_any_order(gold.pieces, given.pieces, _intervals):
        return True
    try:
        return _in_any_order(merged(gold.pieces), merged(given.pieces), _intervals)
    except UnreadableError:  # a bound has letters
        return False


def _intervals(gold: Interval, given: Interval) -> bool:
    if (gold.is_open_low, gold.is_open_high) != (given.is_open_low, given.is_open_high):
        return False
    return _scalars(gold.low, given.low) and _scalars(gold.high, given.high)


def _brackets(gold: Bracket, given: Bracket) -> bool:
    are_alike = len(gold.items) > 2 or (gold.left, gold.right) == (given.left, given.right)
    return are_alike and _in_order(gold.items, given.items)


def _several(gold: Several, given: Several) -> bool:
    names = {item.name for item in gold.items if isinstance(item, Named)}
    if len(names) > 1 and not any(isinstance(item, Named) for item in given.items):
        return _in_order(gold.items, given.items)
    return _in_any_order(gold.items, given.items)


def _sets(gold: Set, given: Set) -> bool:
    pairs = ((gold.items, given.items, same), (given.items, gold.items, lambda a, b: same(b, a)))
    return all(any(holds(a, b) for b in others) for items, others, holds in pairs for a in items)


def _matrices(gold: Matrix, given: Matrix) -> bool:
    return len(gold.rows) == len(given.rows) and all(map(_in_order, gold.rows, given.rows))


def _ratios(gold: Ratio, given: Ratio) -> bool:
    def product(a: Scalar, b: Scalar) -> Scalar:
        return Scalar(rf"({a.latex})\cdot ({b.latex})", a.is_decimal or b.is_decimal)

    if len(gold.parts) != len(given.parts):
        return False
    if any(all(_scalars(part, _ZERO) for part in ratio.parts) for ratio in (gold, given)):
        return False  # 0:0 is proportional to every ratio
    pairs = zip(gold.parts, given.parts, strict=True)
    return all(_scalars(product(a, d), product(c, b)) for (a, b), (c, d) in itertools.combinations(pairs, 2))


def _clocks(gold: Clock, given: Clock) -> bool:
    halves = {gold.half, given.half} - {""}
    return gold.digits == given.digits and len(halves) < 2


def _in_order(gold: Sequence[Answer], given: Sequence[Answer]) -> bool:
    return len(gold) == len(given) and all(map(same, gold, given))


def _in_any_order(gold: Sequence[Any], given: Sequence[Any], holds: Holds = same) -> bool:
    if len(gold) != len(given):
        return False
    rest = list(given)
    for item in gold:
        match = next((number for number, other in enumerate(rest) if holds(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


_WITHIN: dict[type, Holds] = {
    Scalar: _scalars,
    Named: _named,
    Equation: _equations,
    Relation: _relations,
    Reals: _reals,
    Bracket: _brackets,
    Several: _several,
    Set: _sets,
    Matrix: _matrices,
    Cases: lambda gold, given: _in_any_order(gold.rows, given.rows, _in_order),
    Ratio: _ratios,
    Clock: _clocks,
    Numeral: lambda gold, given: gold == given,
    Text: lambda gold, given: gold == given,
}


def _solved(named: Named, equation: Equation) -> bool:
    """Whether an equation is equivalent to a named value, or has it as the only solution."""
    if named.left is None or not isinstance(named.value, Scalar) or len(equation.sides) != 2:
        return False
    letter, difference = _parsed(named.left), _difference(equation.sides)
    if len(difference.free_symbols) < 2:  # the question was to solve the equation
        return False
    if ratio_of(_difference((named.left, named.value)), difference):
        return True
    from sympy import solve

    solutions = solve(difference, letter) if letter.is_Symbol and letter in difference.free_symbols else []
    return len(solutions) == 1 and are_equal(_parsed(named.value), solutions[0])


def _identity(scalar: Scalar, equation: Equation) -> bool:
    letters = {letter for side in equation.sides for letter in _parsed(side).free_symbols}
    return letters <= _parsed(scalar).free_symbols and all(_scalars(scalar, side) for side in equation.sides)


def _as_reals(gold: Answer, given: Answer) -> bool:
    sets = as_reals(gold), as_reals(given)
    return sets[0] is not None and sets[1] is not None and _reals(sets[0], sets[1])


def _listed_union(union: Reals, listed: Several) -> bool:
    sets = [as_reals(item) for item in listed.items]
    names = {part.name for part in sets if part and part.name}
    return (
        all(sets)
        and len(names) < 2
        and _reals(union, Reals(tuple(piece for part in sets if part for piece in part.pieces)))
    )


def _half_line(reals: Reals, relation: Relation) -> bool:
    return reals.relation is not None and _relations(reals.relation, relation)


def _vector(bracket: Bracket, matrix: Matrix) -> bool:
    is_vector = 1 in (len(matrix.rows), len(matrix.rows[0]))
    return is_vector and _list(bracket, [cell for row in matrix.rows for cell in row])


def _list(bracket: Bracket, items: Sequence[Answer]) -> bool:
    names = [item.name for item in items if isinstance(item, Named)]
    if len(set(names)) < len(names):  # alternatives
        return False
    if len(names) == len(items) and set(names) <= set("xyz"):  # coordinates
        items = [item for _, item in sorted(zip(names, items, strict=True))]
    return bracket.left + bracket.right in ("()", "[]") and _in_order(bracket.items, items)


def _time(clock: Clock, ratio: Ratio) -> bool:
    digits = [part.latex for part in ratio.parts]
    return all(part.isdigit() for part in digits) and _clocks(clock, clock_of(digits))


def _value_given(gold: Answer, given: Named) -> bool:
    return same(gold, given.value) and _is_derived(given)


BRIDGES: tuple[tuple[type, type, Holds, bool, str, str], ...] = (
    (Named, Equation, _solved, True, "`y=2x+3` ← `2x-y+3=0`", "both have the same solutions"),
    (object, Named, _value_given, False, "`5` ← `x=5`", "a value may name one unknown, and nothing else"),
    (Named, object, lambda gold, given: same(gold.value, given), False, "`x=5` ← `5`",
     "the question names the unknown"),
    (Scalar, Equation, _identity, True, "`8` ← `3+5=8`",
     "every side has the value and no other letters; `2x=8` is a question"),
    (Reals, Bracket, _as_reals, True, "`1<x<2` ← `(1,2)`", "an interval and its inequalities"),
    (Reals, Set, _as_reals, True, r"`\{1,2\}` ← `\{1\}\cup\{2\}`", "numbers are a union of points"),
    (Reals, Several, _listed_union, False, r"`x<1 or x>2` ← `(-\infty,1), (2,\infty)`", "the parts of a union, listed"),
    (Reals, Relation, _half_line, True, "`x>2` ← `2x>4`", "a positive factor does not change an inequality"),
    (Several, Set, lambda several, other: _sets(Set(several.items), other), True, r"`1,2,3` ← `\{3,2,1\}`",
     "a list without brackets has no order"),
    (Bracket, Several, lambda bracket, other: _list(bracket, other.items), True, "`(1,2)` ← `1,2`",
     "brackets around a list do not matter, its order does"),
    (Bracket, Matrix, _vector, True, r"`(1,2)` ← `\begin{pmatrix}1\\2\end{pmatrix}`", "a vector as a row or column"),
    (Set, Scalar, lambda one, other: len(one.items) == 1 and same(one.items[0], other), True, r"`\{5\}` ← `5`",
     "a set of one solution"),
    (Numeral, Scalar, lambda gold, given: gold.digits == given.latex, False, "`52_8` ← `52`",
     "the question names the base"),
    (Clock, Ratio, _time, True, "`2:30 pm` ← `2:30`", "a time of day without am or pm"),
)  # fmt: skip
"""Pairs of kinds whose answers may be the same: (kind, other kind, function that compares two of them, whether either
or only the first may be the ground truth, example, reason). The first row that fits decides."""
