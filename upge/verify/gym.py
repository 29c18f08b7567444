"""The verifiers that the tasks of reasoning-gym bring along."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from upge.verify.answers import final_text
from upge.verify.base import AnswerVerifier, shown

_NEEDS_TUPLES = {"arc_agi", "rearc"}
"""Tasks whose verifiers compare with tuples, which JSON makes lists of."""


class ReasoningGymVerifier(AnswerVerifier):
    """The reward of reasoning-gym's own verifier, in [0, 1], for the final answer (`final_text`) of a response.

    The ground truth is the entry of the task as JSON; its metadata name the task. Many tasks give part of the reward to
    an answer that holds the right one, or that is in the right format; that is theirs to decide. Some of them evaluate
    the answer as a Python expression: in a `VerifierPool` that happens in a worker process, which is bounded in time
    and memory but may touch what the user may touch.
    """

    def extract(self, response: str) -> str | None:
        return final_text(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        return None

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        entry, score = _entry(answer)
        # Python reads the digits of every script as numbers; who is not asked for them shall not write them.
        if _has_foreign_digits(given) and not _has_foreign_digits(str(entry.get("answer"))):
            return 0.0
        return min(1.0, max(0.0, float(score(given, entry))))

    def check_answer(self, answer: str) -> None:
        """Refuses an entry that is not one, and one whose own answer does not earn the whole reward.

        Raises:
            ValueError: `answer` is not such JSON, the task is unknown, or its answer is not right.
        """
        try:
            entry, score = _entry(answer)
            own = entry["answer"]
            reward = 1.0 if own is None else float(score(own, entry))
        except Exception as error:
            raise ValueError(
                f"the ground truth {shown(answer)} is not an entry of a reasoning-gym task as JSON, with its metadata "
                f"({type(error).__name__}: {error}); make it with json.dumps(entry)"
            ) from error
        if reward != 1.0:
            raise ValueError(
                f"the answer of the ground truth {shown(answer)} earns {reward:g} of reasoning-gym's own verifier; "
                "leave this task out: JSON has lost something of its entry, or the task is at fault"
            )

    def warm_up(self) -> None:
        import reasoning_gym  # noqa: F401


def _entry(answer: str) -> tuple[dict[str, Any], Callable[[str, dict[str, Any]], float]]:
    """The entry and its task's verifier.

    Raises:
        ValueError, LookupError, TypeError: it is not such an entry.
    """
    entry = json.loads(answer)
    name = entry["metadata"]["source_dataset"]
    if name in _NEEDS_TUPLES:
        entry["metadata"] = _tuples(entry["metadata"])
    return entry, _scorer(name)


@functools.cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)


def _has_foreign_digits(text: str) -> bool:
    return not text.isascii() and any(letter.isdecimal() and not letter.isascii() for letter in text)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
