r"""The verifier of mathematical answers.

It first compares the normalized texts (0.01 ms). If that does not decide, `upge.verify.reading` reads both answers and
`upge.verify.comparison` compares them (about 3 ms). An answer such as i^{9^{9^9}} may run for hours, so verify a
model's text in a `VerifierPool`, which has a hard time limit.

A verification server warms up the parser before it forks its workers (`MathVerifier.warm_up`): it verifies the typical
`ANSWERS`, which fills the caches of antlr and sympy in less than a second, in parallel with the caller's own work. The
workers inherit the filled caches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from upge.verify.answer import Scalar, Text, value_of
from upge.verify.answers import final_answer, last_boxed, without_unit
from upge.verify.base import LONGEST_ANSWER, AnswerVerifier, shown
from upge.verify.comparison import same
from upge.verify.normalize import NUMBER, is_invisible, loose, normalize, spell
from upge.verify.reading import Gold, read, words_of
from upge.verify.scalar import expression
from upge.verify.unevaluated import bare_result, has_unevaluated_operation, is_copied, is_fraction

_RATIO = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\})")
_TOLERANCE = Fraction(2, 10**6)
"""Numbers with a larger difference differ in the sixth decimal."""
_SURD = r"[+-]?(?=[0-9\\])[0-9]*(?:\\pi|\\sqrt\{[0-9]+\})?"
_SIMPLE = re.compile(rf"{_SURD}|[+-]?\\frac\{{{_SURD}\}}\{{{_SURD}\}}")
"""Multiples of a root or of π, and fractions of them: ground truths that are known to parse."""
_POWER_OF_TEN = re.compile(rf"{NUMBER.pattern}\\times 10\^\{{-?[0-9]{{1,4}}\}}")
_CAPITAL = re.compile(r"(?<![\\A-Za-z])[A-DF-HJ-Z](?![A-Za-z])")
_DEGREES = re.compile(r"\^\{?\\circ|\u00b0")
_INDEX_I = re.compile(r"\\(?:sum|prod)(?![a-z])[^i]{0,3}i")


@dataclass(frozen=True)
class MathVerifier(AnswerVerifier):
    r"""Reward 1 if the final answer of a response equals the ground truth, else 0.

    - A response without a complete box earns 0, even if its text states the right answer. (This is `math`. If there is
      no box at all, `math_last` takes the last answer in the text.)
    - An unevaluated answer earns 0, because otherwise the policy could box the question. This is a sum or product of
      numbers if the ground truth is a number or fraction (`\boxed{3+5}` for 8), a function such as sin, log, Σ, ∫ or ⌊⌋
      that the ground truth does not contain, or an expression that is copied from the prompt and differs in form from
      the ground truth.
    - Numbers are compared to 6 decimals, and below 0.001 to 6 significant digits.
    - A percent sign, a unit, a leading `x =` and the case of letters and words do not matter. Words such as "million"
      do.
    - A ground truth may be a JSON list of accepted answers, or a number with a relative tolerance: `{"value": 9.81,
      "rtol": 0.01}`.

    Attributes:
        reader: the function that finds the answer in a response, `last_boxed` or `final_answer`.
    """

    reader: Callable[[str], str | None] = last_boxed

    def extract(self, response: str) -> str | None:
        return self.reader(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        known = {_glance(given, gold) for gold in accepted(answer)}
        return 1.0 if 1.0 in known else None if None in known else 0.0

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        return float(any(_judge(given, gold, prompt) for gold in accepted(answer)))

    def check_answer(self, answer: str) -> None:
        """Refuse a ground truth that does not parse. Plain numbers, roots and fractions need no parser.

        Raises:
            ValueError: `answer` is empty or of no kind in `upge.verify.answer`.
        """
        if not all(isinstance(gold, Measured) or _is_readable(gold) for gold in accepted(answer)):
            raise ValueError(
                f"the ground truth {shown(answer)} does not parse as mathematics; give one final answer (a number, a "
                f"LaTeX expression, set or interval of at most {LONGEST_ANSWER} characters), or remove the row"
            )

    def warm_up(self) -> None:
        for gold, given in ANSWERS:
            with contextlib.suppress(Exception):
                self.judge(given, gold)


LAST_ANSWER = MathVerifier(final_answer)
"""The verifier `math_last`, which takes the last answer of a response without any box."""


class Measured(NamedTuple):
    """A ground truth with a relative tolerance."""

    value: float
    rtol: float


@functools.lru_cache(maxsize=1024)
def accepted(answer: str) -> tuple[str | Measured, ...]:
    """The accepted ground truths: `answer` itself or, if it is JSON of one of these forms, what it holds.

    The forms are a list of texts, `["5", "1/2"]`, a measured number, `{"value": 9.81, "rtol": 0.01}` or a list of both.
    """
    if answer.lstrip()[:1] not in ("[", "{"):
        return (answer,)
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):
        return (answer,)
    golds = parsed if isinstance(parsed, list) else [parsed]
    if not any(isinstance(gold, (str, dict)) for gold in golds):
        return (answer,)  # a list of numbers is mathematics
    return tuple(Measured(**gold) if _is_measured(gold) else str(gold) for gold in golds)


def _is_measured(gold: object) -> bool:
    if not isinstance(gold, dict) or set(gold) != set(Measured._fields):
        return False
    return all(isinstance(number, (int, float)) and abs(number) < 1e300 for number in gold.values())


def _glance(given: str, answer: str | Measured) -> float | None:
    if isinstance(answer, Measured):
        return None
    gold, gold_loose, gold_value = _read_gold(answer)
    read = _read(given, gold)
    if not read:
        return 0.0
    if read == gold or loose(spell(given)) == gold_loose:
        return 1.0
    if len(read) > LONGEST_ANSWER or is_invisible(read):
        return 0.0
    value = _value(read)
    if value is not None and gold_value is not None and abs(value - gold_value) > _TOLERANCE:
        return 0.0
    return None


def _judge(given: str, answer: str | Measured, prompt: str | None) -> bool:
    if isinstance(answer, str):
        return _equal(spell(answer), spell(given), prompt)
    if len(given) > LONGEST_ANSWER or is_invisible(given) or has_unevaluated_operation("0", normalize(given)):
        return False
    values = (value_of(reading) for reading in read(spell(given), gold=Gold(is_number=True)))
    return any(value is not None and abs(value - answer.value) <= answer.rtol * abs(answer.value) for value in values)


def _is_readable(answer: str) -> bool:
    gold = normalize(answer)
    if _is_plain(gold) or _SIMPLE.fullmatch(gold):
        return True
    return bool(gold) and len(gold) <= LONGEST_ANSWER and bool(_readings(spell(answer), "")[0])


@functools.lru_cache(maxsize=1024)
def _read_gold(answer: str) -> tuple[str, str, Fraction | None]:
    """A ground truth as (normalized text, loose text, number), cached because a group of responses shares it."""
    gold = normalize(answer)
    return gold, loose(spell(answer)), _value(gold)


def _read(given: str, gold: str) -> str:
    """A normalized answer. If the ground truth is one number, words for what is counted are also removed."""
    read = normalize(given)
    if not _is_plain(gold) or len(read) > LONGEST_ANSWER:
        return read
    number = without_unit(read)
    # A single letter may be a name instead of a unit.
    return read if re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", read[len(number) :]) else normalize(number)


def _value(text: str) -> Fraction | None:
    """The value of a normalized text that is a number or a fraction of two whole numbers; else None."""
    if len(text) > LONGEST_ANSWER:
        return None
    if NUMBER.fullmatch(text):
        return Fraction(text)
    ratio = _RATIO.fullmatch(text)
    if not ratio or not int(ratio[3] or ratio[5]):
        return None
    value = Fraction(int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5]))
    return -value if ratio[1] == "-" else value


@functools.lru_cache(maxsize=1024)
def _equal(gold: str, given: str, prompt: str | None = None) -> bool:
    """The verdict on two spelled answers. The case of letters matters only if both cases are in one of them."""
    if has_unevaluated_operation(normalize(gold), normalize(given)):
        return False
    pairs = _same_pairs(gold, given) or _same_pairs(*_folded(gold, given))
    if not pairs and _DEGREES.search(prompt or "") and _DEGREES.search(given) and not _DEGREES.search(gold):
        # Some data sets have lost the degree signs of their ground truths.
        pairs = _same_pairs(gold, given.replace(r"^\circ", ""))
    if not pairs:
        return False
    if not is_copied(gold, given, prompt):
        return True
    return not is_fraction(bare_result(given)) and any(_shape(a) == _shape(b) for a, b in pairs)


def _same_pairs(gold: str, given: str) -> list[tuple[Any, Any]]:
    """The pairs of readings of two answers that are the same."""
    golds, givens = _readings(gold, given)
    pairs = [(a, b) for a in golds for b in givens if same(a, b)]
    # If the ground truth is words, the answer's words are compared, even if the answer has another reading.
    return pairs or [(a, a) for a in golds if isinstance(a, Text) and a.words == words_of(given)]


def _readings(gold: str, given: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The readings of both answers, with the same meaning of i and of words after a number in both."""
    has_index = bool(_INDEX_I.search(gold) or _INDEX_I.search(given))
    golds = read(gold, has_index)
    has_letters = any("variable" in str(reading) for reading in golds)
    return golds, read(given, has_index, Gold(is_number=bool(golds) and not has_letters, is_expression=has_letters))


def _folded(gold: str, given: str) -> tuple[str, str]:
    """Both answers with single letters in lower case, unless one of them has a letter in both cases."""
    letters = _CAPITAL.findall(gold + " " + given)
    texts = [gold, given]
    if any(
        re.search(rf"(?<![\\A-Za-z]){letter.lower()}(?![A-Za-z])", text)
        for letter in letters
        for text in texts
        if letter in text
    ):
        return gold, given
    gold, given = (_CAPITAL.sub(lambda letter: letter[0].lower(), text) for text in texts)
    return gold, given


def _shape(answer: Any) -> str:
    """The form of an answer, independent of the order of terms and factors."""
    if isinstance(answer, Scalar):
        answer = expression(answer.latex)
    parts = [getattr(answer, field.name) for field in fields(answer)] if is_dataclass(answer) else answer
    if not isinstance(parts, (list, tuple)):
        parts = getattr(answer, "args", ())
    name = type(answer).__name__
    return f"{name}({','.join(sorted(map(_shape, parts)))})" if parts else f"{name} {answer}"


def _is_plain(text: str) -> bool:
    return bool(NUMBER.fullmatch(text) or is_fraction(text) or _POWER_OF_TEN.fullmatch(text))


ANSWERS = (
    (r"\frac{3}{4}", r"0.75"),
    (r"\frac{3}{4}", r"-\frac{6\pi}{8}"),
    (r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt 3}{2}"),
    (r"2+\sqrt{5}", r"\sqrt{5}+\frac{4}{2}"),
    (r"12\pi", r"(12)\pi"),
    (r"2^{10}", r"1024"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"(x-3)(x+5)", r"x^2+2x-14"),
    (r"y=2x+3", r"2x+3"),
    (r"(3,-4)", r"(3, -\frac{8}{2})"),
    (r"\left(\frac{1}{2},\frac{3}{4}\right)", r"(0.5,0.75)"),
    (r"1,2,3", r"3,2,1"),
    (r"[-1,3)", r"[-1,\frac{6}{2})"),
    (r"[-2,7]", r"-2\le x\le 7"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)\cup(3,4)"),
    (r"2+3i", r"3i+2"),
    (r"\begin{pmatrix}-1\\ \frac{1}{2}\\0\end{pmatrix}", r"\begin{pmatrix}-1\\0.5\\0\end{pmatrix}"),
    (r"\text{(C)}", r"\text{C}"),
    (r"10\%", r"0.1"),
)
"""Pairs of a ground truth and an answer, some equal and some not."""
