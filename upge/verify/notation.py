r"""Writes expressions in LaTeX that latex2sympy reads without guessing.

An expression may be written in LaTeX, in plain text or in a mixture (`3√2`, `12pi`, `7*sin(pi*x/5)+1`,
`\frac12\sqrt[3]x`). `write` gives all of them one unambiguous spelling: every macro and function has its arguments in
braces or parentheses, every symbol is a `\variable{...}`, decimals are exact fractions, and the imaginary unit is
`(I)`. For an expression that cannot be spelled this way, it raises `UnreadableError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from upge.verify.tokens import FUNCTIONS, OPENING, SYMBOLS, Token, UnreadableError


class Written(NamedTuple):
    """An expression for the parser, whether it contains a decimal number, and whether it is an angle in degrees."""

    latex: str
    is_decimal: bool
    is_degrees: bool


def write(tokens: Sequence[Token], has_index_i: bool = False) -> Written:
    """An expression in the spelling of this module.

    Args:
        tokens: the expression.
        has_index_i: True if the letter i is the index of a sum, False if it is the imaginary unit.

    Raises:
        UnreadableError: the tokens are not an expression.
    """
    writer = _Writer(list(tokens), has_index_i)
    parts = []
    while writer.tokens:
        parts.append(writer.piece())
    if not parts:
        raise UnreadableError("there is no expression")
    return Written("".join(parts), writer.is_decimal, writer.is_degrees)


_OPERATORS = frozenset(("+", "-", "/", r"\cdot", "!", r"\mod", r"\infty"))
_ACCENTS = frozenset(
    rf"\{name}" for name in "overline bar vec hat tilde dot ddot widehat overrightarrow mathcal".split()
)
_ENDS_ARGUMENT = frozenset(("+", "-", r"\cdot", ",", ")", "]", "}", "|", r"\rfloor", r"\rceil", r"\mod"))
_VARIABLE = r"\variable{%s}"
_PI = r"(\pi )"  # `\pi (2)` would be a function


class _Writer:
    """Takes tokens from the front and writes them."""

    def __init__(self, tokens: list[Token], has_index_i: bool) -> None:
        self.tokens = tokens
        self.has_index_i = has_index_i
        self.is_decimal = self.is_degrees = False
        self.functions = 0  # how many functions the current token is inside

    def next_is(self, *texts: str) -> bool:
        return bool(self.tokens) and self.tokens[0].text in texts and self.tokens[0].kind == "symbol"

    def take(self, *expected: str) -> Token:
        if not self.tokens or expected and self.tokens[0].text not in expected:
            raise UnreadableError("the expression ends early")
        return self.tokens.pop(0)

    def until(self, *ends: str) -> str:
        """The pieces up to a closing token, which is also taken."""
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
        if text == "!" and self.next_is("!"):
            raise UnreadableError("only the double factorial of a number has a reading")
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
            return _PI
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
        if [token.text for token in self.tokens[:2]] == ["!", "!"] and text.isdigit() and len(text) < 3:
            del self.tokens[:2]
            return str(math.prod(range(int(text), 0, -2)))
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
        r"""Take the digits of `\frac{1}{2}`, `\frac12` or ` 1/2`, the rest of a mixed number, if these come next."""
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
        """A product of symbols, the last of which may have a subscript. Four or more letters are one name."""
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
            self.is_degrees |= not self.functions
            return r"^{\circ}" if self.functions else ""
        sign = "-" if self.next_is("-", "+") and self.take().text == "-" else ""
        return f"^{{{sign}{self.argument(is_whole=True)}}}"

    def argument(self, is_whole: bool = False) -> str:
        """An argument in braces, or one token; of a number only the first digit, unless `is_whole`."""
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
        """A function with its argument in parentheses, also for `\\sin 2x` and `\\sin{2x}`."""
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
        if name == r"\cis":
            if scripts:
                raise UnreadableError("a power of cis is written around it")
            return rf"(\cos({argument})+(I)\cdot \sin({argument}))"
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
            if self.next_is("/") and (_PI not in parts or len(self.tokens) > 1 and self.tokens[1].text in FUNCTIONS):
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
