"""The verifier for tasks of reasoning-gym, which calls the task's own verifier."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, cast

from upge.verify.base import AnswerVerifier, shown

_NEEDS_TUPLES = {"arc_agi", "rearc"}
"""Tasks whose verifiers compare with tuples, which JSON turns into lists."""

Entry = dict[str, Any]  # Any: JSON, with metadata of each task's own form


class ReasoningGymVerifier(AnswerVerifier):
    """The reward of reasoning-gym's own verifier, in [0, 1], for the final answer (`final_text`) of a response.

    The ground truth is the task's entry as JSON; its metadata name the task. Many tasks give a partial reward to an
    answer that contains the right one or has the right format. Some tasks evaluate the answer as a Python expression. A
    `VerifierPool` does this in a worker process with limits on time and memory, but with all of the user's permissions.
    """

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        entry, score = _entry(answer)
        # Python accepts the digits of every script. Others than 0-9 are refused unless the ground truth has some.
        if _has_foreign_digits(given) and not _has_foreign_digits(str(entry.get("answer"))):
            return 0.0
        return min(max(float(score(given, entry)), 0.0), 1.0)  # keeps NaN, which is an error

    def check_answer(self, answer: str) -> None:
        """Refuse an invalid entry, and an entry whose own answer does not earn the full reward.

        Raises:
            ValueError: `answer` is not the JSON of an entry, its task is unknown, or its answer earns less than 1.
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
                f"the answer of the ground truth {shown(answer)} earns {reward:g} from reasoning-gym's own verifier; "
                "leave this task out: its entry cannot be represented in JSON, or the task has a defect"
            )

    def warm_up(self) -> None:
        import reasoning_gym  # noqa: F401


def _entry(answer: str) -> tuple[Entry, Callable[[str, Entry], float]]:
    """The entry and its task's verifier."""
    entry = json.loads(answer)
    name = entry["metadata"]["source_dataset"]
    if name in _NEEDS_TUPLES:
        entry["metadata"] = _tuples(entry["metadata"])
    return entry, _scorer(name)


@functools.cache
def _scorer(name: str) -> Callable[[str, Entry], float]:
    import reasoning_gym

    # The annotation of this function does not give the arguments of the function that it returns.
    return cast(Callable[[str, Entry], float], reasoning_gym.get_score_answer_fn(name))


def _has_foreign_digits(text: str) -> bool:
    return not text.isascii() and any(letter.isdecimal() and not letter.isascii() for letter in text)


def _tuples(value: Any) -> Any:  # Any: a JSON value
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
