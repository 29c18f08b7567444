r"""Finds the final answer of a response: what stands in its last \boxed{...}."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}) in `text`, without the macro and its braces.

    Braces are matched as TeX does: nested ones count, escaped ones (\{ and \}) do not. The last box decides: if its
    brace is never closed, as in a response that was cut off, there is no answer, whatever an earlier box holds. Where
    boxes are nested, the innermost of the last ones counts. The cost does not depend on the length of the text
    before the box in any way that matters: it is found by a search from the end.

    Returns:
        The content, stripped of surrounding white space (it may be empty), or None where there is no complete box.
    """
    start = _last_opening(text)
    if start is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def _last_opening(text: str) -> int | None:
    """Position just behind the opening brace of the last box macro."""
    position = len(text)
    while position > 0:
        position = max(text.rfind(r"\boxed", 0, position), text.rfind(r"\fbox", 0, position))
        if position < 0:
            return None
        opening = _BOX.match(text, position)
        if opening:
            return opening.end()
    return None
