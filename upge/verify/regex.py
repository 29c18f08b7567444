"""Does the final answer of a response match a pattern?"""

from __future__ import annotations

import re

from upge.verify.answers import final_text
from upge.verify.base import AnswerVerifier, shown


class RegexVerifier(AnswerVerifier):
    """Reward 1 if the whole final answer (`final_text`) matches the ground truth, a pattern of Python's `re`, else 0.

    Case counts, unless the pattern begins with (?i). A pattern that backtracks for hours costs its answer the time
    limit of the pool.
    """

    def extract(self, response: str) -> str | None:
        return final_text(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        return None

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        return float(re.fullmatch(answer, given) is not None)

    def check_answer(self, answer: str) -> None:
        """Refuses a pattern that cannot be used.

        Raises:
            ValueError: `answer` is empty or not a regular expression.
        """
        try:
            re.compile(answer)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"the ground truth {shown(answer)} is not a regular expression ({error}); mend it, escape what "
                "is meant literally (re.escape), or remove the row"
            ) from error
        if not answer:
            raise ValueError("the ground truth is an empty pattern, and an empty answer is none; remove the row")
