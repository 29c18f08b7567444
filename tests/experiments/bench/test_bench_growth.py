"""The bench of growth: its series, its turns, its goals, and one real point."""

from __future__ import annotations

import pytest

from experiments.bench import growth
from experiments.bench.growth import Point
from upge.errors import ConfigError


def fake(slow_ranks: bool = False):
    """A machine on which time follows tokens exactly and two ranks take half of it, or all; notes the order."""
    asked: list[Point] = []

    def probe(point: Point) -> dict[str, float]:
        asked.append(point)
        tokens = 100.0 * point.groups * point.size
        seconds = tokens / 1000 / (1 if slow_ranks else point.ranks)
        parameters = 256.0 * point.vocabulary
        return {"seconds": seconds, "cpu": tokens / 1000, "memory": 2**24 + 16 * parameters, "computed": tokens,
                "tokens": tokens, "parameters": parameters}  # fmt: skip

    return probe, asked


def test_time_that_follows_tokens_is_linear():
    probe, asked = fake()
    text = growth.run(growth.Settings(), probe)
    assert "| tokens | 16 prompts | 12,800 | 12,800 | 12.8 (12.8 to 12.8) | 4 (4 to 4) | 4.00 | 4.00 |" in text
    assert "time per token 1.00 times" in text and "2 ranks: 2.00 times as fast as one; goal 1.6, reached" in text
    assert "beyond gradients and moments, 0 MiB more at V = 131,072" in text
    first = [point.groups for point in asked[:15]]
    assert first == [4, 8, 16, 8, 16, 4, 16, 4, 8, 4, 8, 16, 8, 16, 4]


def test_a_goal_can_be_missed():
    probe, _ = fake(slow_ranks=True)
    assert "1.00 times as fast as one; goal 1.6, **missed**" in growth.run(growth.Settings(series="ranks"), probe)


def test_groups_of_any_size_have_as_many_responses():
    points = growth.series_of(growth.Settings())["group"]
    assert [(p.groups, p.size) for p in points] == [(16, 2), (8, 4), (4, 8)]


@pytest.mark.parametrize(
    ("changes", "key"), [({"series": "depth"}, "series"), ({"rounds": 4}, "rounds"), ({"size": 6}, "size")]
)
def test_bad_settings_are_named(changes, key):
    with pytest.raises(ConfigError, match=key):
        growth.series_of(growth.Settings(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_point(ranks):
    """A smaller one: weights and tokens counted, over all ranks, memory of at least the gradient."""
    small = Point(groups=2, size=2, vocabulary=64, width=32, layers=1, scale=0.1, updates=1, ranks=ranks)
    actual = growth.launched(small)
    assert actual["seconds"] > 0 and actual["cpu"] > 0 and actual["computed"] > actual["tokens"] > 4
    assert actual["memory"] > 4 * actual["parameters"] > 0
