"""What every data set gives: problems with a checkable answer, in two splits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One question whose answer can be verified.

    Fields:
        id: unique within its data set and stable from run to run.
        prompt: what the user asks, without any template.
        answer: the ground truth, as the verifier reads it.
        demonstration: an expert's response that ends with the answer in a box; None where the data has none.
        level: the difficulty level under which accuracy is reported; None where the data has none.
        system: the system message, if the data brings one.
        where: the place it came from (`file:line` for files), for messages.
        rejected: a flawed response to the same prompt: with the demonstration as the chosen one it makes a preference
            pair; None where the data has none.
    """

    id: str
    prompt: str
    answer: str
    demonstration: str | None
    level: str | None
    system: str | None = None
    where: str = ""
    rejected: str | None = None


@dataclass(frozen=True)
class Splits:
    """The two sides of a data set: `train` for updates, `evaluation` for measuring; no prompt is on both."""

    train: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
