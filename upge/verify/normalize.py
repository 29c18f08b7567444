"""Normalizes the typography of answers, without mathematics."""

from __future__ import annotations

import re

NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?")
TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mbox|emph|operatorname\*?)"
_GROUPS = r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
_THOUSANDS = re.compile(rf"[+-]?{_GROUPS}(?:\.[0-9]+)?")
_THOUSANDS_WITHIN = re.compile(rf"(?<![0-9.,])(?<![0-9.,] ){_GROUPS}(?![0-9])(?!,? ?[0-9])")
_WRAPPERS = (
    re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(rf"(?:{TEXT}|\\mathbf)\s*\{{([^{{}}$]*)\}}"),
    re.compile(r"\{([^{}\\]*)\}"),
    re.compile(r"(?<!\\)\$\$?([^$]*[^$\\])\$\$?"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
)
_CHARACTERS = {
    character: name if name.endswith("}") or not name.startswith(("\\", "^")) else name + " "
    for name, characters in map(
        str.split,
        r"""
        - −–‐‑
        . 。
        , 、
        ' ′’
        : ∶
        / ÷⁄∕
        \times ×
        \cdot ·⋅
        \sqrt √
        \sqrt[3] ∛
        \infty ∞
        \pm ±
        \mp ∓
        \le ≤⩽
        \ge ≥⩾
        \ne ≠
        \approx ≈
        \in ∈
        \notin ∉
        \cup ∪
        \cap ∩
        \emptyset ∅
        \mathbb{R} ℝ
        \mathbb{Z} ℤ
        \mathbb{N} ℕ
        ^\circ °
        \angle ∠
        \triangle △
        \sum ∑
        \prod ∏
        \int ∫
        \lfloor ⌊
        \rfloor ⌋
        \lceil ⌈
        \rceil ⌉
        \langle ⟨
        \rangle ⟩
        \land ∧
        \lor ∨
        \frac{1}{2} ½
        \frac{1}{3} ⅓
        \frac{2}{3} ⅔
        \frac{1}{4} ¼
        \frac{3}{4} ¾
        """.strip().splitlines(),
    )
    for character in characters
}
"""Characters → their LaTeX spelling."""
_GREEK = dict(
    zip(
        "αβγδεζηθκλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega "
        "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
_FULL_WIDTH = {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}
_TRANSLATION = str.maketrans(_FULL_WIDTH | _CHARACTERS | {letter: rf"\{name} " for letter, name in _GREEK.items()})
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_SCRIPTS = str.maketrans(_RAISED + _LOWERED, "0123456789+-n" * 2)
_FACE = r"\\(?:boldsymbol|mathbf|bm|mathit|mathnormal|underline|mathop|bold|bf|rm|it|sf)(?![a-zA-Z])"
_REPLACEMENTS = (
    # The whole answer is mathematics, so these delimiters have no meaning.
    (re.compile(r"(?<!\\)(?:\$|\\[()\[\]])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?"), ""),
    (
        re.compile(
            r"\\(?:(?:display|text|script)style|large|Large|LARGE|huge|Huge|small|normalsize)(?![a-zA-Z])|\\[bB]igg?[lrm]?(?![a-zA-Z])|\\(?:no)?limits(?![a-z])"
        ),
        "",
    ),
    (re.compile(rf"{_FACE}\s*\{{([a-zA-Z0-9])\}}"), r" \1"),
    (re.compile(_FACE), ""),
    (re.compile(r"\\(?:textcolor|colorbox|color|tag\*?|label)(?![a-zA-Z])\s*\{[^{}]*\}"), ""),
    # A comma with \! or braces separates thousands, unlike a plain one.
    (re.compile(r"(?<=[0-9])(?:,\\!|\{,\})\s*(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"(?<=[0-9])\\[,;:] ?(?=[0-9])"), " "),
    (re.compile(r"(?<!\\)\\[!,;:]"), ""),
    (re.compile(r"(?<!\\)\\ |~|\\q?quad(?![a-zA-Z])|\\[hv]space\s*\{[^{}]*\}"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"^\s*(?:\\approx(?![a-zA-Z])|=)"), ""),
    (re.compile(r" ?(?:\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\degree(?![a-zA-Z]))"), r"^\\circ "),
    (re.compile(r"\bnp\.(?=(?:arc)?(?:sin|cos|tan)|log|exp|sqrt|pi)"), r"\\"),
    (re.compile(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|-)"), ""),
    (re.compile(r"_\s*\{\s*\\(max|min)\s*\}"), r"_{\1}"),
    # Restore a missing space after the name of a function: \sinx.
    (re.compile(r"\\(pi|sin|cos|tan|cot|sec|csc|ln)(?=[a-gi-z]{1,2}(?![a-zA-Z]))"), r"\\\1 "),
    (re.compile(r"(?<=[0-9])\.(?![0-9.a-zA-Z\\])"), ""),
    (re.compile(r"(?<![a-zA-Z}])\{\}"), ""),
    (re.compile(rf"(?:{TEXT}\s*)?\{{[\s,]*(and|or)[\s,]*\}}"), r" \1 "),
    (re.compile(rf"(?<=[0-9]) ?\^ ?(?:\{{ ?)?{TEXT} ?\{{ ?(?:st|nd|rd|th) ?\}}(?: ?\}})?"), ""),
    (re.compile(r"\\(?:mathbb|Bbb) ?(?:\{ ?)?([A-Z])(?![a-zA-Z])(?: ?\})?"), r"\\mathbb{\1}"),
    (re.compile(r"(?<=[)\]]) ?U ?(?=[(\[])"), r"\\cup "),
    (re.compile(r"\s+"), " "),
)
_GROUPED = re.compile(r"(?<!\\)\{[0-9]{1,3}(?:,[0-9]{3})+\}")
# Keep the space of "60, 120": without it this would be one number.
_NEEDLESS_SPACE = re.compile(r"(?<![a-zA-Z0-9]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?![a-zA-Z0-9])")
_MATRIX = re.compile(r"\\begin\s*\{[pbvBV]?matrix\}")
_LONE_BACKSLASH = re.compile(r"(?<!\\)\\(?=[-0-9])")
_SCIENTIFIC = re.compile(
    r"([+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))[eE]\+?(-?[0-9]{1,4})(?=\Z|\\(?:text|mathrm|mbox)| [A-Za-z])"
)
_NAKED_TEXT = re.compile(rf"(?:{TEXT}|\\mathbf)\s*(?=\{{)")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def normalize(text: str) -> str:
    r"""The result of `spell` with numbers in one form: 1,000 becomes 1000; 142.0, +142, 142^\circ and 0142 become 142.

    "60, 120" with its space stays a list; "60,120" is a number. 4.5e33 becomes 4.5\times 10^{33}, so that its e is not
    read as Euler's number.
    """
    text = spell(text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    number = NUMBER.fullmatch(text.removesuffix(r"^\circ"))
    if number:
        sign, whole, decimals = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        size = f"{whole}.{decimals}" if decimals else whole
        text = f"-{size}" if sign == "-" and size != "0" else size
    power = _SCIENTIFIC.match(text)
    return rf"{power[1]}\times 10^{{{power[2]}}}{text[power.end() :]}" if power else text


def spell(text: str) -> str:
    r"""An answer without its typography, with characters such as √, ², ≤ and full-width digits in LaTeX or ASCII.

    Removes surrounding $, \(, \boxed, \text and braces, a final full stop or comma, \left, \right, thin spaces,
    colours, bold type and white space without meaning. \dfrac becomes \frac. In a matrix, a single backslash before a
    number or minus becomes a double one, because some data sets have lost the second.
    """
    text = _unwrapped(re.sub(r"\s+", " ", text).strip())
    if _MATRIX.search(text):
        text = _LONE_BACKSLASH.sub(r"\\\\", text)
    text = _NEEDLESS_SPACE.sub("", respell(text))
    # The replacements may have exposed another wrapper.
    return _unwrapped(text.strip(" ").rstrip(".,"))


def respell(text: str) -> str:
    """The replacements of `spell` for any text. Runs of white space become one space; none is removed."""
    # This comes first, because the patterns below would try to match at every position of a long run of spaces.
    text = re.sub(r"\s+", " ", text)
    if not text.isascii():
        text = re.sub(f"[{_RAISED}]+", lambda run: f"^{{{run[0].translate(_SCRIPTS)}}}", text.translate(_TRANSLATION))
        text = re.sub(f"[{_LOWERED}]+", lambda run: f"_{{{run[0].translate(_SCRIPTS)}}}", text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _GROUPED.sub(lambda number: number[0].replace(",", ""), text)


def without_separators(text: str) -> str:
    """A text without the separators of thousands in its numbers: `24,000x` → `24000x`; "60, 120" is unchanged."""
    return _THOUSANDS_WITHIN.sub(lambda number: number[0].replace(",", "").replace(" ", ""), text)


def loose(text: str) -> str:
    r"""A result of `spell` without \text and needless spaces: `\text{A5}_{11}` → `{A5}_{11}`, "60, 120" → "60,120"."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _NAKED_TEXT.sub("", text))


def is_invisible(text: str) -> bool:
    """Whether a text contains control, direction or zero-width characters, or lone surrogates.

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
