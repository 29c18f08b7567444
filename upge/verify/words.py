"""Words in answers: units, words such as "million", words that change a number, and texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from upge.verify.tokens import Token, UnreadableError


class Gold(NamedTuple):
    """What the ground truth says about the meaning of an answer's words.

    Attributes:
        is_number: True if any words after a number may be a unit (18 eggs per day), not only texts and `_UNITS`.
        is_expression: True if up to three letters are a product, even if they could be a word.
    """

    is_number: bool = False
    is_expression: bool = False


NO_GOLD = Gold()
_SHORT_WORDS = frozenset(
    "no on yes is it of so up an as at be by do go he if in me my us we to am pm odd all any add act".split()
)
_LIKE_A_WORD = re.compile(r"(?=.*[eiou])[a-z]{3}|[a-z]a[a-z]")
_UNITS = frozenset(
    "cm mm km dm ft yd mi kg mg lb oz ml hr hrs min sec mph dollars dollar cents cent degrees degree inches inch feet "
    "foot meters metres meter miles units unit hours hour minutes minute seconds second days weeks months years "
    "percent".split()
)
_UNIT_LETTERS = frozenset("mgshLlJNWVAKCFT")
_POWER = r"(?:\^(?:n|\{-?n\}))?"
_UNIT = re.compile(rf"(?:U{_POWER}[/*]?)*U{_POWER}\Z|f\{{U+{_POWER}\}}\{{U+{_POWER}\}}\Z|\^oC\Z")
CHANGES_A_NUMBER = (
    r"\b(?:or|and|not|no|is|are|if|else|otherwise|unless|except|wrong|than|plus|minus|negative|below|times|over|half|"
    r"halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin)ths|(?:ten|hundred|thousand)ths?|tens|squared|cubed|gross|"
    r"point|mod|base|pi|sqrt|when|where|maybe|perhaps|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|"
    r"twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b"
)
"""Words that cannot be a unit, because they change the number before them or are another number."""
_CHANGES_IT = re.compile(
    rf"{CHANGES_A_NUMBER}|\b(?:k|bn|mn|only)\b|\\(?!cdot|times|,)|[0-9;=:]|(?<!\\),|[\u4e0d\u6216\u548c]", re.IGNORECASE
)
_SCALES = {
    **{"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"\u767e": 100, "\u5343": 10**3, "\u4e07": 10**4, "\u767e\u4e07": 10**6, "\u4ebf": 10**8},
}
_SCALE = re.compile(rf"({'|'.join(sorted(_SCALES, key=len, reverse=True))})s?(?![a-z])", re.IGNORECASE)


_ARTICLE = re.compile(r"^(?:an?|the) (?=\w\w)")
ALL_REALS = re.compile(
    r"(?:[a-z] (?:is |can be )?)?(?:all|any|set of(?: all)?) (?:reals|real (?:numbers?|values?|[a-z]))(?: [a-z])?"
)
NOTHING = re.compile(
    r"none|empty set|(?:there (?:is|are) )?no (?:(?:real|integer|such|possible) )*(?:solution|root|value)s?"
    r"(?: exists?)?|\u65e0\u89e3|\u7a7a\u96c6|\u65e0\u5b9e\u6570\u89e3"
)
"""Words for the empty set."""


def without_unit(tokens: Sequence[Token], gold: Gold) -> tuple[Sequence[Token], int, bool]:
    """A value, its factor from words such as "million", and whether it is a percentage."""
    has_slash = any(token.text == "/" for token in tokens)
    unit = _UNIT.search("".join(_shape(token, has_slash, gold) for token in tokens))
    if not unit or not unit.start():
        is_percent = len(tokens) > 1 and tokens[-1].text == "%"
        return tokens[:-1] if is_percent else tokens, 1, is_percent
    words = " ".join(token.text for token in tokens[unit.start() :] if token.kind not in ("number", "symbol"))
    words = re.sub(r"\^\{?-?[0-9]\}?", "", words)
    scales = _SCALE.findall(words)
    factor = functools.reduce(int.__mul__, (_SCALES[scale.lower()] for scale in scales), 1)
    if _CHANGES_IT.search(words):
        raise UnreadableError("the words change the number")
    number, more, is_percent = without_unit(tokens[: unit.start()], gold)
    return number, factor * more, is_percent or bool(re.search(r"\bpercent\b", words))


def _shape(token: Token, has_slash: bool, gold: Gold) -> str:
    """The token's character for `_UNIT`; U if it may be a unit."""
    if token.kind in ("text", "script"):
        return "U"
    if token.kind == "number":
        return "n"
    name = token.text.removeprefix("\\")
    is_letter = len(name) == 1 and name.isalpha()
    if name in _UNITS or name in _SCALES or gold.is_number and token.kind == "word" and not is_letter:
        return "U"
    if gold.is_number and has_slash and name in _UNIT_LETTERS:
        return "U"
    shapes = {r"\cdot": "*", r"\circ": "o", r"\frac": "f", "C": "C", "F": "C"}
    return shapes.get(token.text, token.text if len(token.text) == 1 and not is_letter else ".")


def words_in(tokens: Sequence[Token]) -> str:
    """The words and texts among tokens, in lower case, separated by one space, without a leading article."""
    return _ARTICLE.sub("", " ".join(token.text for token in tokens if token.kind != "symbol").casefold())


def is_word(token: Token, is_expression: bool = False) -> bool:
    """Whether a token is a word: a text, four or more letters, two or three with a capital, or one such as "on"."""
    text = token.text
    if token.kind != "word" or len(text) > 3 or len(text) > 1 and not text.islower():
        return token.kind in ("word", "text", "script")
    return not is_expression and (text in _SHORT_WORDS or bool(_LIKE_A_WORD.fullmatch(text)))
