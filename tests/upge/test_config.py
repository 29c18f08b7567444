"""Settings classes and errors: ranges at the field, keys as data, text to value."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest

from upge.config import Range, Settings, from_tree, key, meanings, parse, section, split
from upge.errors import ConfigError, ConfigErrors, ModelError, Problems
from upge.evaluation.suite import BenchmarkConfig
from upge.train.config import RunConfig


@dataclass(frozen=True)
class Inner(Settings):
    share: float = key(0.5, "a share", above=0, maximum=1)
    count: int = key(3, "a count", minimum=2, fix="give two or more")
    free: float = key(-1.0, "any number")


@dataclass(frozen=True)
class Outer(Settings):
    steps: int = key(1, "steps", minimum=0)
    inner: Inner = section(Inner)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps == 13:
            raise ConfigError("found 13; give another", "steps")


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "rule"),
    [
        (Range(minimum=0), (0, 7.5), (-1, -0.1, float("nan")), "it must not be negative"),
        (Range(minimum=0.01), (0.01, 1), (0.009,), "it must be at least 0.01"),
        (Range(above=0), (1, 1e-9), (0, -1), "it must be greater than 0"),
        (Range(above=0, maximum=1), (1, 0.1), (0, 1.1, float("nan")), "it must lie in (0, 1]"),
        (Range(minimum=0, below=1), (0, 0.99), (-0.1, 1), "it must lie in [0, 1)"),
        (Range(maximum=2), (2, -5), (2.1,), "it must be at most 2"),
        (Range(below=2), (1.9, -5), (2,), "it must be less than 2"),
        (Range(), (0, -1e9), (), ""),
        (Range(minimum=2, fix="give two or more"), (2,), (1,), "give two or more"),
    ],
)
def test_a_number_out_of_range_is_found_with_the_rule(bounds: Range, good: tuple, bad: tuple, rule: str) -> None:
    assert [bounds.problem(value) for value in good] == [None] * len(good)
    assert [bounds.problem(value) for value in bad] == [f"found {value}; {rule}" for value in bad]


@pytest.mark.parametrize(
    ("tree", "name", "text"),
    [
        ({"steps": -1}, "steps", "steps: found -1; it must not be negative"),
        ({"steps": 13}, "steps", "steps: found 13; give another"),
        ({"inner": {"share": 1.5}}, "inner.share", "inner.share: found 1.5; it must lie in (0, 1]"),
        ({"inner": {"count": 1}}, "inner.count", "inner.count: found 1; give two or more"),
        ({"inner": {"shar": 1}}, "inner.shar", "inner.shar: unknown key; did you mean 'share'?"),
        ({"inner": {"share": "x"}}, "inner.share", "inner.share: found 'x' (str), expected float"),
        ({"inner": {"free": float("inf")}}, "inner.free", "inner.free: found inf; give a finite number"),
        ({"inner": 3}, "inner", "inner: found 3, expected keys such as inner.KEY: share, count, free"),
    ],
)
def test_an_error_carries_its_key(tree: dict, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_tree(Outer, tree)
    assert caught.value.key == name and str(caught.value) == text
    with pytest.raises(ConfigError) as caught:
        from_tree(Outer, tree, "above")
    assert caught.value.key == f"above.{name}" and str(caught.value).startswith(f"above.{name}: ")


def test_several_errors_are_reported_together() -> None:
    wrong = {"stps": 1, "inner": {"share": 0.0, "count": 1}, "steps": "x"}
    with pytest.raises(ConfigErrors) as caught:
        from_tree(Outer, wrong, "above")
    assert [one.key for one in caught.value.problems] == [
        "above.stps",
        "above.inner.share",
        "above.inner.count",
        "above.steps",
    ]
    first, *rest = str(caught.value).split("\n")
    assert first == "4 settings cannot be used"
    assert rest == [f"  {one}" for one in caught.value.problems]


def test_problems_keep_configuration_errors_alone() -> None:
    problems = Problems()
    problems.raise_any()
    with pytest.raises(KeyError), problems:
        raise KeyError("not bad input")
    only = ConfigError("unknown key", "lr")
    with problems:
        raise only
    with pytest.raises(ConfigError) as caught:
        problems.raise_any()
    assert caught.value is only


def test_a_settings_class_checks_its_own_numbers() -> None:
    with pytest.raises(ConfigError, match=r"^share: found 0; it must lie in \(0, 1\]$"):
        Inner(share=0)
    with pytest.raises(ConfigError, match="^suite.benchmarks.x.samples: found 0; give at least 1$"):
        from_tree(BenchmarkConfig, {"samples": 0}, "suite.benchmarks.x")
    with pytest.raises(ConfigError, match="^eval.every: found -1; give a number of steps"):
        from_tree(RunConfig, {"eval": {"every": -1, "keep_best": True}})
    with pytest.raises(ConfigError, match="^optimizer.mini_batches: 3 does not divide prompts_per_step=4"):
        from_tree(RunConfig, {"prompts_per_step": 4, "optimizer": {"mini_batches": 3}})
    assert from_tree(Outer, {"inner": {"share": 1}}).inner.share == 1.0
    assert meanings(Outer)[1] == ("inner.share", 0.5, "a share")


def test_a_key_is_replaced_and_prefixed() -> None:
    error = ModelError("no config.json here", "model.path", "runs/x")
    assert str(error) == "model.path=runs/x: no config.json here"
    moved = error.with_key("reference.path")
    assert str(moved) == "reference.path=runs/x: no config.json here" and type(moved) is ModelError
    assert error.key == "model.path" and str(ConfigError("none", "skip").under("eval")) == "eval.skip: none"
    assert str(ConfigError("none").under("eval")) == "eval: none" and str(ConfigError("a: b")) == "a: b"
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(same), same.key, same.value) == (str(error), "model.path", "runs/x")


def test_text_becomes_a_key_and_a_value() -> None:
    assert split("a.b=[1, 2.5, x]") == ("a.b", "[1, 2.5, x]") and parse("a.b", "[1, 2.5, x]") == [1, 2.5, "x"]
    assert parse("a", "{_target_: upge.NoMask}") == {"_target_": "upge.NoMask"}
    assert split("a=x=y") == ("a", "x=y") and parse("a", "x=y") == "x=y"
    assert split("a=") == ("a", "") and parse("a", "") is None
    assert parse("a", "${b.c}") == "${b.c}" and parse("a", "null") is None and parse("a", "1e-3") == 0.001
    for text in ("a", "=1", ""):
        with pytest.raises(ConfigError, match="is not of the form key=value"):
            split(text)
    with pytest.raises(ConfigError, match=r"^a\.b: '\[1' cannot be read: ") as caught:
        parse("a.b", "[1")
    assert caught.value.key == "a.b"
