"""The benches of a start and of generation: what their tables say, worked out by hand, and that the marks are noted."""

from __future__ import annotations

import gc
import json
import sys
import types
import weakref
from pathlib import Path

import pytest

from experiments.bench import generation, startup, startup_probe
from experiments.bench.measure import Timing
from experiments.cli import collector_paused
from upge.errors import ConfigError
from upge.rollout import Rollout


def marks(first_step: float) -> startup.Marks:
    return {mark: (2.0, 1.0) for mark in startup.MARKS[:-1]} | {"first step": (first_step, first_step / 2)}


def test_a_start_is_compared_within_its_round() -> None:
    nothing = (0.0, 0.0, 0.0)
    results = {startup.NOW: (marks(2.0), marks(5.0), marks(8.0)), startup.BEFORE: (marks(6.0), marks(5.0), marks(16.0))}
    made = startup.table(Timing(dict.fromkeys(results, nothing), dict.fromkeys(results, nothing), results))
    rows = made.splitlines()
    assert rows[2] == "| now | seconds | 2.0 | 2.0 | 2.0 | 2.0 | 5.0 | 2.00 (1.00 to 3.00) |"
    assert rows[5] == "| before | CPU | 1.0 | 1.0 | 1.0 | 1.0 | 3.0 | 1 |" and "3 rounds" in made


def test_a_folder_without_a_checkout_and_a_run_that_is_refused_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"before: .* holds no experiments/config\.py"):
        startup.run(startup.Settings(before=str(tmp_path)))
    with pytest.raises(ConfigError, match="exit code 2: error: .*steps"):
        startup._started(Path(__file__).parents[3], ["stepps=3"], tmp_path, "cache")


def test_marks_are_noted_and_the_run_ends_with_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **values: object) -> None:
        made = types.ModuleType(name)
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)

    class Progress:
        def step(self) -> None:
            pass

    class Sampler:
        def sample(self, prompts: list, n: int, sampling: object, seeds: list, arrived: object = None) -> None:
            for copy in range(n):
                arrived(0, copy, "rollout")

    def main(arguments: list[str]) -> int:
        sys.modules["experiments.run.prepare"].prepare()
        Sampler().sample([[1]], 2, None, [0], lambda *rollout: came.append(rollout))
        Progress().step()
        return len(arguments)

    came: list[tuple] = []
    ended: list[int] = []
    module("experiments.run.__main__", main=main, _models=None)
    module("experiments.run.prepare", prepare=lambda: None)
    module("experiments.run.train", Progress=Progress)
    module("upge.rollout", load=None)
    module("upge.rollout.base", Sampler=Sampler)
    parts = [one for one in startup_probe.AFTER if one[2] not in ("trainer", "engine")]
    monkeypatch.setattr(startup_probe, "AFTER", parts)
    monkeypatch.setattr(startup_probe.os, "_exit", ended.append)
    assert startup_probe.main(str(tmp_path / "marks"), 0.0, ["a", "b"]) == 2
    noted = [json.loads(line) for line in (tmp_path / "marks").read_text().splitlines()]
    assert [name for name, *_ in noted] == ["prepared", "first rollout", "first step"]
    assert came == [(0, 0, "rollout"), (0, 1, "rollout")] and ended == [0]


def test_rates_are_of_all_rounds_and_ratios_of_each() -> None:
    def groups(*lengths: int) -> list[list[Rollout]]:
        return [[Rollout(tuple(range(n)), (0.0,) * n, False) for n in lengths]]

    results = {name: (groups(4, 2), groups(6, 0)) for name in generation.OPTIONS}
    results[generation.NOTHING] = (groups(4, 2), groups(5, 1))
    seconds = {generation.OURS: (1.0, 2.0), generation.THEIRS: (2.0, 6.0), generation.NOTHING: (4.0, 4.0)}
    made = generation.table(Timing(seconds, seconds, results), 12.4, generation.Settings(rounds=2))
    rows = made.splitlines()
    assert rows[2] == "| vLLM, blocks of 32 | 4 | 3.00 (2.00 to 3.00) | 3.00 (2.00 to 3.00) |"
    assert rows[3] == "| vLLM, blocks of 128 | 2 | 1 | 1 |"
    assert "32 prompts of 12 tokens" in made and "2 of 4 responses have the same tokens" in made


def test_the_garbage_collector_is_as_before_and_what_is_left_behind_is_collected() -> None:
    class Ring:
        def __init__(self) -> None:
            self.self = self

    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        left = weakref.ref(Ring())
        assert not gc.isenabled() and left() is not None
        raise KeyError
    assert gc.isenabled() and left() is None
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
