r"""The kinds of answers.

| kind | examples |
|---|---|
| `Scalar` | `5`, `2\sqrt{3}`, `x^2+1`, `5\%`, `5\text{ cm}`, `1 1/4`, `C` |
| `Named` | `x=5`, `f(x)=2x`, `\text{Area}=3+5=8`: one name and its value |
| `Equation`, `Relation` | `x^2+y^2=1`; `x+y<2` |
| `Reals` | `x>2`, `1<x\le 3`, `x<2 or x>3`, `(-\infty,2)\cup\{5\}`, `\mathbb{R}\setminus\{0\}` |
| `Bracket` | `(1,2)`, `[1,2)`, `(1,2,3)`: a point, vector or interval |
| `Several` | `1, 2`, `x=1 or x=2`, `1\pm\sqrt{2}` |
| `Set` | `\{1,2\}`, `\emptyset` |
| `Matrix` | `\begin{pmatrix}1\\2\end{pmatrix}` |
| `Cases` | `\begin{cases}x&x>0\\0&x\le 0\end{cases}` |
| `Ratio`, `Clock`, `Numeral` | `1:2:3`; `10:05`, `6 pm`; `52_8` |
| `Text` | `Evelyn`, `\text{no solution}`, `CBAD`, `是` |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from upge.verify.scalar import expression, real_value
from upge.verify.tokens import UnreadableError


@dataclass(frozen=True)
class Scalar:
    """A number or an expression with letters, for `upge.verify.scalar.expression`."""

    latex: str
    is_decimal: bool = False
    is_percent: bool = False
    is_degrees: bool = False


@dataclass(frozen=True)
class Named:
    """A name and its value. `others` are the sides between them; `left` is the name as an expression, or None."""

    name: str
    value: Answer
    others: tuple[Scalar, ...] = ()
    left: Scalar | None = None


@dataclass(frozen=True)
class Equation:
    """Sides with equals signs between them."""

    sides: tuple[Scalar, ...]


@dataclass(frozen=True)
class Relation:
    r"""Sides in ascending order, with the relations `<`, `\le` or `\ne` between them."""

    sides: tuple[Scalar, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """An interval of real numbers, or one number."""

    low: Scalar
    high: Scalar
    is_open_low: bool = False
    is_open_high: bool = False


@dataclass(frozen=True)
class Reals:
    """A union of intervals; if an inequality gave it, also the name of the variable and the inequality."""

    pieces: tuple[Interval, ...]
    name: str = ""
    relation: Relation | None = None


@dataclass(frozen=True)
class Bracket:
    """Values in order between two brackets."""

    left: str
    right: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Several:
    """Several answers; their order does not matter."""

    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Set:
    """A finite set."""

    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of expressions."""

    rows: tuple[tuple[Scalar, ...], ...]


@dataclass(frozen=True)
class Cases:
    """Values, each with the condition under which it holds."""

    rows: tuple[tuple[Answer, Answer], ...]


@dataclass(frozen=True)
class Ratio:
    """Numbers separated by colons."""

    parts: tuple[Scalar, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day: hour, minute and possibly second; `half` is "am", "pm" or, if unknown, empty."""

    digits: tuple[int, ...]
    half: str


@dataclass(frozen=True)
class Numeral:
    """The digits of a number in a base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Text:
    """Words, in lower case and separated by one space."""

    words: str


Answer = (
    Scalar
    | Named
    | Equation
    | Relation
    | Reals
    | Bracket
    | Several
    | Set
    | Matrix
    | Cases
    | Ratio
    | Clock
    | Numeral
    | Text
)
INFINITY, MINUS_INFINITY = Scalar(r"\infty "), Scalar(r"- \infty ")
EVERYTHING = Interval(MINUS_INFINITY, INFINITY, True, True)


def as_reals(answer: Answer) -> Reals | None:
    """An answer as a set of real numbers; None if it cannot be one."""
    if isinstance(answer, Reals):
        return answer
    if isinstance(answer, Named):
        return as_reals(answer.value)
    if isinstance(answer, Set) and all(isinstance(item, Scalar) for item in answer.items):
        return Reals(tuple(Interval(item, item) for item in answer.items if isinstance(item, Scalar)))
    if isinstance(answer, Bracket) and len(answer.items) == 2:
        low, high = answer.items
        if isinstance(low, Scalar) and isinstance(high, Scalar):
            return Reals((Interval(low, high, answer.left == "(", answer.right == ")"),))
    return None


Pieces = tuple[Interval, ...]


def pieces_of(answer: Answer) -> Pieces:
    """The intervals of an answer. Raises `UnreadableError` if it is not a set of real numbers."""
    reals = as_reals(answer)
    if reals is None:
        raise UnreadableError("it is not a set of real numbers")
    return reals.pieces


def bound_of(scalar: Scalar) -> float:
    """The value of a bound. Raises `UnreadableError` if it is not a number."""
    parsed = expression(scalar.latex)
    value = None if parsed is None else real_value(parsed)
    if value is None:
        raise UnreadableError("a bound is not a number")
    return value


def union(first: Pieces, second: Pieces) -> Pieces:
    """The intervals of either set."""
    return first + second


def intersection(first: Pieces, second: Pieces) -> Pieces:
    """The intervals common to two sets."""
    return tuple(piece for a in first for b in second for piece in _common(a, b))


def _common(a: Interval, b: Interval) -> Iterator[Interval]:
    low = max(((bound_of(i.low), i.is_open_low, i.low) for i in (a, b)), key=lambda end: end[:2])
    high = min(((bound_of(i.high), not i.is_open_high, i.high) for i in (a, b)), key=lambda end: end[:2])
    if low[0] < high[0] or low[0] == high[0] and not low[1] and high[1]:
        yield Interval(low[2], high[2], low[1], not high[1])


def without(pieces: Pieces, points: Pieces) -> Pieces:
    """Intervals without single numbers."""
    if any(point.low != point.high for point in points):
        raise UnreadableError("only numbers are excluded")
    for point in sorted((piece.low for piece in points), key=bound_of):
        parts: list[Interval] = []
        for piece in pieces:
            if bound_of(piece.low) < bound_of(point) < bound_of(piece.high):
                parts.append(Interval(piece.low, point, piece.is_open_low, True))
                parts.append(Interval(point, piece.high, True, piece.is_open_high))
            else:
                parts.append(piece)
        pieces = tuple(parts)
    return pieces


def merged(pieces: Pieces) -> Pieces:
    """The same set as ordered pieces that neither overlap nor touch."""
    result: list[Interval] = []
    for piece in sorted(pieces, key=lambda piece: (bound_of(piece.low), piece.is_open_low)):
        last = result[-1] if result else None
        if last is None or (bound_of(last.high), not last.is_open_high or not piece.is_open_low) <= (
            bound_of(piece.low),
            False,
        ):
            result.append(piece)
        else:
            _, is_closed, high = max(
                ((bound_of(i.high), not i.is_open_high, i.high) for i in (last, piece)), key=lambda end: end[:2]
            )
            result[-1] = Interval(last.low, high, last.is_open_low, not is_closed)
    return tuple(result)


def clock_of(digits: Sequence[str], half: str = "") -> Clock:
    """A time of day on a twelve-hour clock: 22:05 is 10:05 pm."""
    hour, *others = map(int, digits)
    is_afternoon = not half and 12 < hour < 24
    return Clock((hour - 12 * is_afternoon, *(others or [0])), "pm" if is_afternoon else half)


def value_of(answer: Answer) -> float | None:
    """The value of an answer that is one real number, possibly with a name; else None."""
    answer = answer.value if isinstance(answer, Named) else answer
    parsed = expression(answer.latex) if isinstance(answer, Scalar) else None
    return None if parsed is None else real_value(parsed)
