"""Verifiers for multiple-choice questions, for answers that match a regular expression, and for boxes."""

from __future__ import annotations

import functools
import re

from upge.verify.answers import last_boxed
from upge.verify.base import LONGEST_ANSWER, AnswerVerifier, shown
from upge.verify.normalize import is_invisible

_LABEL = re.compile(r"[A-Z]|[0-9]")
_NOUN = r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter)\s*:?\s*)?"
_ALONE = re.compile(rf"{_NOUN}[(\[]?([A-Za-z]|[0-9])[)\].:]*")
_LEADING = re.compile(rf"{_NOUN}(?:[(\[]([A-Z]|[0-9])[)\]]|([A-Z]|[0-9])[).:])(?=\W|$)[\s:.]*|{_NOUN}[(\[]([A-Z])[)\]]")
_SPOKEN = re.compile(rf"{_NOUN}([A-Z])(?=[,.;:]| (?:because|since|as|for|due|which|that)\b)")
_OTHER = re.compile(
    r"[(\[]([A-Z]|[0-9])[)\]]|(?<![\w.])([A-Z]|[0-9])\)|(?:\b(?:or|and)|[,/&])\s*([A-Z])(?![\w'])|^\W*([B-HJ-Z])(?!\w)"
)
_WORD = re.compile(r"(?<![\w'])([A-Za-z0-9])(?![\w'])(?! (?:is|was)(?:n't| (?:not|wrong|incorrect|false))\b)")
_LABEL_FIRST = re.compile(rf"{_NOUN}[(\[]?([A-Za-z]|[0-9])(?![\w'])[)\].:]*\s*[-\u2013\u2014:(]*\s*(.*)")
_LABEL_LAST = re.compile(r"(.*\S)\s*[-\u2013\u2014:]?\s*[(\[]([A-Za-z]|[0-9])[)\]][.:]*")
_OPTION = re.compile(r"^[ \t]*(?:[(\[]([A-Z]|[0-9])[)\]]|([A-Z]|[0-9])[).:])[ \t]+(\S.*)$", re.MULTILINE)
_TYPOGRAPHY = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s*(?=\{)|[{}$*`\"]|\\[()\[\]]|\\(?=[ ,;!])")


class ChoiceVerifier(AnswerVerifier):
    r"""Reward 1 if the final answer (`final_text`) names the option of the ground truth, one letter or digit, else 0.

    An answer may be the label alone (C, (C), C), \text{C}, option C), or the label followed by the option's text. If
    the prompt lists its options on lines of their own (`A) ...`, `(A) ...`, `A. ...`), it may also be the text of
    exactly one option. An answer that names several options, a label that the prompt does not list, or a label together
    with another option's text earns 0. A letter in the middle of a sentence is not an answer.
    """

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float:
        label = named(given, prompt)
        return float(label != "" and label == _label(answer))

    def check_answer(self, answer: str) -> None:
        """Refuse a ground truth that is not the label of an option.

        Raises:
            ValueError: `answer` is not one letter or digit.
        """
        if not _label(answer):
            raise ValueError(
                f"the ground truth {shown(answer)} is not the label of an option; give one letter or digit such as C, "
                "use another verifier, or remove the row"
            )


def named(given: str, prompt: str | None = None) -> str:
    """The label of the option that an answer names; empty if it names none or several."""
    if len(given) > LONGEST_ANSWER or is_invisible(given):
        return ""
    options, text = _options(prompt or ""), _plain(given)
    alone = _ALONE.fullmatch(text)
    if alone and (not options or alone[1].upper() in options):
        return alone[1].upper()
    same = _labels_of(text, options)
    if same:
        return same[0] if len(same) == 1 else ""
    first, last = _LABEL_FIRST.fullmatch(text), _LABEL_LAST.fullmatch(text)
    for label, words in (first.groups() if first else ("", ""), last.groups()[::-1] if last else ("", "")):
        if label.upper() in options and _words(words).strip("() ") == options[label.upper()].strip("() "):
            return label.upper()
    leading = _LEADING.match(text) or _SPOKEN.match(text)
    label = next(filter(None, leading.groups()), "") if leading else ""
    if leading is None or not label or options and label not in options:
        return ""
    return "" if _names_another(label, text[leading.end() :], options) else label


def _names_another(label: str, rest: str, options: dict[str, str]) -> bool:
    """Whether the rest of an answer names another option, apart from the text of the label's own option."""
    if options.get(label):
        rest = re.sub(rf"^[\s:(\u2013\u2014-]*{re.escape(options[label])}(?!\w)", "", rest, flags=re.IGNORECASE)
    if any(next(filter(None, other.groups())) != label for other in _OTHER.finditer(rest)):
        return True
    if any(words and _has(rest, words) for other, words in options.items() if other != label):
        return True
    return any(_is_label(word, label, options) for word in _WORD.findall(rest) if word != label)


def _is_label(word: str, label: str, options: dict[str, str]) -> bool:
    """Whether a word of one character is an option's label; without listed options, any capital or any digit is."""
    if options:
        return word in options or word not in "ai" and word.upper() in options
    return word.isdigit() if label.isdigit() else word.isupper() and word not in "AI"


def _has(text: str, words: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def _labels_of(text: str, options: dict[str, str]) -> list[str]:
    return [label for label, words in options.items() if words == _words(text)]


def _label(answer: str) -> str:
    text = _plain(answer).removeprefix("\\boxed").strip("()[].: ").upper()
    return text if _LABEL.fullmatch(text) else ""


@functools.lru_cache(maxsize=256)
def _options(prompt: str) -> dict[str, str]:
    """Label → text of the options that a prompt lists; the last text of a repeated label; empty below two options."""
    options = {line[1] or line[2]: _words(line[3]) for line in _OPTION.finditer(prompt)}
    return options if len(options) > 1 else {}


def _plain(text: str) -> str:
    return " ".join(_TYPOGRAPHY.sub("", text).split())


def _words(text: str) -> str:
    return _plain(text).casefold().rstrip(".;, ")


class RegexVerifier(AnswerVerifier):
    """Reward 1 if the whole final answer (`final_text`) matches the ground truth, a pattern of Python's `re`, else 0.

    Matching is case-sensitive unless the pattern begins with (?i). If matching backtracks for too long, the answer hits
    the pool's time limit.
    """

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        return float(re.fullmatch(answer, given) is not None)

    def check_answer(self, answer: str) -> None:
        """Refuse an invalid or empty pattern.

        Raises:
            ValueError: `answer` is empty or not a regular expression.
        """
        try:
            re.compile(answer)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"the ground truth {shown(answer)} is not a regular expression ({error}); fix it, escape what "
                "is meant literally (re.escape), or remove the row"
            ) from error
        if not answer:
            raise ValueError("the ground truth is an empty pattern, which no answer can match; remove the row")


class BoxedVerifier(AnswerVerifier):
    r"""Reward 1 if the last `\boxed{...}` of the response has any content, else 0: a format reward.

    It accepts any ground truth.
    """

    def extract(self, response: str) -> str | None:
        return last_boxed(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float:
        return 1.0

    def check_answer(self, answer: str) -> None:
        """Accept any ground truth, because none is read."""
