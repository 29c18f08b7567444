r"""Finds the final answer of a response, with or without \boxed{...}, in linear time."""

from __future__ import annotations

import re

from upge.verify.words import CHANGES_A_NUMBER

TAIL = 2000
"""In a text without a box, only this many characters at the end are searched for an answer."""
_SPACE = re.compile(r"\s")
_MARKED = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_HEADING = re.compile(r"[0-9]+[.):]\s*\**[A-Za-z]|[^0-9$\\+\-.]")
_PHRASE = re.compile(r"\banswers?\b[^.:=\n]{0,60}?(?:\b(?:is|are)\b|:|=)[\s*_:]*", re.IGNORECASE)
_CHOSEN = re.compile(r"\bthe (?:correct |right |best )?(?:option|choice) is\b[\s*_:]*", re.IGNORECASE)
_LEAD = re.compile(r"(?:therefore|thus|simply|then|just|equal to|approximately|about)\b[\s,:]*", re.IGNORECASE)
_SENTENCE = re.compile(r"\.(?=\s|\Z)|\n")
_SPANS = (
    # An opening dollar sign is followed by a non-space. A closing one follows a character that can end a formula and is
    # not followed by a digit. A formula contains no words. So "$5 and $6" and "costs $5 each, 2*5=$10" do not match.
    re.compile(r"(?<![\\$])(\$)(?=[^\s$])(?![^$\n]* [a-z]{3})([^$\n]{0,500}[^\s$\\=+*<-])\$(?![0-9$])"),
    re.compile(r"(?<!\\)(\$\$)([^$]{1,500})\$\$"),
    re.compile(r"\\(\()(.{1,500}?)\\\)", re.DOTALL),
    re.compile(r"\\(\[)(.{1,500}?)\\\]", re.DOTALL),
)
_SIZE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++"
_NUMBER = re.compile(
    rf"(?<![A-Za-z_0-9.])(?:(?<![)\]}}])[-\u2212])?\$?(?:{_SIZE})(?:[eE][+-]?[0-9]{{1,4}}+)?(?:/[0-9]++(?!\.[0-9]))?%?"
    r"(?!(?:st|nd|rd|th)\b)(?![0-9])"
)
_COUNTED = re.compile(rf"([-\u2212]?(?:[$€£¥]|\\\$)?\s?(?:{_SIZE})%?)((?: +[A-Za-z]+)+)")
_NOT_COUNTED = re.compile(
    rf"{CHANGES_A_NUMBER}|\b(?:to|sin|cos|tan|log|ln|[ixyn]|hundred|thousand|million|billion|trillion|dozen|percent)\b",
    re.IGNORECASE,
)
_OPEN, _CLOSE = "<answer>", "</answer>"


def final_answer(text: str) -> str | None:
    r"""The answer of a mathematical response: the last box or, if there is no box, the last answer in the text.

    If there is no box macro, these are tried in order on the last `TAIL` characters, and the first one present decides:

    1. the text after the last `####` that begins a line;
    2. the text after the last "answer is" or "answer:", up to the end of its sentence;
    3. the last $...$, \(...\) or \[...\];
    4. the last number.

    A box that is never closed gives no answer, and neither does a text that ends with "the answer is".
    """
    if last_opening(text) is not None:
        return last_boxed(text)
    tail = _tail(text, TAIL)
    marked = _last_marked(tail)
    if marked is not None:
        return _tidy(marked)
    phrases = list(_PHRASE.finditer(tail))
    if phrases:
        return _tidy(_stated(tail[phrases[-1].end() :]))
    spans = [span for pattern in _SPANS for span in pattern.finditer(tail)]
    if spans:
        return max(spans, key=lambda span: span.end())[2].strip()
    numbers = _NUMBER.findall(tail)
    return _tidy(numbers[-1]) if numbers else None


def final_text(text: str) -> str | None:
    r"""The answer of a response, not necessarily mathematical: box, <answer> tag, or last line.

    The box or tag that begins last decides; if it is not closed, there is no answer. If there is neither, the answer is
    the last non-blank line without a leading "####" or "the answer is".
    """
    opening, tag = last_opening(text), text.rfind(_OPEN)
    if tag >= 0 and (opening is None or opening.start() < tag):
        begin = tag + len(_OPEN)
        end = text.find(_CLOSE, begin, begin + LONGEST)
        return text[begin:end].strip() if end >= 0 else None
    if opening is not None:
        return last_boxed(text)
    line = text[-LONGEST:].rstrip().rpartition("\n")[2].strip()
    marked = _MARKED.fullmatch(line)
    if marked:
        return _bare(marked[1]) or None
    phrases = list(_PHRASE.finditer(line)) or list(_CHOSEN.finditer(line))
    return _bare(line[phrases[-1].end() :] if phrases else line) or None


def _tail(text: str, length: int) -> str:
    """The end of a text, starting after white space so that no number is cut in two."""
    if len(text) <= length:
        return text
    space = _SPACE.search(text, len(text) - length)
    return text[space.end() :] if space else ""


def _last_marked(tail: str) -> str | None:
    """The text after the last `####` that marks an answer and not the heading of a section; None if there is none."""
    for mark in reversed(list(_MARKED.finditer(tail))):
        is_last = not tail[mark.end() :].strip()
        if is_last or mark[1].strip() and not _HEADING.match(mark[1]):
            return mark[1]
    return None


def _stated(text: str) -> str:
    """The rest of a sentence that states the answer; if it begins with a formula, only the formula."""
    text = _LEAD.sub("", text[:TAIL].lstrip(), count=1)
    for pattern in _SPANS:
        span = pattern.match(text)
        if span:
            return span[2]
    return _SENTENCE.split(text, maxsplit=1)[0]


def _tidy(text: str) -> str | None:
    """An answer without Markdown, currency and units ("42 red apples" → "42"); None if nothing is left."""
    text = _bare(text)
    text = without_unit(text)
    if text.count("$") == 1:
        text = text.replace("\\$", "").replace("$", "")
    return text.strip("$ ").strip() or None


def without_unit(text: str) -> str:
    """The 42 of "42 red apples"; the text unchanged if one of its words changes the number, as "million" does."""
    number = _COUNTED.fullmatch(text)
    if number and not _NOT_COUNTED.search(number[2]):
        return number[1]
    return text


def _bare(text: str) -> str:
    return text.replace("**", "").strip("*_`\"' \t").rstrip(".,;").strip("*_`\"' \t")


LONGEST = 10_000
"""The maximum number of characters in a box or tag; a longer one gives no answer."""
_MACROS = (r"\boxed", r"\fbox")
_OPENING = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<token>[0-9])(?![0-9A-Za-z]|[.,/^_]\s*[0-9{])|(?P<end>\Z))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}) in `text`, without the macro and its braces.

    Braces are matched as in TeX: nested ones count, escaped ones (\{ and \}) do not, and a macro before a single digit
    (\boxed 5) boxes that digit. Only the last box counts. If its brace is not closed within `LONGEST` characters, as in
    a truncated response, there is no answer, whatever an earlier box holds. Of nested boxes, the innermost counts. The
    search starts at the end of the text, so it takes linear time at worst and is fast if the box is near the end.

    Returns:
        The content without surrounding white space (it may be empty), or None if there is no complete box.
    """
    opening = last_opening(text)
    if opening is None or opening["end"] is not None:
        return None
    if opening["token"]:
        return opening["token"]
    start, depth = opening.end(), 1
    for brace in _BRACE.finditer(text, start, start + LONGEST):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def last_opening(text: str) -> re.Match[str] | None:
    """The beginning of the last box: the macro with its brace or digit, or with the end of a truncated text."""
    # One position for each macro, so that neither search reads the same text twice.
    positions = [text.rfind(macro) for macro in _MACROS]
    while (last := max(positions)) >= 0:
        opening = _OPENING.match(text, last)
        if opening:
            return opening
        index = positions.index(last)
        positions[index] = text.rfind(_MACROS[index], 0, last)
    return None
