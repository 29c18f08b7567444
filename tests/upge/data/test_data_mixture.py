"""Several data sets as one: sources, ids, levels, weights, and no prompt on both sides of any two."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from tests.upge.data.test_data_files import CONFIGS, ROWS
from tests.upge.data.test_data_table import write
from upge.data import Arithmetic, Mixture, Problem, Splits, Table
from upge.errors import ConfigError, DataError
from upge.instantiate import build

SMALL = Arithmetic(levels=["2 numbers"], train_size=4, evaluation_size=2)
OTHER = Arithmetic(levels=["3 mixed"], train_size=3, evaluation_size=1)


@dataclass(frozen=True)
class Fixed:
    """These prompts."""

    train: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    level: str | None = None

    def load(self) -> Splits:
        sides = (self.train, self.evaluation)
        return Splits(*(tuple(Problem(p, p, "1", level=self.level, where=f"at {p}") for p in side) for side in sides))


def test_problems_keep_what_they_are_and_say_whose_they_are():
    """Two sets with the same ids: every id stays unique, and the source and the level name the set."""
    splits = Mixture({"a": SMALL, "b": OTHER, "c": Arithmetic(levels=["2 numbers"], train_size=4)}).load()
    problems = splits.train + splits.evaluation
    assert Counter(p.source for p in splits.train) == {"a": 4, "b": 3, "c": 4}
    assert len({p.id for p in problems}) == len(problems) and all(p.id.startswith(f"{p.source}/") for p in problems)
    own = SMALL.load().train[0]
    assert splits.train[0].id == f"a/{own.id}" and splits.train[0].level == own.level
    assert (splits.train[0].prompt, splits.train[0].demonstrations) == (own.prompt, own.demonstrations)
    assert {p.level for p in splits.evaluation if p.source == "b"} == {"b, 3 mixed"}
    assert [p.level for p in Mixture({"d": Fixed(("x",), ("y",))}).load().evaluation] == ["d"]
    assert splits.weights == {}


def test_weights_are_handed_on():
    mixture = Mixture({"a": SMALL, "b": OTHER}, {"a": 3, "b": 0})
    # A set without a share is evaluated on, and of its training side nothing is left to count or to be checked.
    assert mixture.load().weights == {"a": 3} and len(mixture.load().evaluation) == 3
    assert {problem.source for problem in mixture.load().train} == {"a"}


def test_a_prompt_on_the_sides_of_two_sets_is_refused():
    sets = {"a": Fixed(("x", "y")), "b": Fixed(("z",), ("Is  y ?", " y"))}
    said = r"data\.sets\.b: at  y: the same question .*data\.sets\.a: at y; .*evaluation_share"
    with pytest.raises(DataError, match=said):
        Mixture(sets).load()
    assert len(Mixture(sets | {"b": Fixed(("y", "z"), ("w",))}).load().train) == 4


def test_two_tables_divided_alike_never_cross(tmp_path):
    """The side hangs on the prompt alone, so tables that overlap may be mixed."""
    tables = {
        "a": Table(path=write(tmp_path / "a.jsonl", ROWS[:300]), evaluation_share=0.2),
        "b": Table(path=write(tmp_path / "b.json", ROWS[100:]), evaluation_share=0.2),
    }
    assert len(Mixture(tables).load().train) > 400


def test_what_a_set_has_to_say_comes_with_its_name(tmp_path):
    with pytest.raises(DataError, match=r"data\.sets\.b: data file .*nowhere\.jsonl does not exist"):
        Mixture({"a": SMALL, "b": Table(path=str(tmp_path / "nowhere.jsonl"))}).load()
    node = {"_target_": "upge.data.Mixture", "sets": {"b": {"_target_": "upge.data.Arithmetic", "largest": 0}}}
    with pytest.raises(ConfigError, match=r"data\.sets\.b: data\.largest: found 0"):
        build(node, "data")


@pytest.mark.parametrize(
    ("sets", "weights", "said"),
    [
        ({}, None, "data.sets: empty"),
        ({"a": SMALL, "b": "gsm8k"}, None, "data.sets.b: found 'gsm8k' (str), expected a data set"),
        ({"a": Mixture({"b": SMALL})}, None, "data.sets.a: is a mixture itself"),
        ({"a": SMALL}, {"b": 1.0, "a": 1}, "data.weights.b: no such set"),
        ({"a": SMALL, "b": OTHER}, {"a": 1.0}, "data.weights.b: missing"),
        ({"a": SMALL}, {"a": -1.0}, "data.weights.a: found -1.0"),
        ({"a": SMALL}, {"a": float("inf")}, "data.weights.a: found inf"),
        ({"a": SMALL}, {"a": "much"}, "data.weights.a: found 'much'"),
        ({"a": SMALL}, {"a": 0}, "data.weights: all are 0"),
    ],
)
def test_bad_settings_are_named(sets, weights, said):
    with pytest.raises(ConfigError) as caught:
        Mixture(sets, weights)
    assert said in str(caught.value)


def test_the_preset_is_built_with_its_sets():
    mixture = build(OmegaConf.load(CONFIGS / "mixture.yaml").data, "data")
    assert isinstance(mixture, Mixture) and mixture.sets["sums"] == Arithmetic()
    assert mixture.weights == {"sums": 0.5, "gym": 0.5}
