r"""Finds the final answer of a response: what stands in its last \boxed{...}."""

from __future__ import annotations

import re

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
