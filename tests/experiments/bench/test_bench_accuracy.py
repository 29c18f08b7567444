"""The race to an accuracy: turns, clocks, who is there when, and what is said where somebody never is."""

from __future__ import annotations

import pytest

from experiments.bench import accuracy, trainers
from tests.bench_children import Stage
from upge.errors import ConfigError


@pytest.fixture(autouse=True)
def with_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "has_trl", lambda: True)


def learner(gain: float, seconds: float) -> dict:
    """A script that gains so much accuracy a step, from 0.3, and takes so many seconds for every answer."""

    def figures(steps: int) -> dict[str, float]:
        mean = min(1.0, 0.3 + gain * steps)
        return {"mean": mean, "greedy": mean, "pass": mean}

    return {"steps": lambda steps: {"seconds": seconds}, "evaluate": figures}


SMALL = accuracy.Settings(seeds=1, steps=20, every=5)


def test_each_stops_where_it_is_good_enough() -> None:
    stage = Stage(hpt=learner(0.04, 2.0), trl=learner(0.011, 3.0))
    courses = accuracy.race(3, ["hpt"], SMALL, stage)
    ours, theirs = courses["hpt"], courses[accuracy.PEER]
    assert (ours.steps, ours.seconds) == (5, 2.0) and (theirs.steps, theirs.seconds) == (20, 12.0)
    assert ours.accuracies["mean"] == pytest.approx(0.5) and theirs.reached(SMALL)
    assert accuracy._times("hpt", [courses], SMALL).median == 6.0
    assert all("seed=3" in job["arguments"] for job in stage.jobs.values())
    assert all(child.closed for _, child in stage.children)


def test_they_take_turns_and_who_begins_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Told(accuracy.Run):
        def advance(self, settings: accuracy.Settings) -> bool:
            order.append(next(name for name, child in stage.children if child is self.child))
            return super().advance(settings)

    monkeypatch.setattr(accuracy, "Run", Told)
    stage = Stage(a=learner(0.0, 1.0), b=learner(0.02, 1.0), trl=learner(0.0, 1.0))
    accuracy.race(0, ["a", "b"], SMALL, stage)
    assert order == ["a", "b", "trl", "b", "trl", "a", "a", "trl", "trl", "a"]


def test_the_last_chunk_is_as_short_as_the_steps_that_are_left() -> None:
    stage = Stage(hpt=learner(0.0, 1.0), trl=learner(0.0, 1.0))
    courses = accuracy.race(0, ["hpt"], accuracy.Settings(steps=7, every=5), stage)
    assert {course.steps for course in courses.values()} == {7}


def test_the_table_and_the_goal() -> None:
    stage = Stage(hpt=learner(0.04, 2.0), sft=learner(0.0, 1.0), trl=learner(0.011, 3.0))
    made = accuracy.run(accuracy.Settings(seeds=2, steps=20, every=5, algorithms="hpt, sft"), stage)
    rows = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in rows] == ["trainer", "`hpt`", "`sft`", accuracy.PEER]
    assert [cells[1] for cells in rows[1:]] == ["2 of 2", "0 of 2", "2 of 2"]
    assert [cells[-1] for cells in rows[1:]] == ["6 (6 to 6)", "0 (0 to 0)", "1"], "never there is 0 times as soon"
    assert "Goal: `hpt` at least 3 times sooner than TRL's GRPO; reached, 6 times" in made
    assert "lower bound" not in made


def test_a_peer_that_never_arrives_gives_a_lower_bound() -> None:
    stage = Stage(hpt=learner(0.04, 2.0), trl=learner(0.0, 3.0))
    made = accuracy.run(accuracy.Settings(seeds=1, steps=20, every=5, algorithms="hpt"), stage)
    assert (
        "did not reach the target in 1 of 1 races: there the ratio is a lower bound" in made
        and "reached, 6 times" in made
    )


def test_all_must_start_alike_and_below_the_target() -> None:
    other = learner(0.1, 1.0) | {"evaluate": lambda steps: {"mean": 0.31, "greedy": 0.3, "pass": 0.3}}
    with pytest.raises(AssertionError, match="the accuracies differ"):
        accuracy.race(0, ["hpt"], SMALL, Stage(hpt=learner(0.1, 1.0), trl=other))
    easy = accuracy.Settings(target=0.25)
    with pytest.raises(ConfigError, match="target: the model reaches 0.25 before training"):
        accuracy.race(0, ["hpt"], easy, Stage(hpt=learner(0.1, 1.0), trl=learner(0.1, 1.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 50}, "target: found 50"),
        ({"by": "passes"}, "did you mean 'pass'"),
        ({"algorithms": " "}, "algorithms: empty"),
        ({"every": 0}, "every: found 0"),
        ({"seeds": 0}, "seeds: found 0"),
        ({"batch": 3}, "batch: 3 does not divide the 128 responses"),
        ({"trl": "vllm-patche"}, "did you mean 'vllm-patched'"),
    ],
)
def test_bad_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accuracy.run(accuracy.Settings(**settings), Stage())
