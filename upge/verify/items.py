"""What goes into a `VerifierPool` and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LONGEST_EXTRACT = 1000
"""Characters of the extracted answer that a verdict keeps."""


class Item(NamedTuple):
    """One response to be judged.

    Fields:
        response: the text that a model wrote.
        answer: the ground truth, as the verifier reads it.
        prompt: what was asked; some verifiers read it.
        verifier: one of the pool's, by the name under which the pool loaded it; None takes the pool's first.
    """

    response: str
    answer: str
    prompt: str | None = None
    verifier: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What came of one item.

    Fields:
        reward: in [0, 1].
        status: "ok", "timeout" or "error"; of the last two the reward is 0.
        detail: the reason for such a status.
        extracted: the answer as the verifier read it in the response, at most `LONGEST_EXTRACT` characters; None where
            it found none, or does not tell.
    """

    reward: float
    status: str = "ok"
    detail: str = ""
    extracted: str | None = None


def checked(item: Item) -> Item:
    """`item`, if its parts are texts.

    Raises:
        TypeError: it is not (text, text, text or None, text or None).
    """
    parts = tuple(item)
    if 2 <= len(parts) <= 4 and all(isinstance(part, str) for part in parts[:2]):
        if all(part is None or isinstance(part, str) for part in parts[2:]):
            return Item(*parts)
    raise TypeError(
        "an item must be (response, answer, prompt or None, verifier or None), all text; found " + repr(parts)[:200]
    )


def shortened(extracted: str | None) -> str | None:
    """An extracted answer as a verdict keeps it: short, and such that any file takes it."""
    if extracted is None:
        return None
    return extracted[:LONGEST_EXTRACT].encode("utf-8", "backslashreplace").decode("utf-8")
