"""Normalizes the typography of answers, without mathematics."""

from __future__ import annotations

import re

NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?")
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)"
_WRAPPERS = (
    re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(_TEXT + r"\s*\{([^{}$]*)\}"),
    re.compile(r"\{([^{}\\]*)\}"),
    re.compile(r"(?<!\\)\$\$?([^$]*[^$\\])\$\$?"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
)
_REPLACEMENTS = (
    # A whole answer is mathematics. Of a formula within text, math-verify would read only the formula.
    (re.compile(r"(?<!\\)(?:\$|\\[()\[\]])"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\displaystyle(?![a-zA-Z])|(?<!\\)\\[!,;:]"), ""),
    (re.compile(r"(?<!\\)\\ |~"), " "),
    (re.compile(r"\{,\}(?=[0-9])"), ","),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"^\s*(?:\\approx(?![a-zA-Z])|\u2248)"), ""),
    # Degrees: 60^\circ is 60.
    (re.compile(r"(?<=[0-9)}])\s*(?:\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\u00b0)"), ""),
    (re.compile(r"\bnp\.(?=(?:arc)?(?:sin|cos|tan)|log|exp|sqrt|pi)"), r"\\"),
    (re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|-)"), ""),
    (re.compile(r"_\s*\{\s*\\(max|min)\s*\}"), r"_{\1}"),
    # Restore a missing space after the name of a function: \sinx.
    (re.compile(r"\\(pi|sin|cos|tan|cot|sec|csc|ln)(?=[a-gi-z]{1,2}(?![a-zA-Z]))"), r"\\\1 "),
    (re.compile(r"(?<=[0-9])\.(?![0-9.a-zA-Z\\])"), ""),
    (re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)\^(?:[0-9]|\{[0-9]+\}))(?=[a-zA-Z])"), r"\1 "),
    (re.compile(r"(?<![a-zA-Z}])\{\}"), ""),
    (re.compile(r"\s+"), " "),
)
_GROUPED = re.compile(r"(?<!\\)\{[0-9]{1,3}(?:,[0-9]{3})+\}")
# Keep the space of "60, 120": without it this would be one number.
_NEEDLESS_SPACE = re.compile(r"(?<![a-zA-Z0-9]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?![a-zA-Z0-9])")
_MATRIX = re.compile(r"\\begin\s*\{[pbvBV]?matrix\}")
_LONE_BACKSLASH = re.compile(r"(?<!\\)\\(?=[-0-9])")
_CONJUNCTION = re.compile(rf"(?:,|\{{,\}})?\s*(?:{_TEXT})?\s*\{{[\s,]*(?:and|or)\s*\}}|,?\s(?:and|or)\s(?=[-+.\\0-9(])")
_SCIENTIFIC = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[eE]\+?(-?[0-9]{1,4})(?=\Z|\\(?:text|mathrm|mbox)| [A-Za-z])"
)
_NAKED_TEXT = re.compile(_TEXT + r"\s*(?=\{)")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def normalize(text: str) -> str:
    r"""The result of `spell` with numbers in one form: 1,000 becomes 1000; 142.0, +142 and 0142 become 142.

    "60, 120" with its space stays a list; "60,120" is a number. 4.5e33 becomes 4.5\times 10^{33}, so that its e is not
    read as Euler's number.
    """
    text = spell(text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    number = NUMBER.fullmatch(text)
    if number:
        sign, whole, decimals = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        size = f"{whole}.{decimals}" if decimals else whole
        text = f"-{size}" if sign == "-" and size != "0" else size
    power = _SCIENTIFIC.match(text)
    return rf"{power[1]}\times 10^{{{power[2]}}}{text[power.end() :]}" if power else text


def spell(text: str) -> str:
    r"""An answer without its typography.

    Removes surrounding $, \(, \boxed, \text and braces, a final full stop or comma, \left, \right, thin spaces, degree
    signs and white space without meaning. \dfrac becomes \frac, and "a and b" becomes "a, b". In a matrix, a single
    backslash before a number or minus becomes a double one, because some data sets have lost the second.
    """
    # First, because the patterns below would try to match at every position of a long run of white space.
    text = _unwrapped(re.sub(r"\s+", " ", text).strip())
    if _MATRIX.search(text):
        text = _LONE_BACKSLASH.sub(r"\\\\", text)
    text = _NEEDLESS_SPACE.sub("", respell(_CONJUNCTION.sub(", ", text)))
    # The replacements may have exposed another wrapper.
    return _unwrapped(text.strip(" ").rstrip(".,"))


def respell(text: str) -> str:
    """The replacements of `spell` for any text. Runs of white space become one space; none is removed."""
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _GROUPED.sub(lambda number: number[0].replace(",", ""), text)


def loose(text: str) -> str:
    r"""A result of `spell` without \text and needless spaces: `\text{A5}_{11}` → `{A5}_{11}`, "60, 120" → "60,120"."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _NAKED_TEXT.sub("", text))


def is_invisible(text: str) -> bool:
    """Whether a text contains invisible characters: control, direction and zero-width characters, lone surrogates.

    Verifiers refuse such answers, because they are not what they look like.
    """
    return bool(_INVISIBLE.search(text))


def _unwrapped(text: str) -> str:
    previous = None
    while text != previous:
        previous = text
        for wrapper in _WRAPPERS:
            whole = wrapper.fullmatch(text)
            text = whole[1].strip() if whole else text
    return text
