"""The verifier of numerical answers. It compares them exactly."""

from __future__ import annotations

import re
from fractions import Fraction

from upge.verify.answers import final_answer
from upge.verify.base import AnswerVerifier, shown
from upge.verify.normalize import is_invisible, normalize
from upge.verify.words import CHANGES_A_NUMBER

LONGEST_NUMBER = 1000
"""The maximum number of characters of a number, and the largest exponent."""

_SIGN = r"(?P<sign>[-+]?)"
_DIGITS = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?P<decimal>{_DIGITS}(?:\.[0-9]*+)?|\.[0-9]++)"
_TEN = r"10\^(?:\{(?P<{0}braced>[-+]?[0-9]+)\}|(?P<{0}power>[0-9])(?![0-9]))"
_POWER = rf"(?:[eE](?P<e>[-+]?[0-9]+)| ?(?:\\times|\\cdot|\*|\u00d7) ?{_TEN.replace('{0}', '')})"
_RATIO = (
    r"(?P<whole>[0-9]+(?:[ +]|(?=\\frac)))?(?:(?P<above>[0-9]+)/(?P<below>[0-9]+)|"
    r"\\frac(?:\{(?P<top>[-+]?[0-9]+)\}|(?P<top1>[0-9]))(?:\{(?P<bottom>[0-9]+)\}|(?P<bottom1>[0-9])))"
)
_CURRENCY = r"(?:\\?[$\u00a3\u20ac\u00a5])?"
_NUMBER = re.compile(rf"{_CURRENCY}{_SIGN}{_CURRENCY}(?:{_RATIO}|{_TEN.replace('{0}', 'bare')}|{_DECIMAL}{_POWER}?)")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"({'|'.join(_SCALES)})(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")
_UNIT = re.compile(
    r"(?: ?\\?%| ?\u00b0)?(?:[-/ ]*+[A-Za-z\u20ac$]++[.;]?(?: ?\^(?:[23]|\{[23]\})|[\u00b2\u00b3])?)*+[.;]?"
)
_CHANGES_IT = re.compile(
    rf"{CHANGES_A_NUMBER}|\b(?:to|[iexynk]|(?:hundred|dozen|thousand|(?:m|b|tr)illion)s?|percent points)\b"
    r"|\\(?![ %$,;:!])",
    re.IGNORECASE,
)


class NumberVerifier(AnswerVerifier):
    r"""Reward 1 if the final answer (`final_answer`) is a number that equals the ground truth exactly, else 0.

    It reads whole numbers, decimals, fractions, mixed numbers and powers of ten. Thousands separators, a currency sign,
    a leading `x =`, a percent sign and a unit without digits are ignored: 5 %, $5 and 5 cm are 5. Words such as
    "million" multiply the number. There is no tolerance: 0.3333 is not 1/3. An answer with two numbers earns 0.
    """

    def extract(self, response: str) -> str | None:
        return final_answer(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float:
        number = read_number(given)
        return float(number is not None and number == read_number(answer))

    def check_answer(self, answer: str) -> None:
        """Refuse a ground truth that is not one number.

        Raises:
            ValueError: `answer` cannot be read as a number.
        """
        if read_number(answer) is None:
            raise ValueError(
                f"the ground truth {shown(answer)} is not a number; give one such as 1250, -0.5, 3/4 or 6.02e23, use "
                "another verifier, or remove the row"
            )


def read_number(text: str) -> Fraction | None:
    """The exact value of a number in text or LaTeX; None if the text is not exactly one number."""
    if len(text) > LONGEST_NUMBER or is_invisible(text):
        return None
    before, _, text = normalize(text).rpartition("=")
    text = text.strip()
    number = _NUMBER.match(text)
    if not number or _SEVERAL.search(before):
        return None
    rest = _TEXT.sub(lambda words: f" {words[1].strip()}", text[number.end() :]).strip()
    scale = _SCALE.match(rest)
    if scale:
        rest = rest[scale.end() :].strip()
    if not _UNIT.fullmatch(rest) or _CHANGES_IT.search(rest):
        return None
    value = _value(number)
    return value * 10 ** _SCALES[scale[1]] if value is not None and scale else value


def _value(number: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER`; None for a division by 0 or an exponent that is too large."""
    sign = -1 if number["sign"] == "-" else 1
    if number["decimal"] is None and number["barebraced"] is None and number["barepower"] is None:
        top = int(number["above"] or number["top"] or number["top1"])
        bottom = int(number["below"] or number["bottom"] or number["bottom1"])
        whole = int((number["whole"] or "0").strip(" +"))
        return sign * (whole + Fraction(top, bottom)) if bottom else None
    powers = ("e", "braced", "power", "barebraced", "barepower")
    exponent = int(next((number[name] for name in powers if number[name]), 0))
    if abs(exponent) > LONGEST_NUMBER:
        return None
    size = Fraction(re.sub(r"[, ]", "", number["decimal"] or "1").rstrip(".") or "0")
    return sign * size * Fraction(10) ** exponent
