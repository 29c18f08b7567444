"""Generated answers: notations of a value are right; other values, permutations, fragments and questions are not."""

from __future__ import annotations

from collections import Counter

import pytest

from experiments.bench import graders
from experiments.bench.answer_pairs import KINDS, Pair, pairs
from tests.verify_pools import boxed
from upge.verify import load

LABELLED = list(pairs(880, seed=1))


def test_the_pairs_cover_every_kind_and_every_relation() -> None:
    assert list(pairs(50)) == list(pairs(50)) != list(pairs(50, seed=1))
    assert {pair.kind for pair in LABELLED} == set(KINDS)
    relations = Counter(pair.relation for pair in LABELLED)
    assert set(relations) == {"notation", *graders.WRONG} and relations["notation"] == len(LABELLED) / 2
    assert min(relations.values()) > 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_of_a_kind(kind: str) -> None:
    verify = load("math")
    misjudged = [
        pair
        for pair in LABELLED
        if pair.kind == kind and verify(boxed(pair.answer), pair.gold, pair.prompt) != pair.is_right
    ]
    assert misjudged == []


def test_the_table_of_graders(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(labelled: list[Pair]) -> list[float]:
        return [1.0] * len(labelled)

    monkeypatch.setattr(graders, "graders", lambda: {"right": lambda own: [p.is_right for p in own], "1": generous})
    monkeypatch.setattr(graders.peers, "summary", lambda names: "No peers.")
    table = graders.accuracy(100)
    assert "| right | 0 | 0 | 0 | 0 | 0 | 0 | 0.00% |" in table
    assert "| 1 | 0 | 50 |" in table and "| 50.00% |" in table and table.endswith("No peers.")


def test_graders_judge_in_their_own_format() -> None:
    labelled = [Pair("integer", "notation", "5", "5"), Pair("integer", "other value", "5", "6")]
    for name in ("upge `math`", "math-verify"):
        assert graders.graders()[name](labelled) == [1.0, 0.0]
