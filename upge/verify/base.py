"""The base class of verifiers, and the inputs and outputs of a `VerifierPool`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, cast

LONGEST_ANSWER = 1000
"""The most characters of an answer that is parsed as mathematics; a longer one can only match exactly."""


class AnswerVerifier(ABC):
    """A verifier that reads only the final answer of a response.

    Its steps are separate so that a `VerifierPool` can run the cheap ones in the caller's process. `extract` and
    `glance` take microseconds for any response and never raise. `judge` may take hours; a pool runs it in a process
    that can be killed.
    """

    @abstractmethod
    def extract(self, response: str) -> str | None:
        """The final answer as text, or None if there is none."""

    @abstractmethod
    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        """The reward of an extracted answer if it is known at once, else None."""

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        """The reward of an extracted answer for which `glance` returns None."""
        raise NotImplementedError(f"{type(self).__name__}.glance decides on every answer")

    @abstractmethod
    def check_answer(self, answer: str) -> None:
        """Refuses a ground truth with which no answer can be compared.

        Raises:
            ValueError: `answer` is such a ground truth.
        """

    def warm_up(self) -> None:
        """Imports and caches what `judge` needs. Called once, before worker processes are forked."""

    def __call__(self, response: str, answer: str, prompt: str | None = None) -> float:
        """The reward in [0, 1]; 0 for a response without an answer, or with one on which `judge` fails."""
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
        except Exception:  # caused by the answer: the ground truth has passed check_answer
            return 0.0


def shown(answer: str) -> str:
    """A ground truth as it appears in messages, at most 200 characters of it."""
    return repr(answer if len(answer) <= 200 else answer[:200] + "...")


LONGEST_EXTRACT = 1000
"""The most characters of an extracted answer in a verdict."""


class Item(NamedTuple):
    """One response to verify.

    Attributes:
        response: the text that a model wrote.
        answer: the ground truth, in the form that the verifier reads.
        prompt: the prompt of the response; some verifiers read it.
        verifier: the name of one of the pool's verifiers; None means the pool's first.
    """

    response: str
    answer: str
    prompt: str | None = None
    verifier: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one item.

    Attributes:
        reward: in [0, 1].
        status: "ok", "timeout" or "error"; for the last two the reward is 0.
        detail: the reason for a timeout or an error.
        extracted: the answer that the verifier read in the response, at most `LONGEST_EXTRACT` characters; None if it
            found none or does not report it.
    """

    reward: float
    status: str = "ok"
    detail: str = ""
    extracted: str | None = None


def checked(item: Item) -> Item:
    """`item`, after a check that its parts are texts.

    Raises:
        TypeError: `item` is not (text, text, text or None, text or None).
    """
    parts = tuple(item)
    if 2 <= len(parts) <= 4 and all(isinstance(part, str) for part in parts[:2]):
        if all(part is None or isinstance(part, str) for part in parts[2:]):
            return Item(*cast("tuple[str, str]", parts))
    raise TypeError(
        "an item must be (response, answer, prompt or None, verifier or None), all text; found " + repr(parts)[:200]
    )


def shortened(extracted: str | None) -> str | None:
    """An extracted answer as a verdict holds it: at most `LONGEST_EXTRACT` characters that UTF-8 can encode."""
    if extracted is None:
        return None
    return extracted[:LONGEST_EXTRACT].encode("utf-8", "backslashreplace").decode("utf-8")
