"""The output of every data set: problems with verifiable answers, in two splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer.

    Attributes:
        id: unique within its data set and stable across runs.
        prompt: the question, without any template.
        answer: the ground truth, in the form that the verifier reads.
        demonstrations: expert responses, each of which ends with the final answer; empty if the data has none.
        level: the difficulty level under which accuracy is reported; None if the data has none.
        system: the system message; None if the data has none.
        where: the place that it comes from (`file:line` for files), for messages.
        rejected: a flawed response, which makes a preference pair with the first demonstration as the chosen response;
            None if the data has none.
        verifier: the name of the verifier that reads `answer`, as in `upge.verify.load`; None means the run's verifier.
        source: in a mixture, the name of its data set; else empty.
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
    """The two sides of a data set. No prompt is on both.

    Attributes:
        train: problems for updates.
        evaluation: problems for evaluation.
        weights: in a mixture, the share of the training prompts for each source (`Problem.source`). Shares need not add
            up to 1. If empty, every problem is equally frequent.
    """

    train: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
