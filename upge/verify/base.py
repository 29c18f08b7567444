"""What verifiers have in common, and what goes into a `VerifierPool` and comes out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_ANSWER = 1000
"""Characters of an answer that are still read as mathematics; a longer one can only match exactly."""


class AnswerVerifier(ABC):
    """A verifier that looks at nothing of a response but its final answer.

    The steps are separate so that a `VerifierPool` can take the cheap ones in the caller's process: `extract` and
    `glance` take microseconds whatever the response is, and never raise; `judge` may take hours, and does its work in
    a process that can be killed.
    """

    @abstractmethod
    def extract(self, response: str) -> str | None:
        """The final answer as text; None where there is none."""

    @abstractmethod
    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        """The reward of the extracted answer where it is known at once, else None."""

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        """The reward of an extracted answer on which `glance` does not decide."""
        raise NotImplementedError(f"{type(self).__name__} decides at a glance")

    @abstractmethod
    def check_answer(self, answer: str) -> None:
        """Raises ValueError for a ground truth that nothing could be compared with."""

    def warm_up(self) -> None:
        """Imports and caches what `judge` needs; called once, before worker processes are forked."""

    def __call__(self, response: str, answer: str, prompt: str | None = None) -> float:
        """The reward in [0, 1]; 0 for a response without an answer, and whatever `judge` trips over earns nothing."""
        given = self.extract(response)
        if not given:
            return 0.0
        known = self.glance(given, answer, prompt)
        if known is not None:
            return known
        try:
            return self.judge(given, answer, prompt)
        except ImportError:
            raise
        except Exception:  # the answer is to blame: the ground truth has passed check_answer
            return 0.0


def shown(answer: str) -> str:
    """A ground truth as messages quote it."""
    return repr(answer if len(answer) <= 200 else answer[:200] + "...")


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
