"""Which prompts come when: every source's share in every step, resumable, each prompt once before any comes again."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.growth import growth
from upge.train.prompt_order import demonstration_choice, mixed_indices, prompt_indices

#: Sources of unlike sizes, with weights that divide a step, nearly do, and do not at all.
STRATA = {"math": range(100, 131), "gsm8k": range(7), "gym": range(50, 61)}
MIXES = [
    ({"math": 0.5, "gsm8k": 0.25, "gym": 0.25}, 8),
    ({"math": 0.7, "gsm8k": 0.2, "gym": 0.1}, 10),
    ({"math": 3, "gsm8k": 1.7, "gym": 0.3}, 7),
    ({"math": 1, "gsm8k": 1, "gym": 1}, 1),
    ({"math": 1e-3, "gsm8k": 1, "gym": 2**0.5}, 16),
    ({"math": 1, "gsm8k": 0, "gym": 2}, 5),
]


def source_of(index: int) -> str:
    return next(name for name, members in STRATA.items() if index in members)


def counts(indices: list[int]) -> Counter:
    return Counter(map(source_of, indices))


@pytest.mark.parametrize(("weights", "n"), MIXES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_and_every_stretch_of_steps_has_its_shares(weights, n, seed):
    steps = [counts(mixed_indices(step, n, STRATA, weights, seed)) for step in range(150)]
    assert all(sum(step.values()) == n for step in steps)
    total: Counter = Counter()
    for number, step in enumerate(steps, start=1):
        total += step
        for name, weight in weights.items():
            wanted = n * weight / sum(weights.values())
            assert abs(step[name] - wanted) < 1
            # A sum of so many independent roundings would be off by some 6 after 150 steps.
            assert abs(total[name] - number * wanted) < 3
    for name, weight in weights.items():
        if (n * weight / sum(weights.values())).is_integer():
            assert len({step[name] for step in steps}) == 1


@pytest.mark.parametrize(("weights", "n"), MIXES)
def test_a_source_has_all_its_prompts_before_one_comes_again(weights, n):
    """Its prompts are those that it would have alone, cut where its share of a step ends."""
    steps = [mixed_indices(step, n, STRATA, weights, 3) for step in range(120)]
    for name, members in STRATA.items():
        own = [[index for index in step if index in members] for step in steps]
        number = sum(map(len, own))
        stream = iter([mixed_indices(place, 1, {name: members}, {name: 1.0}, 3)[0] for place in range(number)])
        assert all(sorted(islice(stream, len(step))) == sorted(step) for step in own)
        alone = [mixed_indices(place, 1, {name: members}, {name: 1.0}, 3)[0] for place in range(3 * len(members))]
        epochs = list(batched(alone, len(members)))
        assert all(set(epoch) == set(members) for epoch in epochs) and len(set(epochs)) == 3
        assert number > 0 or weights[name] < 0.01


def batched(items: list[int], size: int):
    return (tuple(items[start : start + size]) for start in range(0, len(items), size))


def test_a_step_follows_from_its_number_alone():
    """Not from the steps before it, the order of the sources' names or the sum of the weights."""
    weights, n = MIXES[2]
    late = mixed_indices(1000, n, STRATA, weights, 5)
    assert late == mixed_indices(1000, n, dict(reversed(STRATA.items())), dict(reversed(weights.items())), 5)
    assert late == mixed_indices(1000, n, STRATA, {name: 4 * weight for name, weight in weights.items()}, 5)
    assert late != mixed_indices(1000, n, STRATA, weights, 6)
    assert late != mixed_indices(1001, n, STRATA, weights, 5)


def test_a_single_source_comes_in_the_order_of_a_data_set():
    for step in range(20):
        members = range(40, 53)
        actual = mixed_indices(step, 5, {"": members}, {"": 1.0}, 9)
        assert actual == [members[i] for i in prompt_indices(step, 5, len(members), 9)]


def test_sources_are_mixed_within_a_step():
    """Cut into two updates, both halves of the steps have prompts of both sources."""
    strata = {"a": range(100), "b": range(100, 200)}
    halves = [mixed_indices(step, 32, strata, {"a": 1, "b": 1}, 0)[:16] for step in range(20)]
    assert all(0 < sum(index < 100 for index in half) < 16 for half in halves)
    assert abs(sum(index < 100 for half in halves for index in half) - 160) < 40


def test_a_late_step_costs_little():
    def draw(step: int) -> None:
        assert len(mixed_indices(step, 128, STRATA, MIXES[2][0], 0)) == 128

    assert growth(draw, 1_000, 1_000_000) < 10


def test_a_source_smaller_than_its_share_repeats_within_a_step():
    actual = mixed_indices(0, 10, {"a": [7, 8], "b": [9]}, {"a": 0.8, "b": 0.2}, 0)
    assert Counter(actual) == {7: 4, 8: 4, 9: 2}


# Demonstrations


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("distance", [1, 2, 3, 7, 10, 64, 359])
def test_demonstrations_come_alike(count, distance):
    """At whatever distance an example comes; by chance the numbers of 200 would spread by some 40."""
    for example in range(5):
        chosen = Counter(demonstration_choice(distance * i, example, count, 0) for i in range(200))
        assert len(chosen) == count and max(chosen.values()) - min(chosen.values()) <= 12


def test_demonstrations_of_two_examples_and_two_seeds_differ():
    def turns(example: int, seed: int) -> list[int]:
        return [demonstration_choice(step, example, 4, seed) for step in range(50)]

    assert turns(3, 0) == turns(3, 0)
    assert len({tuple(turns(example, seed)) for example in range(6) for seed in range(3)}) > 12
    assert set(Counter(demonstration_choice(0, example, 4, 0) for example in range(400))) == {0, 1, 2, 3}
    assert {demonstration_choice(step, 5, 1, 0) for step in range(20)} == {0}
