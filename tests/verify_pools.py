"""What the tests of the verifier pool share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from upge.verify import Verdict

ROOT = Path(__file__).resolve().parents[1]
OWN = "tests.verify_examples"
BOMB = r"\boxed{i^{9^{9^9}}}"
"""What nobody evaluates in time, and whose size does not tell that it is not the ground truth."""


def boxed(text: str) -> str:
    return rf"Hence the answer is \boxed{{{text}}}."


def half(k: int) -> tuple[str, str]:
    """A right answer of its own for every k, which has to be parsed."""
    return boxed(rf"\frac{{{k}}}{{210}}"), f"{2 * k}/420"


def rewards(verdicts: Iterable[Verdict]) -> list[float]:
    """The rewards, of verdicts that are all in order."""
    verdicts = list(verdicts)
    assert {(verdict.status, verdict.detail) for verdict in verdicts} <= {("ok", "")}
    return [verdict.reward for verdict in verdicts]


def children(pid: int | None = None) -> set[int]:
    """Process ids of the living children of `pid`, or of this process, and theirs."""
    pid, results = pid or os.getpid(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            results |= {int(entry.name)} | children(int(entry.name))
    return results
