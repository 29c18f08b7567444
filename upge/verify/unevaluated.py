r"""Recognizes answers that only restate the question.

A parser evaluates what it reads. To it, `\boxed{\int_0^1 x\,dx}` equals 1/2 and `\boxed{x^2+2x+1}` equals (x+1)^2,
even if evaluating the first or factoring the second was the task.
"""

from __future__ import annotations

import functools
import math
import re

from upge.verify.normalize import NUMBER, respell

_FRACTION = re.compile(r"[+-]?(?:([0-9]+)/([0-9]+)|\\frac\{?[+-]?([0-9]+)\}?\{?([0-9]+)\}?)")
_SCIENTIFIC = re.compile(r"\*10\^(?:\{[+-]?[0-9]+\}|[0-9])")
_UNIT_TEXT = re.compile(
    r"\\(?:text\w*|mbox|mathrm)\s*\{(?:[^{}]|\{[^{}]*\})*\}|\\?%|\^\\circ(?: ?[CF](?![a-zA-Z])|(?![a-z]))"
)
# One or more words of letters after a number: 5 cm, 5 m/s^2. A single letter is an unknown.
_UNIT_WORDS = re.compile(r"(?<=[0-9)}!]) ?(?:[A-Za-z]{2,}|[A-Za-z](?= ?/))(?:[ /*][A-Za-z]+|\^\{?-?[23]\}?)*\Z")
_GREEK = r"alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
_UNKNOWN = re.compile(
    rf"\\(?:var)?(?:{_GREEK})(?![a-z])|(?<![\\a-zA-Z])(?!(?:pi|[ei])(?![a-zA-Z]))[a-zA-Z]+", re.IGNORECASE
)
_EULER = re.compile(r"(?<![a-zA-Z\\])e(?![a-zA-Z])|\\(?:sin|cos|tan)h")
_ARITHMETIC = re.compile(r"[0-9.,+\-*/(){}^ ]+")
_PENDING = re.compile(r"[0-9.)}] ?(?:[+\-*] ?[0-9.({+\-]|\()")
_OPERATION = re.compile(r"[0-9A-Za-z)}\]!] ?[-+*/^!|]|[|!]|\\(?:d?frac|sqrt|binom|cdot|times|div|pm|over)(?![a-z])")
_TURNED = re.compile(r"[^=]+= ?[A-Za-z]")
_AROUND_OPERATOR = re.compile(r" ?([-+*/^_=]) ?")
# The boundaries of an expression that is not part of a larger one: no digit, letter, operator or parenthesis.
_BEFORE, _AFTER = r"(?<![0-9A-Za-z.+\-*/^_{])(?<!(?<!\\)\()", r"(?![0-9A-Za-z+\-*/^_!({]|\.[0-9])"
_FAMILIES = tuple(
    re.compile(names)
    for names in (
        r"(?<![a-zA-Z])\\?(?:a(?:rc)?)?(?:sin|cos|tan|cot|sec|csc|cis)h?(?![a-zA-Z])",
        r"(?<![a-zA-Z])\\?(?:log|ln|lg)(?![a-zA-Z])",
        r"\\sum(?![a-z])|\u2211",
        r"\\prod(?![a-z])|\u220f",
        r"\\i*int(?![a-z])|\u222b",
        r"\\lim(?:sup|inf)?(?![a-z])",
        r"\\(?:max|min|sup|inf)(?![a-z])|\\operatorname\{(?:max|min)\}",
        r"\\(?:gcd|lcm)(?![a-z])|\\operatorname\{(?:gcd|lcm)\}",
        r"\\det(?![a-z])|\\operatorname\{det\}|\\begin\{[vV]matrix\}",
        r"(?<![a-zA-Z])\\?exp(?![a-zA-Z])",
        r"\\lfloor|\\lceil|\\operatorname\{(?:floor|ceil)\}|\u230a|\u2308",
        r"\\[bp]?mod(?![a-z])|\\operatorname\{mod\}",
        r"\\frac\{d\}\{d[a-z]\}|\\partial",
    )
)


def has_unevaluated_operation(gold: str, given: str) -> bool:
    """Whether a normalized answer contains an operation that should have been evaluated, given the ground truth.

    If the ground truth is a number or a fraction, this is a sum, difference or product of plain numbers, or anything
    with letters that are not a unit. For any ground truth, it is a function of a kind that the ground truth does not
    contain: trigonometric, logarithm, exponential, sum, product, integral, limit, maximum, divisor, determinant,
    rounding, remainder or derivative.
    """
    result = result_of(given)
    if NUMBER.fullmatch(gold) or is_fraction(gold):
        plain = _UNIT_WORDS.sub("", _without_units(result))
        if _is_arithmetic(plain) or _UNKNOWN.search(plain):
            return True
    gold = _EULER.sub(r"\\exp", gold)
    return any(family.search(result) and not family.search(gold) for family in _FAMILIES)


def is_copied(gold: str, given: str, prompt: str | None) -> bool:
    """Whether a normalized answer is an expression copied from the prompt that could be evaluated.

    Numbers, fractions in lowest terms and texts without an operation are results, even if the prompt contains them.
    """
    if not prompt:
        return False
    given = _without_units(given if "=" in gold else result_of(given))
    if NUMBER.fullmatch(given) or _is_reduced(given) or not _OPERATION.search(given):
        return False
    given = _canonical(given)
    inner = _without_outer_brackets(given)
    return any(_occurs_in(text, _respelled(prompt)) for text in (given, inner, f"({inner})"))


def is_fraction(text: str) -> bool:
    """Whether a normalized text is a fraction of two whole numbers."""
    return bool(_FRACTION.fullmatch(text))


def bare_result(text: str) -> str:
    """The part of an answer after its last equals sign, without units and outer brackets."""
    return _without_outer_brackets(_without_units(result_of(text)))


def _is_reduced(text: str) -> bool:
    fraction = _FRACTION.fullmatch(text)
    return bool(fraction) and math.gcd(*(int(part) for part in fraction.groups() if part)) == 1


def _is_arithmetic(text: str) -> bool:
    text = re.sub(r" ?(?:\\(?:times|cdot|ast)(?![a-zA-Z])|[\u00d7\u00b7]) ?", "*", text)
    text = re.sub(r"\\(?:frac|sqrt)(?![a-zA-Z])|\\[{}]", "", text)
    text = re.sub(r"\\pi(?![a-zA-Z])|(?<![a-zA-Z])[ei](?![a-zA-Z])", "1", text)
    text = _SCIENTIFIC.sub("", text)
    return bool(_ARITHMETIC.fullmatch(text) and _PENDING.search(text))


def _occurs_in(text: str, prompt: str) -> bool:
    pattern = " ?".join(re.escape(character) for character in text if character != " ")
    return bool(pattern and re.search(rf"{_BEFORE}{pattern}{_AFTER}", prompt))


def _canonical(text: str) -> str:
    r"""A text with one spelling for powers and fractions of single terms: x^{2} is x^2, \frac{6}{8} is 6/8."""
    text = re.sub(r"\^\{(\w+)\}", r"^\1", text)
    return re.sub(r"\\[dt]?frac ?(?:\{ ?(\w+) ?\}|([0-9])) ?(?:\{ ?(\w+) ?\}|([0-9]))", r"\1\2/\3\4", text)


def _without_outer_brackets(text: str) -> str:
    while len(text) > 2 and text[0] + text[-1] in ("()", "[]", "{}") and _is_one_group(text):
        text = text[1:-1].strip()
    return text


def _is_one_group(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _without_units(text: str) -> str:
    return _UNIT_TEXT.sub("", text).strip()


def result_of(text: str) -> str:
    """The text after the last equals sign outside braces (within braces it belongs to a sum), or the 5 of 5 = x."""
    if _TURNED.fullmatch(text):
        return text.partition("=")[0].strip()
    depth, begin = 0, 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "=" and depth == 0:
            begin = position + 1
    return text[begin:].strip()


@functools.lru_cache(maxsize=256)
def _respelled(prompt: str) -> str:
    """A prompt in the spelling of normalized answers, but with spaces between words."""
    return _canonical(_AROUND_OPERATOR.sub(r"\1", respell(prompt).replace(r"^\circ", "")))
