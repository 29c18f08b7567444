"""Answers by kind: wrong ones that math-verify takes for right, and right ones that it refuses.

Each kind in cases.jsonl has the cases that were reported and neighbours of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.check_answers import PAGE
from tests.verify_pools import boxed
from upge.verify import load
from upge.verify.comparison import BRIDGES

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text("utf-8").splitlines()]
KINDS = sorted({(case["expected"], case["kind"]) for case in CASES})


@pytest.mark.parametrize("expected, kind", KINDS)
def test_answers_of_a_kind(expected: int, kind: str) -> None:
    verify = load("math")
    cases = [case for case in CASES if (case["expected"], case["kind"]) == (expected, kind)]
    misjudged = [
        (case["gold"], case["answer"])
        for case in cases
        if verify(boxed(case["answer"]), case["gold"], case.get("prompt")) != expected
    ]
    assert len(cases) >= 5 and misjudged == []


def test_the_page_lists_every_bridge_with_its_reason() -> None:
    page = PAGE.read_text("utf-8")
    for *_, is_mutual, example, reason in BRIDGES:
        assert f"| {example} | {'both' if is_mutual else 'this'} | {reason} |" in page
