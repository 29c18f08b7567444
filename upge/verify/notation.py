r"""Splits an answer into tokens, and writes expressions in the LaTeX that latex2sympy reads as a whole.

An expression may be written in LaTeX, in plain text or in a mixture (`3√2`, `12pi`, `7*sin(pi*x/5)+1`,
`\frac12\sqrt[3]x`). `write` gives each of them one spelling, in which nothing is left for the parser to guess: every
macro and function has its arguments in braces or parentheses, every symbol is a `\variable{...}`, decimals are exact
fractions, and the imaginary unit is `(I)`. What cannot be spelled so is `UnreadableError`.
"""

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
        kind: "number", "word", "text" (of a \\text), "script" (Chinese or Japanese) or "symbol".
        text: as in `_ALIASES` and `NAMES`; of a \\text, its content.
        is_spaced: whether white space precedes it.
    """

    kind: str
    text: str
    is_spaced: bool = False


_FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot arcsec arccsc log ln exp max min gcd lcm"
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
        $ \$ € £ ¥
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
    """A word, split at the functions and constants in it (`xsin`, `pir`), unless it has too many other letters.

    A word that is the whole answer is only split if it begins with a function, as `sinx` does.
    """
    parts = [word] if word in NAMES else _PARTS.findall(word)
    letters = sum(len(part) == 1 for part in parts)
    if letters == len(word) or letters > (1 if is_alone or "pi" in parts else 2) or is_alone and len(parts[0]) == 1:
        return [Token("word", word, is_spaced)]
    kinds = [("word", part) if len(part) == 1 else ("symbol", NAMES[part]) for part in parts]
    return [Token(kind, part, is_spaced and not number) for number, (kind, part) in enumerate(kinds)]


OPENING = {"(": ")]", "[": ")]", "{": "}", r"\{": (r"\}",), r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",)}
_CLOSING = frozenset(closing for closings in OPENING.values() for closing in closings)


def depths(tokens: Sequence[Token]) -> list[int]:
    """The number of brackets around each token; a bracket counts as inside itself.

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
            opening = stack.pop() if stack else ""
            closings = OPENING.get(opening, (opening.replace("begin", "end"),))
            if token.text not in closings:
                raise UnreadableError("the brackets do not match")
    if stack:
        raise UnreadableError("a bracket is not closed")
    return result


class Written(NamedTuple):
    """An expression for the parser, and whether it contains a decimal number."""

    latex: str
    is_decimal: bool


def write(tokens: Sequence[Token], has_index_i: bool = False) -> Written:
    """The spelling of an expression that latex2sympy reads.

    Args:
        tokens: the expression.
        has_index_i: whether the letter i is an index of a sum, not the imaginary unit.

    Raises:
        UnreadableError: the tokens are not an expression.
    """
    writer = _Writer(list(tokens), has_index_i)
    parts = []
    while writer.tokens:
        parts.append(writer.piece())
    if not parts:
        raise UnreadableError("there is no expression")
    return Written("".join(parts), writer.is_decimal)


_OPERATORS = frozenset(("+", "-", "/", r"\cdot", "!", r"\mod", r"\infty"))
_ACCENTS = frozenset(
    rf"\{name}" for name in "overline bar vec hat tilde dot ddot widehat overrightarrow mathcal".split()
)
_ENDS_ARGUMENT = frozenset(("+", "-", r"\cdot", ",", ")", "]", "}", "|", r"\rfloor", r"\rceil", r"\mod"))
_VARIABLE = r"\variable{%s}"


class _Writer:
    """Takes tokens from the front and writes them."""

    def __init__(self, tokens: list[Token], has_index_i: bool) -> None:
        self.tokens = tokens
        self.has_index_i = has_index_i
        self.is_decimal = False
        self.functions = 0  # around the current token

    def next_is(self, *texts: str) -> bool:
        return bool(self.tokens) and self.tokens[0].text in texts and self.tokens[0].kind == "symbol"

    def take(self, *expected: str) -> Token:
        if not self.tokens or expected and self.tokens[0].text not in expected:
            raise UnreadableError("the expression ends early")
        return self.tokens.pop(0)

    def until(self, *ends: str) -> str:
        """The pieces up to a closing token, which is taken too."""
        parts: list[str] = []
        while not self.next_is(*ends) or not parts or ends == ("|",) and parts[-1].strip() in _OPERATORS - {"!"}:
            if self.next_is(r"\over", r"\choose"):
                macro = {r"\over": r"\frac", r"\choose": r"\binom"}[self.take().text]
                return rf"{macro}{{{''.join(parts)}}}{{{self.until(*ends)}}}"
            parts.append(self.piece())
        self.take()
        return "".join(parts)

    def piece(self) -> str:
        token = self.take()
        text = token.text
        if token.kind == "number":
            return self.number(text)
        if token.kind == "word":
            return self.letters(text)
        if token.kind != "symbol":
            raise UnreadableError("there is text in the expression")
        if text in _OPERATORS:
            return f"{text} "
        if text == "^":
            return self.power()
        if text in ("(", "["):
            return f"({self.until(')', ']')})"
        if text == "{":
            return f"({self.until('}')})"
        if text in (r"\lfloor", r"\lceil"):
            (closing,) = OPENING[text]
            return f"{text}{{{self.until(closing)}}}{closing}"
        if text == "|":
            return rf"|{self.until('|')}|"
        if text == r"\pi":
            return r"\pi "
        if text in SYMBOLS:
            return self.symbol(text[1:])
        if text in _ACCENTS or text in (r"\angle", r"\triangle"):
            return self.symbol(text[1:] + self.raw())
        return self.macro(text)

    def macro(self, text: str) -> str:
        if text in (r"\frac", r"\binom"):
            return rf"{text}{{{self.argument()}}}{{{self.argument()}}}"
        if text == r"\sqrt":
            root = ""
            if self.next_is("["):
                self.take()
                root = f"[{self.until(']')}]"
            return rf"\sqrt{root}{{{self.argument(is_whole=True)}}}"
        if text in FUNCTIONS:
            return self.function(text)
        if text in (r"\sum", r"\prod", r"\int", r"\lim"):
            return self.limits(text)
        raise UnreadableError(f"{text} is unknown")

    def number(self, text: str) -> str:
        """A decimal as an exact fraction; a mixed number as a sum."""
        mantissa, _, exponent = text.lower().partition("e")
        whole, _, decimals = mantissa.partition(".")
        if len(whole) > 1 and whole[0] == "0":
            raise UnreadableError("a number begins with 0")
        if text.isdigit() and (fraction := self.fraction()):
            return rf"({text}+\frac{{{fraction[0]}}}{{{fraction[1]}}})"
        if self.tokens and self.tokens[0].kind == "number":
            raise UnreadableError("two numbers follow one another")
        if "." not in text and not exponent:
            return whole
        above, below = int(whole + decimals or "0"), 10 ** len(decimals)
        if "." in text and self.next_is(r"\overline", r"\bar", r"\dot"):
            self.take()
            repeating = self.raw()
            if not repeating.isdigit():
                raise UnreadableError("only digits repeat")
            above = int(whole + decimals + repeating) - above
            below *= 10 ** len(repeating) - 1
        else:
            self.is_decimal |= "." in text
        value = rf"\frac{{{above}}}{{{below}}}"
        return rf"({value}\cdot 10^{{{int(exponent)}}})" if exponent else f"({value})"

    def fraction(self) -> tuple[str, str] | None:
        r"""Takes the digits of `\frac{1}{2}`, `\frac12` or ` 1/2`, which make a mixed number, if these follow."""
        shape = "".join("n" if token.text.isdigit() else token.text for token in self.tokens[:7])
        for start, places in ((r"\frac{n}{n}", (2, 5, 7)), (r"\frac n", (1, 1, 2)), ("n/n", (0, 2, 3))):
            if shape.startswith(start.replace(" ", "")):
                above, below = self.tokens[places[0]].text, self.tokens[places[1]].text
                if start == r"\frac n" and len(above) == 2:
                    above, below = above
                elif start == r"\frac n" or start == "n/n" and not self.tokens[0].is_spaced:
                    continue
                del self.tokens[: places[2]]
                return above, below
        return None

    def letters(self, word: str) -> str:
        """A product of symbols, the last of which may have a subscript. Four letters and more are one name."""
        *others, last = (word,) if len(word) > 3 else word
        return "".join(self.letter(letter) for letter in others) + self.symbol(last)

    def letter(self, name: str) -> str:
        if name == "e":
            return "e"
        return "(I)" if name == "i" and not self.has_index_i else _VARIABLE % name

    def symbol(self, name: str) -> str:
        """A symbol with its subscripts and primes; `f(2)` is a symbol of its own."""
        suffix = ""
        while self.next_is("_", "'") or self.next_is("^") and self.is_prime():
            mark = self.take().text
            if mark == "'":
                suffix += "prime"
            else:
                suffix += self.raw()
        if len(name) == 1 and name not in "ei" and len(self.tokens) > 2 and self.next_is("("):
            _, argument, end = self.tokens[:3]
            if (argument.kind, end.text, self.tokens[0].is_spaced) == ("number", ")", False):
                del self.tokens[:3]
                suffix += "of" + argument.text.replace(".", "point")
        return (
            _VARIABLE % f"{name}_{{{suffix}}}" if suffix else self.letter(name) if len(name) == 1 else _VARIABLE % name
        )

    def is_prime(self) -> bool:
        return r"\prime" in [token.text for token in self.tokens[1:3]] and self.tokens[1].text in ("{", r"\prime")

    def raw(self) -> str:
        """The letters and digits of an argument that is part of a name."""
        token = self.take()
        parts = [token.text]
        if token.text == "{":
            parts = []
            while not self.next_is("}"):
                parts.append(self.take().text)
            self.take()
        name = re.sub("[^A-Za-z0-9]", "", "".join(parts).replace("-", "minus").replace("+", "plus"))
        if not name:
            raise UnreadableError("a name has no letters")
        return name

    def power(self) -> str:
        if self.next_is(r"\circ"):
            self.take()
            return r"^{\circ}" if self.functions else ""
        sign = "-" if self.next_is("-", "+") and self.take().text == "-" else ""
        return f"^{{{sign}{self.argument(is_whole=True)}}}"

    def argument(self, is_whole: bool = False) -> str:
        """An argument in braces, or one token: of a number its first digit, unless `is_whole`."""
        token = self.take()
        if token.text == "{":
            return self.until("}")
        if token.kind == "number" and not is_whole and token.text.isdigit() and len(token.text) > 1:
            self.tokens.insert(0, Token("number", token.text[1:]))
            return token.text[0]
        if token.kind == "word" and len(token.text) > 1:
            self.tokens.insert(0, Token("word", token.text[1:]))
            return self.letter(token.text[0])
        if token.kind == "number":
            return token.text if token.text.isdigit() else self.number(token.text)
        self.tokens.insert(0, token)
        if token.kind == "word":
            self.take()
            return self.letter(token.text)
        return self.piece()

    def function(self, name: str) -> str:
        """A function with its argument in parentheses, of `\\sin 2x` and `\\sin{2x}` too."""
        scripts = ""
        while self.next_is("^", "_"):
            mark = self.take().text
            scripts += self.power() if mark == "^" else f"_{{{self.argument(is_whole=True)}}}"
        self.functions += 1
        if self.next_is("(", "["):
            self.take()
            argument = self.arguments() if name in (r"\max", r"\min", r"\gcd", r"\lcm") else self.until(")", "]")
        elif self.next_is("{"):
            self.take()
            argument = self.until("}")
        else:
            argument = self.bare_argument()
        self.functions -= 1
        return f"{name}{scripts}({argument})"

    def arguments(self) -> str:
        parts = [self.piece()]
        while not self.next_is(")", "]"):
            parts.append(self.take().text if self.next_is(",") else self.piece())
        self.take()
        return "".join(parts)

    def bare_argument(self) -> str:
        r"""The rest of a product; a division belongs to it only after π, as in `\sin \pi/6`."""
        parts = [self.take().text] if self.next_is("-") else []
        while self.tokens and not self.next_is(*_ENDS_ARGUMENT, *FUNCTIONS):
            if self.next_is("/") and (
                r"\pi " not in parts or len(self.tokens) > 1 and self.tokens[1].text in FUNCTIONS
            ):
                break
            parts.append(self.piece())
        if not parts:
            raise UnreadableError("a function has no argument")
        return "".join(parts)

    def limits(self, name: str) -> str:
        """A sum, product, integral or limit with its bounds."""
        scripts = ""
        while self.next_is("_", "^"):
            mark = self.take().text
            if mark == "_" and name in (r"\sum", r"\prod"):
                self.take("{")
                scripts += f"_{{{self.until('=')}={self.until('}')}}}"
            elif mark == "_" and name == r"\lim":
                self.take("{")
                letter, _ = self.take().text, self.take(r"\to")
                scripts += rf"_{{{letter}\to {self.until('}')}}}"
            else:
                scripts += f"{mark}{{{self.argument(is_whole=True)}}}"
        if name != r"\int":
            return name + scripts
        parts = []
        while self.tokens and not (
            self.tokens[0].kind == "word" and re.fullmatch("[a-z]*d[a-z]?", self.tokens[0].text)
        ):
            parts.append(self.piece())
        word = self.take().text
        if word.endswith("d"):
            word += self.take().text
        product = self.letters(word[:-2]) if len(word) > 2 else ""
        return rf"\int{scripts}{''.join(parts)}{product} {word[-2:]}"
