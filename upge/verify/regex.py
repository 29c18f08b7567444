"""The verifier that matches answers with a regular expression."""

from __future__ import annotations

import re

from upge.verify.answers import final_text
from upge.verify.base import AnswerVerifier, shown


class RegexVerifier(AnswerVerifier):
    """Reward 1 if the whole final answer (`final_text`) matches the ground truth, a pattern of Python's `re`, else 0.

    Matching is case-sensitive unless the pattern begins with (?i). If a pattern backtracks for too long, the answer
    runs into the time limit of the pool.
    """

    def extract(self, response: str) -> str | None:
        return final_text(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        return None

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        return float(re.fullmatch(answer, given) is not None)

    def check_answer(self, answer: str) -> None:
        """Refuses an invalid or empty pattern.

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
