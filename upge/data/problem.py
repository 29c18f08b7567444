"""What every data set gives: problems with a checkable answer, in two splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One question whose answer can be verified.

    Fields:
        id: unique within its data set and stable from run to run.
        prompt: what the user asks, without any template.
        answer: the ground truth, as the verifier reads it.
        demonstrations: an expert's responses, each of which ends with the final answer; none where the data has none.
        level: the difficulty level under which accuracy is reported; None where the data has none.
        system: the system message, if the data brings one.
        where: the place it came from (`file:line` for files), for messages.
        rejected: a flawed response to the same prompt: with the first demonstration as the chosen one it makes a
            preference pair; None where the data has none.
        verifier: the name of the verifier that reads `answer`, as in `upge.verify.load`; None takes the run's.
        source: the data set it belongs to, in a mixture of several; empty where there is one.
    """

    id: str
    prompt: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    level: str | None = None
    system: str | None = None
    where: str = ""
    rejected: str | None = None
    verifier: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Splits:
    """The two sides of a data set: `train` for updates, `evaluation` for measuring; no prompt is on both.

    Fields:
        train, evaluation: the problems.
        weights: in a mixture, the share of the training prompts that each source (`Problem.source`) shall have; they
            need not add up to 1. Empty: every problem comes as often as every other.
    """

    train: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
