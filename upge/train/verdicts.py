"""The outcome of a step's verification: how many verdicts failed, why, and whether there were too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from upge.train.sample import Trajectory
from upge.verify import VerifierError

FAILED = ("error", "timeout")
"""Status of a verification that gave no reward."""


@dataclass(frozen=True)
class StepVerdicts:
    """The verdicts on all responses that were sampled for a step, including those of prompts that were redrawn.

    Attributes:
        count: the number of verdicts.
        failed: the rollouts whose verification ended in an error or a timeout; their reward is the smallest possible.
        first_error: the first error with its traceback; empty without an error.
    """

    count: int = 0
    failed: tuple[Trajectory, ...] = ()
    first_error: str = ""

    @staticmethod
    def of(rollouts: Sequence[Trajectory], first_errors: Sequence[str] = ()) -> StepVerdicts:
        """The verdicts on `rollouts`; `first_errors` has one entry per rank, empty if the rank had no error."""
        failed = tuple(t for t in rollouts if t.status in FAILED)
        return StepVerdicts(len(rollouts), failed, next(filter(None, first_errors), ""))

    def __add__(self, other: StepVerdicts) -> StepVerdicts:
        first_error = self.first_error or other.first_error
        return StepVerdicts(self.count + other.count, self.failed + other.failed, first_error)

    def metrics(self) -> dict[str, float]:
        """The counts of timeouts and errors; empty if nothing was verified."""
        status = Counter(t.status for t in self.failed)
        return {"verify/timeouts": status["timeout"], "verify/errors": status["error"]} if self.count else {}

    def check(self, limit: float, step: int) -> None:
        """Refuse the verdicts if too many failed, because the rewards of failed ones say nothing about the responses.

        Args:
            limit: the largest share of failed verdicts.
            step: counted from 1, for the message.

        Raises:
            VerifierError: the share of failed verdicts is above `limit`.
        """
        if len(self.failed) <= limit * self.count:
            return
        status = Counter(t.status for t in self.failed)
        kinds = [f"{status[kind]} {kind}{'s' if status[kind] > 1 else ''}" for kind in FAILED]
        kinds = [text for text in kinds if not text.startswith("0 ")]
        first = next((t for t in self.failed if t.status == "error"), self.failed[0])
        raise VerifierError(
            f"step {step}: {len(self.failed)} of {self.count} verdicts failed ({', '.join(kinds)}; the first: "
            f"{first.detail}), more than the limit of {limit:g}; fix the verifier (verify.verifier, or the problem's "
            "own) and run the same command again, which continues from the saved state, or raise the limit (1 = never "
            "stop). The responses and the reasons are in rollouts/",
            "stop.verifier_errors",
        )
