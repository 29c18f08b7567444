"""Splits an answer into tokens, with one name for all spellings of a symbol, and splits tokens at separators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from upge.verify.normalize import TEXT


class UnreadableError(ValueError):
    """A text is not one answer as a whole."""


class Token(NamedTuple):
    """A part of an answer.

    Attributes:
        kind: "number", "word", "text" (from a \\text), "script" (Chinese or Japanese) or "symbol".
        text: the spelling after `_ALIASES` and `NAMES`; for a \\text, its content.
        is_spaced: whether white space precedes it.
    """

    kind: str
    text: str
    is_spaced: bool = False


_FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot arcsec arccsc cis log ln exp max min gcd lcm"
)
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot square "
    "prime"
)
FUNCTIONS = frozenset(f"\\{name}" for name in _FUNCTIONS.split())
SYMBOLS = frozenset(f"\\{name}" for name in _GREEK.split())
NAMES = {name: f"\\{name}" for name in f"{_FUNCTIONS} sqrt pi cup alpha beta theta lambda omega".split()} | {
    **{"arc" + name: rf"\arc{name}" for name in ("sin", "cos", "tan", "cot")},
    **{"asin": r"\arcsin", "acos": r"\arccos", "atan": r"\arctan", "lg": r"\log", "tg": r"\tan", "ctg": r"\cot"},
    **{"infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "mod": r"\mod"},
}
"""Words that stand for a macro."""
_ALIASES = {
    alias: name
    for name, *aliases in map(
        str.split,
        r"""
        \le \leq \leqslant <=
        \ge \geq \geqslant >=
        \ne \neq !=
        < \lt
        > \gt
        \cdot * \times \ast
        / \div
        ^ **
        ( \langle \lgroup
        ) \rangle \rgroup
        [ \lbrack
        ] \rbrack
        \{ \lbrace
        \} \rbrace
        | \lvert \rvert \vert
        : \colon
        , ;
        $ \$ € £ ¥ ¢
        % \%
        and \land \wedge 和 且
        or \lor \vee 或
        \infty \infin
        \emptyset \varnothing
        \binom \dbinom \tbinom
        \log \lg
        \tan \tg
        \cot \ctg
        \mod \bmod
        \to \rightarrow
        \setminus \backslash
        \mathbb{R} \R
        """.strip().splitlines(),
    )
    for alias in aliases
}
"""Spellings of a symbol → the one that the grammar knows."""
_CONJUNCTIONS = "或和且"
_WITHOUT_SPACE = re.compile(r"(\\(?:leq|geq|neq|triangle|angle|cdot|times|approx))([A-Za-z]+)")
"""A macro that has lost the space after it."""
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:[0-9]+(?:\.(?:[0-9]+|(?=\\(?:overline|bar|dot)\b)))?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9A-Za-z.])|(?<=\.[0-9])[eE][-+]?[0-9]{1,4}(?![0-9.]))?)"
    rf"|(?P<text>{TEXT}\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})|(?P<word>[A-Za-z]+)"
    rf"|(?P<script>[{_CONJUNCTIONS}]|(?:(?![{_CONJUNCTIONS}])[\u3040-\u30ff\u3400-\u9fff])+)"
    r"|(?P<symbol>\\mathbb\s*\{[A-Z]\}|\\(?:begin|end)\s*\{[a-z]+\}|\\(?:[A-Za-z]+|.)|<=|>=|!=|\*\*|.)",
    re.DOTALL,
)
_PARTS = re.compile(r"(?:sin|cos|tan)h|(?:arc|a)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|sqrt|pi|[A-Za-z]")


def tokens_of(text: str) -> tuple[Token, ...]:
    r"""The tokens of a spelled text. Words such as `pi` and `\text{sin}` become macros, "or" and "and" symbols."""
    tokens: list[Token] = []
    is_spaced = False
    for match in _TOKEN.finditer(text):
        kind, part = str(match.lastgroup), match[0]
        if kind == "space":
            is_spaced = True
            continue
        if kind == "text":
            part = part[part.index("{") + 1 : -1].strip(" ,.")
            if not part:
                continue
            if part in ("e", "i", "d", r"\pi") or part in NAMES:
                kind = "symbol" if part == r"\pi" else "word"
        if kind != "symbol" and _ALIASES.get(part, part.lower()) in ("or", "and"):
            kind, part = "symbol", part.lower()
        if kind == "word":
            tokens += _words(part, is_spaced, part == text)
        else:
            joined = _WITHOUT_SPACE.fullmatch(part) if kind == "symbol" and part not in _ALIASES else None
            if joined:
                part = joined[1]
            elif kind == "symbol":
                part = re.sub(r"\s", "", part)
            tokens.append(Token(kind, _ALIASES.get(part, part) if kind == "symbol" else part, is_spaced))
            tokens += _words(joined[2]) if joined else ()
        is_spaced = False
    return tuple(tokens)


def _words(word: str, is_spaced: bool = False, is_alone: bool = False) -> list[Token]:
    """A word, split at the functions and constants in it (`xsin`, `pir`) unless it has too many other letters.

    A word that is the whole answer is split only if it begins with a function, as in `sinx`.
    """
    parts = [word] if word in NAMES else _PARTS.findall(word)
    letters = sum(len(part) == 1 for part in parts)
    if letters == len(word) or letters > (1 if is_alone or "pi" in parts else 2) or is_alone and len(parts[0]) == 1:
        return [Token("word", word, is_spaced)]
    kinds = [("word", part) if len(part) == 1 else ("symbol", NAMES[part]) for part in parts]
    return [Token(kind, part, is_spaced and not number) for number, (kind, part) in enumerate(kinds)]


OPENING = {"(": ")]", "[": ")]", "{": "}", r"\{": (r"\}",), r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",)}
_CLOSING = frozenset(closing for closings in OPENING.values() for closing in closings)


def _closings(opening: str) -> Sequence[str]:
    return OPENING.get(opening) or (opening.replace("begin", "end"),)


def depths(tokens: Sequence[Token]) -> list[int]:
    """The number of brackets around each token; a bracket counts as being inside itself.

    Raises:
        UnreadableError: the brackets do not match.
    """
    result: list[int] = []
    stack: list[str] = []
    for token in tokens:
        if token.text in OPENING or token.text.startswith(r"\begin"):
            stack.append(token.text)
        result.append(len(stack))
        if token.text in _CLOSING or token.text.startswith(r"\end"):
            if token.text not in _closings(stack.pop() if stack else ""):
                raise UnreadableError("the brackets do not match")
    if stack:
        raise UnreadableError("a bracket is not closed")
    return result


def split(tokens: Sequence[Token], *separators: str) -> list[tuple[Token, ...]]:
    """The parts between separators outside all brackets. "2, 3, and 4" has no empty part.

    Raises:
        UnreadableError: a part is empty.
    """
    parts: list[list[Token]] = [[]]
    for token, depth in zip(tokens, depths(tokens), strict=True):
        if depth or token.kind != "symbol" or token.text not in separators:
            parts[-1].append(token)
        elif parts[-1] or token.text not in ("and", "or"):
            parts.append([])
    if len(parts) > 1 and not all(parts):
        raise UnreadableError("a part is empty")
    return [tuple(part) for part in parts]


def is_group(tokens: Sequence[Token]) -> bool:
    """Whether the first and the last token are the two brackets of one group."""
    if len(tokens) < 2 or tokens[0].kind != "symbol":
        return False
    if tokens[0].text not in OPENING and not tokens[0].text.startswith(r"\begin"):
        return False
    closing = [number for number, depth in enumerate(depths(tokens)) if depth == 1][1:]
    ends = _closings(tokens[0].text)
    return next((number for number in closing if tokens[number].text in ends), None) == len(tokens) - 1
