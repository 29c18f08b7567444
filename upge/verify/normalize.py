"""One spelling for answers that differ in typography only, without any mathematics."""

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
    # An answer is mathematics as a whole; a formula within words would be read without them.
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
    # A space that was lost behind the name of a function: \sinx.
    (re.compile(r"\\(pi|sin|cos|tan|cot|sec|csc|ln)(?=[a-gi-z]{1,2}(?![a-zA-Z]))"), r"\\\1 "),
    (re.compile(r"(?<=[0-9])\.(?![0-9.a-zA-Z\\])"), ""),
    (re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)\^(?:[0-9]|\{[0-9]+\}))(?=[a-zA-Z])"), r"\1 "),
    (re.compile(r"(?<![a-zA-Z}])\{\}"), ""),
    (re.compile(r"\s+"), " "),
)
_GROUPED = re.compile(r"(?<!\\)\{[0-9]{1,3}(?:,[0-9]{3})+\}")
# Not the space of "60, 120": without it these would be one number.
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
    r"""The same answer as a grader would write it: as `spell`, and 1,000 is 1000; 142.0, +142 and 0142 are 142.

    "60, 120" with its space stays a list; "60,120" is a number. 4.5e33 is 4.5\times 10^{33}, without Euler's e.
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
    r"""An answer less its typography.

    Takes off surrounding $, \(, \boxed, \text, braces and a final full stop or comma; drops \left, \right, thin spaces,
    degree signs and white space without meaning; \dfrac is \frac; "a and b" is "a, b". In a matrix a single backslash
    before a number or minus separates rows: data sets have lost the other.
    """
    # First of all: in a long run of white space the patterns below would look for their beginnings everywhere.
    text = _unwrapped(re.sub(r"\s+", " ", text).strip())
    if _MATRIX.search(text):
        text = _LONE_BACKSLASH.sub(r"\\\\", text)
    text = _NEEDLESS_SPACE.sub("", respell(_CONJUNCTION.sub(", ", text)))
    # What is left may have come out of its wrapping only now.
    return _unwrapped(text.strip(" ").rstrip(".,"))


def respell(text: str) -> str:
    """The replacements of `spell` for any text: it keeps every space, as one."""
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _GROUPED.sub(lambda found: found[0].replace(",", ""), text)


def loose(text: str) -> str:
    r"""A spelled text without \text and needless spaces: `\text{A5}_{11}` is `{A5}_{11}`, "60, 120" is "60,120"."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _NAKED_TEXT.sub("", text))


def is_invisible(text: str) -> bool:
    """Does it hold anything that is not shown: control characters, marks of direction, zero-width ones, half letters?

    An answer that shows one thing and holds another is not read.
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
