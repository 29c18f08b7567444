r"""Finds the final answer in responses that may have no \boxed{...}, in time linear in the text and always short."""

from __future__ import annotations

import re

TAIL = 2000
"""Characters at the end of a text without a box in which an answer is looked for."""
_SPACE = re.compile(r"\s")
_MARKED = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_HEADING = re.compile(r"[0-9]+[.):]\s*\**[A-Za-z]|[^0-9$\\+\-.]")
_PHRASE = re.compile(r"\banswers?\b[^.:=\n]{0,60}?(?:\b(?:is|are)\b|:|=)[\s*_:]*", re.IGNORECASE)
_CHOSEN = re.compile(r"\bthe (?:correct |right |best )?(?:option|choice) is\b[\s*_:]*", re.IGNORECASE)
_LEAD = re.compile(r"(?:therefore|thus|simply|then|just|equal to|approximately|about)\b[\s,:]*", re.IGNORECASE)
_SENTENCE = re.compile(r"\.(?=\s|\Z)|\n")
_SPANS = (
    # A dollar that opens stands before something, one that closes behind something that can end a formula and before no
    # digit, and a formula has no words, unlike what is between those of "$5 and $6" or "costs $5 each, 2*5=$10".
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
_NOT_COUNTED = {
    *("or", "and", "to", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "i", "x", "y", "n", "plus", "minus", "times"),
    *("hundred", "thousand", "million", "billion", "trillion", "dozen", "over", "not", "point", "mod"),
    *("is", "if", "else", "otherwise", "unless", "except", "than", "half", "squared", "cubed", "base", "percent"),
    *("wrong", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("fifteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
}
_OPEN, _CLOSE = "<answer>", "</answer>"


def final_answer(text: str) -> str | None:
    r"""The answer of a mathematical response: the last box, or without any box the last answer in the text.

    Without a box macro these are tried in order on the last `TAIL` characters, and the first that is there decides:
    what follows the last `####` of a line, what follows the last "answer is" or "answer:" up to the end of its
    sentence, the last $...$, \(...\) or \[...\], the last number. A box that was begun and not finished is no answer,
    and neither is a text that ends with "the answer is".
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
    r"""The answer of a response whose answer need not be mathematics: box, <answer> tag, or the last line.

    Of boxes and tags the last one that begins decides, and if it is not closed, there is no answer. Without either, it
    is the last line with something on it, less a leading "####" or "the answer is".
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
    """The end of a text, from a white space on: half a number would be another number."""
    if len(text) <= length:
        return text
    space = _SPACE.search(text, len(text) - length)
    return text[space.end() :] if space else ""


def _last_marked(tail: str) -> str | None:
    """What follows the last `####`, if it is an answer and not the heading of a section that goes on."""
    for mark in reversed(list(_MARKED.finditer(tail))):
        is_last = not tail[mark.end() :].strip()
        if is_last or mark[1].strip() and not _HEADING.match(mark[1]):
            return mark[1]
    return None


def _stated(text: str) -> str:
    """The rest of a sentence that states the answer; a formula right at its beginning is all of it."""
    text = _LEAD.sub("", text[:TAIL].lstrip(), count=1)
    for pattern in _SPANS:
        span = pattern.match(text)
        if span:
            return span[2]
    return _SENTENCE.split(text, maxsplit=1)[0]


def _tidy(text: str) -> str | None:
    """An answer out of prose: without Markdown and currency, and of "42 red apples" the number; None if it is empty."""
    text = _bare(text)
    text = without_unit(text)
    if text.count("$") == 1:
        text = text.replace("\\$", "").replace("$", "")
    return text.strip("$ ").strip() or None


def without_unit(text: str) -> str:
    """Of "42 red apples" the 42; the text as it is where a word in it says something about the number."""
    counted = _COUNTED.fullmatch(text)
    if counted and not {word.lower() for word in counted[2].split()} & _NOT_COUNTED:
        return counted[1]
    return text


def _bare(text: str) -> str:
    return text.replace("**", "").strip("*_`\"' \t").rstrip(".,;").strip("*_`\"' \t")


LONGEST = 10_000
"""Characters of a box or tag that are read; a longer one holds no answer."""
_MACROS = (r"\boxed", r"\fbox")
_OPENING = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<token>[0-9])(?![0-9A-Za-z]|[.,/^_]\s*[0-9{])|(?P<end>\Z))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}) in `text`, without the macro and its braces.

    Braces are matched as TeX does: nested ones count, escaped ones (\{ and \}) do not; a macro before a single digit
    (\boxed 5) boxes that digit. The last box decides: if its brace is never closed, as in a response that was cut off,
    or not within `LONGEST` characters, there is no answer, whatever an earlier box holds. Where boxes are nested, the
    innermost of the last ones counts. It is found by a search from the end, so the time is linear in the text's length
    at worst and short where the box is near the end.

    Returns:
        The content, stripped of surrounding white space (it may be empty), or None where there is no complete box.
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
    """Where the last box begins: the macro and its brace, or its digit, or the end of a text that was cut off there."""
    # One position for each macro: what one search has passed over, it does not pass over again for the other's sake.
    found = [text.rfind(macro) for macro in _MACROS]
    while (last := max(found)) >= 0:
        opening = _OPENING.match(text, last)
        if opening:
            return opening
        index = found.index(last)
        found[index] = text.rfind(_MACROS[index], 0, last)
    return None
