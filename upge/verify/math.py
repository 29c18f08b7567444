r"""The verifier of mathematical answers.

It compares the normalized texts first (0.01 ms) and then calls math-verify (about 5 ms). math-verify's own time-outs
use SIGALRM, which works only in the main thread, so they are switched off, and an answer such as 9^{9^{9^9}} may run
for hours. Verify text from a model in a `VerifierPool`, which has a hard time limit.

A verification server makes math-verify faster before it forks its workers (`MathVerifier.warm_up`): it selects the
faster prediction mode of antlr, and it verifies the typical `ANSWERS`, which fills the caches of antlr and sympy in
0.8 s, in parallel with the caller's own work. Without it, an answer that has to be parsed takes 12 ms of CPU during the
first hundred answers of a process; with it, 6 ms. Later on it takes 3 ms. Workers inherit the filled caches.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from upge.verify.answers import final_answer, last_boxed, without_unit
from upge.verify.base import LONGEST_ANSWER, AnswerVerifier, shown
from upge.verify.inequality import Parsed, are_unequal
from upge.verify.normalize import NUMBER, is_invisible, loose, normalize, spell
from upge.verify.unevaluated import bare_result, has_unevaluated_operation, is_copied, is_fraction, result_of

_RATIO = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\})")
_TOLERANCE = Fraction(2, 10**6)
"""Numbers that differ by more differ in the sixth decimal, to which math-verify rounds."""
_SURD = r"[+-]?(?=[0-9\\])[0-9]*(?:\\pi|\\sqrt\{[0-9]+\})?"
_SIMPLE = re.compile(rf"{_SURD}|[+-]?\\frac\{{{_SURD}\}}\{{{_SURD}\}}")
"""Multiples of a root or of π, and fractions of them: ground truths that are known to parse."""
_PERCENT = re.compile(r"\\?%")
_BASED = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")
_MAGNITUDE = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)(?=s?(?![a-z]))", re.IGNORECASE)
# math-verify takes words for a unit and drops them with all that follows: it reads "5 apples and 6 pears" as 5.
_WORDS = r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*"
_SENTENCE = re.compile(rf"{_WORDS}(?:\b(?:and|or|not)\b|[0-9,;])[^{{}}]*\}}")
_QUALIFIED = re.compile(rf"[0-9][^=]*{_WORDS}\b(?:is|are|if|otherwise|unless|except|wrong)\b")
_SECOND = re.compile(rf"[0-9][^=\\]*{_WORDS}\}}[^=]*?[0-9,;]|[0-9].*(?:\\approx(?![a-z])|\u2248)", re.DOTALL)
_UNIT_POWER = re.compile(r"\^(?:[0-9]|\{ ?[-+]?[0-9] ?\})")
_POWER_OF_TEN = re.compile(rf"{NUMBER.pattern}\\times 10\^\{{-?[0-9]{{1,4}}\}}")
_WITH_BASE = re.compile(r"[0-9)] ?_")


@dataclass(frozen=True)
class MathVerifier(AnswerVerifier):
    r"""Reward 1 if the final answer of a response equals the ground truth, else 0.

    - A response without a complete box earns 0, even if its text states the right answer. (This is `math`. If there is
      no box at all, `math_last` takes the last answer in the text.)
    - An unevaluated answer earns 0, because otherwise the policy could box the question: a sum or product of numbers if
      the ground truth is a number or fraction (`\boxed{3+5}` for 8), a function such as sin, log, Σ, ∫ or ⌊⌋ that the
      ground truth does not contain, or an expression that is copied from the prompt and has another form than the
      ground truth.
    - Numbers are compared to 6 decimals, and below 0.001 to 6 significant digits.
    - A percent sign, a unit, a leading `x =` and the case of letters and words do not matter. Words such as "million"
      do.

    Attributes:
        reader: finds the answer in a response: `last_boxed` or `final_answer`.
    """

    reader: Callable[[str], str | None] = last_boxed

    def extract(self, response: str) -> str | None:
        return self.reader(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
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

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        gold = _read_gold(answer)[0]
        return float(_equal(gold, _read(given, gold), prompt))

    def check_answer(self, answer: str) -> None:
        """Refuses a ground truth that does not parse. Plain numbers, roots and fractions need no parser.

        Raises:
            ValueError: `answer` is empty or is not mathematics that math-verify can read.
        """
        gold = normalize(answer)
        if _is_plain(gold) or _SIMPLE.fullmatch(gold):
            return
        if not gold or len(gold) > LONGEST_ANSWER or not _parse(gold):
            raise ValueError(
                f"the ground truth {shown(answer)} does not parse as mathematics; give one final answer (a number, a "
                f"LaTeX expression, set or interval of at most {LONGEST_ANSWER} characters), or remove the row"
            )

    def warm_up(self) -> None:
        use_sll_prediction()
        for gold, given in ANSWERS:
            with contextlib.suppress(Exception):
                self.judge(given, gold)


LAST_ANSWER = MathVerifier(final_answer)
"""The verifier `math_last`, which takes the last answer of a response without any box."""


@functools.lru_cache(maxsize=1024)
def _read_gold(answer: str) -> tuple[str, str, Fraction | None]:
    """A ground truth as (normalized text, loose text, number). It is cached because a group of responses shares it."""
    gold = normalize(answer)
    return gold, loose(spell(answer)), _value(gold)


def _read(given: str, gold: str) -> str:
    """An answer, normalized. If the ground truth is one number, also without words for what is counted."""
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
    """math-verify's verdict on two normalized answers, corrected where it wrongly takes them for equal."""
    if _is_plain(gold) and _means_another(given):
        return False
    if has_unevaluated_operation(gold, given) or _differs_in_size(gold, given):
        return False
    gold_parsed, given_parsed = _parse(gold), _parse(given)
    if not gold_parsed or not given_parsed:
        return False
    if not _same(gold_parsed, given_parsed):
        # A percent sign may mean 1/100, or be a unit.
        without = _PERCENT.sub("", gold), _PERCENT.sub("", given)
        if without == (gold, given) or not _same(*map(_parse, without)):
            return False
    if not is_copied(gold, given, prompt):
        return True
    return not is_fraction(bare_result(given)) and _shape(gold_parsed[0]) == _shape(given_parsed[0])


def _same(gold: list[Parsed], given: list[Parsed]) -> bool:
    from math_verify import verify

    if not gold or not given or are_unequal(gold[0], given[0]):
        return False
    same = verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True)
    return same and not _differ_below_rounding(gold[0], given[0])


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Parsed]:
    """What math-verify reads in one normalized answer; empty if it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    # math-verify warns once per process that its time-outs are off. The pool has its own limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    # None switches the time-out off; the annotation says int.
    no_limit: Any = None
    return parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=no_limit)


def _shape(expression: Parsed) -> str:
    """The form of an unevaluated expression, independent of the order of terms and factors."""
    parts = sorted(_shape(part) for part in getattr(expression, "args", ()))
    return f"{type(expression).__name__}({','.join(parts)})" if parts else str(expression)


def _is_plain(text: str) -> bool:
    return bool(NUMBER.fullmatch(text) or is_fraction(text) or _POWER_OF_TEN.fullmatch(text))


def _means_another(given: str) -> bool:
    """Whether an answer has several numbers, one of which math-verify would drop, or is a numeral of some base."""
    if _WITH_BASE.search(result_of(given)) or _SENTENCE.search(given) or _QUALIFIED.search(given):
        return True
    return bool(_SECOND.search(_UNIT_POWER.sub("", given)))


def _differs_in_size(gold: str, given: str) -> bool:
    """Whether the two have different words such as "million", or are numerals of different bases."""
    gold_words, given_words = ({word.lower() for word in _MAGNITUDE.findall(text)} for text in (gold, given))
    if gold_words != given_words:
        return True
    gold_base, given_base = _BASED.fullmatch(gold), _BASED.fullmatch(given)
    return gold_base is not None and given_base is not None and gold_base[2] != given_base[2]


def _differ_below_rounding(gold: Parsed, given: Parsed) -> bool:
    """Whether two small numbers differ in their ratio: math-verify rounds to 6 decimals, so 1.6e-19 would equal 0."""
    if not (getattr(gold, "is_number", False) and getattr(given, "is_number", False)):
        return False
    try:
        a, b = complex(gold.doit()), complex(given.doit())
    except (TypeError, ValueError):
        return False
    if abs(a) >= 1e-3 or a == b:
        return False
    return abs(a - b) > 5e-6 * abs(a) if a else abs(b) > 1e-12


def use_sll_prediction() -> None:
    """Selects SLL prediction in math-verify for the whole process; further calls do nothing.

    math-verify spends half of its time in antlr's predictions with full context (LL), whose results antlr does not
    cache. Without that context (SLL) "the parser will either return a correct parse tree (i.e. the same parse tree that
    would be returned with the LL prediction mode), or it will report a syntax error" (antlr4.atn.PredictionMode). Only
    after an error is the text parsed again, in LL mode. So parse trees and verdicts do not change.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2 as module

    original = module._Latex2Sympy
    if hasattr(original, "is_sll"):
        return

    class SLLFirst(original):
        """Parses in SLL mode, and if that fails, from the initial state in LL mode."""

        is_sll = True

        def create_parser(self, latex_str):  # the name of the argument is math-verify's
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = PredictionMode.SLL if self.is_sll else PredictionMode.LL
            return parser

        def parse(self, latex_str):
            self.is_sll, before = True, dict(self.var)
            try:
                return super().parse(latex_str)
            except Exception:
                self.is_sll, self.variances, self.var = False, {}, before
                return super().parse(latex_str)

    module._Latex2Sympy = SLLFirst


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
