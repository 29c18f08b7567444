"""What the verifiers of this package have in common: they read the final answer of a response, then judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
