r"""Does the boxed answer of a response equal the ground truth, as mathematics?

Exact match of the normalised texts comes first (0.01 ms), then math-verify (about 5 ms; `verify(gold, answer)`, gold
first). math-verify's own time-outs are SIGALRM and work in a main thread only, hence they are switched off: an answer
such as 9^{9^{9^9}} runs for hours here. Texts that a model wrote belong into a `VerifierPool`, which has a hard limit.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from upge.verify.boxed import last_boxed

LONGEST_ANSWER = 1000
"""Characters of a box that are still parsed; a longer one can only match exactly."""

_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"([+-]?)(?=\.?\d)(\d*)(?:\.(\d*))?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
_FRACTION = re.compile(r"[+-]?(?:\d+/\d+|\\frac\{[+-]?\d+\}\{\d+\})")
_SURD = r"[+-]?(?=[\d\\])\d*(?:\\pi|\\sqrt\{\d+\})?"
_SIMPLE = re.compile(rf"{_SURD}|[+-]?\\frac\{{{_SURD}\}}\{{{_SURD}\}}")
"""Multiples of a root or of π, and fractions of them: a ground truth that is known to parse."""
_WRAPPERS = (
    re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}$]*)\}"),
    re.compile(r"(?<!\\)\$\$?([^$]*[^$\\])\$\$?"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
)
_REPLACEMENTS = (
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\displaystyle(?![a-zA-Z])|(?<!\\)\\[!,;:]"), ""),
    (re.compile(r"(?<!\\)\\ |~"), " "),
    (re.compile("\\{,\\}(?=\\d)"), ","),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"(?<=\d)\.(?![\d.a-zA-Z\\])"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])"), ""),
)
_SCIENTIFIC = re.compile(r"\*10\^(?:\{[+-]?\d+\}|\d)")
_ARITHMETIC = re.compile(r"[\d.,+\-*/(){}^ ]+")
_TO_DO = re.compile(r"[\d.)}] ?(?:[+\-*] ?[\d.({+\-]|\()")


class MathVerifier:
    r"""Reward 1 if the last \boxed{...} of a response equals the ground truth, else 0.

    Choices: a response without a complete box earns 0, even where its text is right. Where the ground truth is a plain
    number or fraction, a sum or product that was left undone (`\boxed{3+5}` for 8) earns 0: the policy could box the
    question. Numbers are compared to 6 decimals, those below 0.001 to 6 significant digits; a percent sign, a unit, a
    leading `x =` do not matter; letters and words do not depend on case.
    """

    def __call__(self, response: str, answer: str, prompt: str | None = None) -> float:
        """The reward, 0.0 or 1.0; never raises, whatever the response is. The prompt is not read."""
        reward = self.quick(response, answer)
        if reward is None:
            try:
                reward = float(_equal(normalise(answer), normalise(last_boxed(response) or "")))
            except Exception:  # whatever the parser trips over is not a right answer
                reward = 0.0
        return reward

    def quick(self, response: str, answer: str) -> float | None:
        """The reward where it is known without parsing mathematics, else None."""
        box = last_boxed(response)
        if not box:
            return 0.0
        given, gold = normalise(box), normalise(answer)
        if given == gold:
            return 1.0
        if len(given) > LONGEST_ANSWER or _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):
            return 0.0
        return None

    def check_answer(self, answer: str) -> None:
        """Refuses a ground truth that nothing could be compared with; plain numbers, roots and fractions cost nothing.

        Raises:
            ValueError: `answer` is empty or is not mathematics that math-verify can read.
        """
        gold = normalise(answer)
        if _is_plain(gold) or _SIMPLE.fullmatch(gold):
            return
        if not gold or len(gold) > LONGEST_ANSWER or not _parse(gold):
            shown = answer if len(answer) <= 200 else answer[:200] + "..."
            raise ValueError(
                f"the ground truth {shown!r} does not parse as mathematics; give one final answer (a number, a LaTeX "
                f"expression, set or interval of at most {LONGEST_ANSWER} characters), or remove the row"
            )


def normalise(text: str) -> str:
    r"""One spelling for answers that differ in typography only.

    Takes off surrounding $, \(, \boxed, \text and a final full stop; drops \left, \right, thin spaces and white space
    without meaning; \dfrac is \frac; 1,000 is 1000; 142.0, +142 and 0142 are 142.
    """
    previous = None
    text = text.strip()
    while text != previous:
        previous = text
        for wrapper in _WRAPPERS:
            whole = wrapper.fullmatch(text)
            text = whole[1].strip() if whole else text
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = text.strip(" ").rstrip(".")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    number = _NUMBER.fullmatch(text)
    if number:
        sign, whole, decimals = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        size = f"{whole}.{decimals}" if decimals else whole
        text = f"-{size}" if sign == "-" and size != "0" else size
    return text


def _equal(gold: str, given: str) -> bool:
    """math-verify's verdict on two normalised answers, less what it takes for equal and is not."""
    from math_verify import verify

    if _is_plain(gold) and _left_undone(given):
        return False
    gold_parsed, given_parsed = _parse(gold), _parse(given)
    if not gold_parsed or not given_parsed:
        return False
    same = verify(gold_parsed, given_parsed, timeout_seconds=None, allow_set_relation_comp=True)
    return same and not _differ_below_rounding(gold_parsed[0], given_parsed[0])


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """sympy expressions read from one normalised answer; empty where it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    # It warns once a process that time-outs are off; the pool's limit is the one that counts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def _is_plain(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text) or _FRACTION.fullmatch(text))


def _left_undone(text: str) -> bool:
    """Is `text` a sum, difference or product of plain numbers that has not been worked out?"""
    text = text.rpartition("=")[2].strip()
    text = re.sub(r" ?(?:\\(?:times|cdot|ast)(?![a-zA-Z])|[\u00d7\u00b7]) ?", "*", text)
    text = re.sub(r"\\(?:frac|sqrt)(?![a-zA-Z])|\\[{}]", "", text)
    text = _SCIENTIFIC.sub("", text)
    return bool(_ARITHMETIC.fullmatch(text) and _TO_DO.search(text))


def _differ_below_rounding(gold: Any, given: Any) -> bool:
    """math-verify rounds to 6 decimals, which makes 1.6e-19 equal to 0; small numbers are compared by their ratio."""
    if not (getattr(gold, "is_number", False) and getattr(given, "is_number", False)):
        return False
    try:
        a, b = complex(gold.doit()), complex(given.doit())
    except (TypeError, ValueError):
        return False
    if abs(a) >= 1e-3 or a == b:
        return False
    return abs(a - b) > 5e-6 * abs(a) if a else abs(b) > 1e-12
