"""The grammar of answers: reads a text as one of the kinds of `upge.verify.answer`.

This module reads the structure; only expressions go to the parser (`upge.verify.scalar`). A text has no reading unless
the whole of it is one of these kinds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from upge.verify.answer import (
    EVERYTHING,
    INFINITY,
    MINUS_INFINITY,
    Answer,
    Bracket,
    Cases,
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
    bound_of,
    clock_of,
    intersection,
    pieces_of,
    union,
    value_of,
    without,
)
from upge.verify.normalize import without_separators
from upge.verify.notation import write
from upge.verify.scalar import expression
from upge.verify.tokens import SYMBOLS, Token, UnreadableError, depths, is_group, split, tokens_of
from upge.verify.words import ALL_REALS, NO_GOLD, NOTHING, Gold, is_word, without_unit, words_in


@functools.lru_cache(maxsize=4096)
def read(text: str, has_index_i: bool = False, gold: Gold = NO_GOLD) -> tuple[Answer, ...]:
    """The readings of a text: none, one, or two if a comma may separate thousands.

    Args:
        text: the answer, a result of `upge.verify.normalize.spell`.
        has_index_i: True if the letter i is the index of a sum, False if it is the imaginary unit.
        gold: what is known of the ground truth, if `text` is not the ground truth itself.
    """
    reader, answers = _Reader(has_index_i, gold), []
    # Within brackets, a comma without a space separates thousands only if other commas are followed by a space.
    is_list = text.startswith(("(", "[", r"\{", r"\langle", r"\begin")) and ", " not in text
    for candidate in dict.fromkeys((text,) if is_list else (without_separators(text), text)):
        try:
            answers.append(reader.answer(tokens_of(candidate)))
        except (UnreadableError, RecursionError):
            continue
    return tuple(dict.fromkeys(answers))


def words_of(text: str) -> str:
    """The words of a text, as in `Text`."""
    return words_in(tokens_of(text))


_FALLING = {">": "<", r"\ge": r"\le"}
_INEQUALITIES = frozenset(("<", ">", r"\le", r"\ge", r"\ne"))
_RELATIONS = _INEQUALITIES | {"=", r"\approx", r"\in", r"\notin"}
_MATRICES = re.compile(r"\\begin\{(?:[pbB]?matrix|array)\}")
_CLOCK = re.compile(r"([0-9]{1,2}(?::[0-9]{2}){0,2})([ap]m)?")
_NUMERAL = re.compile(r"-?[{(]?([0-9A-Z]*[0-9][0-9A-Z]*)[})]?_\{?([0-9]+)\}?")
_PUNCTUATION = frozenset(".'\"-()!?&")
_COLON, _COMMA = Token("symbol", ":"), Token("symbol", ",")


@dataclass(frozen=True)
class _Reader:
    """Reads tokens from the outermost structure inwards. Every method may raise `UnreadableError`."""

    has_index_i: bool
    gold: Gold

    def answer(self, tokens: Sequence[Token]) -> Answer:
        """One answer, or several alternatives separated by "or", each of which consists of items."""
        alternatives = [self.items(part) for part in split(tokens, "or")]
        if len(alternatives) == 1:
            return alternatives[0]
        sets = [as_reals(part) for part in alternatives]
        names = {part.name for part in sets if part and part.name}
        if all(sets) and any(isinstance(part, Reals) for part in alternatives) and len(names) < 2:
            return Reals(
                tuple(piece for part in sets if part for piece in part.pieces), sets[0].name if sets[0] else ""
            )
        return _several(alternatives)

    def items(self, tokens: Sequence[Token]) -> Answer:
        """Items separated by commas or "and".

        Inequalities of one variable hold together. With commas they are alternatives if they exclude each other.
        """
        tokens = _without_comma(tokens)
        items = [self.item(part) for part in split(tokens, ",", "and")]
        if len(items) == 1:
            return items[0]
        sets = [item for item in items if isinstance(item, Reals) and item.name]
        if len(sets) == len(items) and len({item.name for item in sets}) == 1:
            pieces = functools.reduce(intersection, (item.pieces for item in sets))
            if not pieces and "and" not in [token.text for token in tokens]:
                pieces = tuple(piece for item in sets for piece in item.pieces)
            return Reals(pieces, sets[0].name)
        return _several(items)

    def item(self, tokens: Sequence[Token]) -> Answer:
        """An answer without commas outside its brackets."""
        if not tokens:
            raise UnreadableError("there is no answer")
        if self.is_text(tokens):
            words = words_in(tokens)
            if ALL_REALS.fullmatch(words):
                return Reals((EVERYTHING,))
            return Set(()) if NOTHING.fullmatch(words) else Text(words)
        if tokens[0].text == r"\begin{cases}" and is_group(tokens):
            return self.cases(tokens[1:-1])
        if tokens[0].text == r"\{" and is_group(tokens):
            return self.set(tokens[1:-1])
        if any(token.text in (r"\pm", r"\mp") for token in tokens):
            return _several([self.item(_signed(tokens, *signs)) for signs in ("+-", "-+")])
        outside = [token.text for token, depth in zip(tokens, depths(tokens), strict=True) if not depth]
        if not _RELATIONS.isdisjoint(outside):
            return self.relation(tokens, [text for text in outside if text in _RELATIONS])
        for operator, combined in ((r"\setminus", without), (r"\cap", intersection), (r"\cup", union)):
            if operator in outside:
                parts = [self.item(part) for part in split(tokens, operator)]
                if operator == r"\cup" and all(isinstance(part, Set) for part in parts):
                    return Set(tuple(item for part in parts if isinstance(part, Set) for item in part.items))
                return Reals(functools.reduce(combined, (pieces_of(part) for part in parts)))
        return self.value(tokens)

    def value(self, tokens: Sequence[Token]) -> Answer:
        text = "".join(token.text for token in tokens)
        if text == r"\emptyset":
            return Set(())
        if text == r"\mathbb{R}":
            return Reals((EVERYTHING,))
        if re.fullmatch(r"\\mathbb\{[A-Z]\}", text):
            return Text(text)
        clock = _CLOCK.fullmatch(text.lower().replace(".m", "m").rstrip("."))
        if clock and (clock[2] or ":0" in clock[1]):
            return clock_of(clock[1].split(":"), clock[2] or "")
        numeral = _NUMERAL.fullmatch(text)
        if numeral:
            sign = "- " if text.startswith("-") else ""
            return Numeral(sign + (numeral[1].lstrip("0") or "0"), int(numeral[2]))
        if any(_MATRICES.match(token.text) for token in tokens) and tokens[-1].text.startswith(r"\end"):
            return self.matrix(tokens)
        if tokens[0].text in ("(", "[") and is_group(tokens):
            parts = split(tokens[1:-1], ",")
            if len(parts) == 1:
                return self.answer(parts[0])
            items = tuple(self.item(part) for part in parts)
            return _nested(items) or Bracket(tokens[0].text, tokens[-1].text, items)
        ratio = split([_COLON if token.text == "to" else token for token in tokens], ":")
        if len(ratio) > 1:
            return Ratio(tuple(self.scalar(part) for part in ratio))
        return self.scalar(tokens)

    def is_text(self, tokens: Sequence[Token]) -> bool:
        """Whether the tokens are words, at least one of which cannot be a product of symbols."""
        first = next((token for token in tokens if token.text != "("), None)
        if first is None or first.kind not in ("word", "text", "script"):
            return False
        if any(token.kind == "symbol" and token.text not in _PUNCTUATION for token in tokens):
            return False
        if is_group(tokens[1:]) and first.kind == "word":  # f(x)
            return False
        return any(is_word(token, self.gold.is_expression) for token in tokens)

    def set(self, tokens: Sequence[Token]) -> Answer:
        if not tokens:
            return Set(())
        for bar in (r"\mid", "|", ":"):
            condition = split(tokens, bar) if bar in [token.text for token in tokens] else []
            name, *domain = split(condition[0], r"\in") if len(condition) == 2 else [()]
            if _name(name):
                sets = [self.item(part) for part in domain] + [self.answer(condition[1])]
                return Reals(functools.reduce(intersection, map(pieces_of, sets)))
        return Set(_several([self.item(part) for part in split(tokens, ",")]).items)

    def relation(self, tokens: Sequence[Token], operators: Sequence[str]) -> Answer:
        sides = split(tokens, *_RELATIONS)
        if operators[0] in (r"\in", r"\notin"):
            if len(sides) != 2 or not all(_name(part) for part in split(sides[0], ",")):
                raise UnreadableError("only a name is in a set")
            value = self.answer(sides[1])
            return value if operators[0] == r"\in" else Reals(without((EVERYTHING,), pieces_of(value)))
        if r"\approx" in operators:
            while operators and operators[-1] == r"\approx" and not _name(sides[-2]):
                self.check_rounded(*sides[-2:])
                sides, operators = sides[:-1], operators[:-1]
            operators = ["="] * len(operators)
        if not operators:
            return self.item(sides[0])
        return self.equation(sides) if set(operators) == {"="} else self.inequality(sides, operators)

    def check_rounded(self, exact: Sequence[Token], rounded: Sequence[Token]) -> None:
        """Refuse approximations such as `5 \\approx 6`, in which the second number is not the first one rounded."""
        if any(token.kind == "symbol" and token.text not in ("-", "$", "%", "^", r"\circ") for token in rounded):
            raise UnreadableError("an approximation is not a decimal")
        decimals = next((len(token.text.partition(".")[2]) for token in rounded[::-1] if token.kind == "number"), 0)
        if abs(bound_of(self.scalar(exact)) - bound_of(self.scalar(rounded))) > 0.5000001 * 10**-decimals:
            raise UnreadableError("two numbers are not about equal")

    def equation(self, sides: Sequence[tuple[Token, ...]]) -> Answer:
        if _name(sides[-1]) and len(sides) == 2 and not _name(sides[0]):
            sides = sides[::-1]
        name, value = _name(sides[0]), sides[-1]
        letters = {letter for token in value if token.kind == "word" for letter in (token.text, *token.text)}
        if not name or sides[0][0].text in letters or sides[0][0].text in [t.text for t in value if t.text in SYMBOLS]:
            return Equation(tuple(self.scalar(side) for side in sides))
        try:
            left = self.scalar(sides[0])
        except UnreadableError:
            left = None
        return Named(name, self.item(value), tuple(self.scalar(side) for side in sides[1:-1]), left)

    def inequality(self, sides: Sequence[tuple[Token, ...]], operators: Sequence[str]) -> Answer:
        if set(operators) <= set(_FALLING):
            sides, operators = sides[::-1], [_FALLING[operator] for operator in reversed(operators)]
        if not (set(operators) <= {"<", r"\le"} or list(operators) == [r"\ne"]):
            raise UnreadableError("the relations have different directions")
        names = [_name(side) if side[0].text != "|" else "" for side in sides]
        relation = Relation(tuple(self.scalar(side) for side in sides), tuple(operators))
        bounds, is_open = relation.sides, [operator == "<" for operator in operators]
        if len(sides) == 2 and r"\ne" not in operators and (reals := _of_absolute_value(sides, relation)):
            return reals
        if operators[0] == r"\ne" and names[0]:
            return Reals(without((EVERYTHING,), (Interval(bounds[1], bounds[1]),)), names[0])
        if len(sides) == 3 and names[1]:
            return Reals((Interval(bounds[0], bounds[2], *is_open),), names[1])
        if len(sides) == 2 and names[0] and not names[1]:
            return Reals((Interval(MINUS_INFINITY, bounds[1], True, is_open[0]),), names[0], relation)
        if len(sides) == 2 and names[1] and not names[0]:
            return Reals((Interval(bounds[0], INFINITY, is_open[0], True),), names[1], relation)
        return relation

    def cases(self, tokens: Sequence[Token]) -> Answer:
        r"""A system, all of whose rows hold, or values with conditions after `&`."""
        rows = [split(row, "&") for row in split(tokens, r"\\") if row]
        if all(len(row) == 1 for row in rows):
            return self.items([token for (row,) in rows for token in (*_without_comma(row), _COMMA)])
        if any(len(row) != 2 for row in rows):
            raise UnreadableError("a case has no condition")
        return Cases(tuple((self.items(value), self.condition(tokens)) for value, tokens in rows))

    def condition(self, tokens: Sequence[Token]) -> Answer:
        while tokens and tokens[0].text in ("if", "for", "when", ","):
            tokens = tokens[1:]
        answer = self.items(tokens)
        return Text(answer.words.replace(" is ", " ")) if isinstance(answer, Text) else answer

    def matrix(self, tokens: Sequence[Token]) -> Matrix:
        begin = next(number for number, token in enumerate(tokens) if _MATRICES.match(token.text))
        factor, inner = tokens[:begin], tokens[begin + 1 : -1]
        if "array" in tokens[begin].text and inner and inner[0].text == "{":
            inner = inner[next(number for number, token in enumerate(inner) if token.text == "}") + 1 :]
        if inner and inner[-1].text == r"\\":
            inner = inner[:-1]
        rows = tuple(tuple(self.scalar(cell) for cell in split(row, "&")) for row in split(inner, r"\\"))
        if len({len(row) for row in rows}) != 1:
            raise UnreadableError("the rows of a matrix have different lengths")
        if factor:
            sign = "-1" if [token.text for token in factor] == ["-"] else self.scalar(factor).latex
            rows = tuple(tuple(Scalar(rf"({sign})\cdot ({c.latex})", c.is_decimal) for c in row) for row in rows)
        return Matrix(rows)

    def scalar(self, tokens: Sequence[Token]) -> Scalar:
        """An expression without its currency and unit."""
        tokens = [token for number, token in enumerate(tokens) if token.text != "$" or 1 < number < len(tokens) - 1]
        number, factor, is_percent = without_unit(tokens, self.gold)
        written = write(number, self.has_index_i)
        latex = written.latex if factor == 1 else rf"({written.latex})\cdot {factor}"
        if expression(latex) is None:
            raise UnreadableError("the expression does not parse")
        return Scalar(latex, written.is_decimal, is_percent, written.is_degrees)


def _without_comma(tokens: Sequence[Token]) -> Sequence[Token]:
    while tokens and tokens[-1].text == ",":
        tokens = tokens[:-1]
    return tokens


def _nested(items: Sequence[Answer]) -> Matrix | None:
    """The matrix whose rows are lists in square brackets of equal length; None for anything else."""
    rows = [item.items for item in items if isinstance(item, Bracket) and item.left + item.right == "[]"]
    cells = tuple(tuple(cell for cell in row if isinstance(cell, Scalar)) for row in rows)
    is_matrix = len(rows) == len(items) > 1 and {len(row) for row in cells} == {len(rows[0])} == {*map(len, rows)}
    return Matrix(cells) if is_matrix else None


def _of_absolute_value(sides: Sequence[Sequence[Token]], relation: Relation) -> Reals | None:
    """The numbers with |x| < c or c < |x| for a positive number c; None for any other relation."""
    for number, side in enumerate(sides):
        name = _name(side[1:-1]) if len(side) > 2 and side[0].text == side[-1].text == "|" else ""
        bound, is_open = relation.sides[1 - number], relation.operators[0] == "<"
        if name and (value_of(bound) or 0) > 0:
            opposite = Scalar(f"-({bound.latex})", bound.is_decimal)
            if number == 0:
                return Reals((Interval(opposite, bound, is_open, is_open),), name, relation)
            outside = Interval(MINUS_INFINITY, opposite, True, is_open), Interval(bound, INFINITY, is_open, True)
            return Reals(outside, name, relation)
    return None


def _several(items: Sequence[Answer]) -> Several:
    """Several items, with nested `Several` flattened."""
    return Several(tuple(part for item in items for part in (item.items if isinstance(item, Several) else (item,))))


def _signed(tokens: Sequence[Token], plus: str, minus: str) -> tuple[Token, ...]:
    signs = {r"\pm": plus, r"\mp": minus}
    return tuple(token._replace(text=signs[token.text]) if token.text in signs else token for token in tokens)


def _name(tokens: Sequence[Token]) -> str:
    """The name of one unknown: a symbol with subscripts or arguments, letters of a figure, or words; else empty."""
    if not tokens:
        return ""
    text = "".join(token.text for token in tokens)
    if all(token.kind in ("text", "word", "script") for token in tokens) and any(is_word(token) for token in tokens):
        return text.casefold()
    if tokens[0].text == tokens[-1].text == "|" and len(tokens) > 2:
        return f"|{name}|" if (name := _name(tokens[1:-1])) else ""
    if ":" in [token.text for token in tokens]:
        return text if all(map(_name, split(tokens, ":"))) else ""
    if tokens[0].text == "(" and is_group(tokens):
        parts = [_name(part) for part in split(tokens[1:-1], ",")]
        return text if len(parts) > 1 and all(parts) else ""
    if tokens[0].text in (r"\angle", r"\triangle") and len(tokens) > 1:
        return text if tokens[1].kind == "word" else ""
    first, rest = tokens[0], tokens[1:]
    if not (first.kind == "text" or first.kind == "word" and (len(first.text) == 1 or first.text.isupper())):
        if first.text not in SYMBOLS and not (first.text in _DECORATED and rest and is_group(rest)):
            return ""
        rest = rest if first.text in SYMBOLS else ()
    while rest and rest[0].text in ("_", "'", "^"):
        if rest[0].text == "^" and r"\prime" not in [token.text for token in rest[1:3]]:
            return ""
        length = (
            1 if rest[0].text == "'" else 2 if len(rest) > 1 and rest[1].text != "{" else _group_length(rest[1:]) + 1
        )
        rest = rest[length:]
    return text if not rest or rest[0].text == "(" and is_group(rest) else ""


_DECORATED = frozenset((r"\vec", r"\overline", r"\hat", r"\bar", r"\tilde", r"\overrightarrow"))


def _group_length(tokens: Sequence[Token]) -> int:
    return next((length for length in range(2, len(tokens) + 1) if tokens[length - 1].text == "}"), len(tokens))
