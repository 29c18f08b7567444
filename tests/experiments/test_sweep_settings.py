"""A sweep's file and command line: which runs there are, and what is wrong with others."""

import pytest

from experiments.sweep.collect import best_values, group_of, with_choices
from experiments.sweep.settings import load, names, seeds_of, text
from upge.errors import ConfigError

FILE = """\
title: two by two
common: {model: tiny, steps: 3}
variants:
  A: {algo: sft}
  B: {algo: hpt, algo.terms.sft.coefficient: 0.3}
grid:
  optimizer.lr: [1.0e-4, 3.0e-4]
seeds: 0..1
seed_keys: [seed, data.seed]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def test_every_combination_and_seed_is_a_run(file):
    sweep = load([f"sweep={file}"])
    assert len(sweep.runs) == 8 and len({run.slug for run in sweep.runs}) == 8
    assert sweep.labels == ["A, lr=0.0001", "A, lr=0.0003", "B, lr=0.0001", "B, lr=0.0003"]
    last = sweep.runs[-1]
    assert last.arguments("x") == [
        *("model=tiny", "steps=3", "algo=hpt", "algo.terms.sft.coefficient=0.3", "optimizer.lr=0.0003"),
        *("seed=1", "data.seed=1", "output=x"),
    ]


def test_the_command_line_has_the_last_word(file):
    sweep = load([f"sweep={file}", "seeds=[5]", "grid.optimizer.lr=[1e-3]", "steps=7", "output=there", "jobs=3"])
    assert [run.seed for run in sweep.runs] == [5, 5] and sweep.runs[0].keys["steps"] == 7
    assert str(sweep.folder) == "there" and sweep.config.jobs == 3


def test_without_a_file_the_command_line_is_the_sweep():
    sweep = load(["grid.algo=[sft,grpo]", "grid.optimizer.lr=[1e-4,1e-3]", "seeds=0..2", "steps=2"])
    assert sweep.labels == ["sft, lr=0.0001", "sft, lr=0.001", "grpo, lr=0.0001", "grpo, lr=0.001"]
    assert len(sweep.runs) == 12


def test_seeds():
    assert seeds_of("2..4") == [2, 3, 4] and seeds_of([7, 1]) == [7, 1] and seeds_of(None) == [0] and seeds_of(3) == [3]
    for wrong in ("4..2", "a", [1, 1], [-1], [], [0.5]):
        with pytest.raises(ConfigError, match="seeds: found"):
            seeds_of(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=gat"], "gate"),
        (["seeds"], "key=value"),
        (["grid.steps=3"], r"grid\.steps: found 3; give a list"),
        (["select={key: steps}"], "select: found the keys"),
        (["grid.steps=[1]", "baseline=none"], "baseline: no runs 'none'"),
        (["variants={A: 3}"], r"variants\.A: found 3"),
        (["grid.steps=[1]", "evaluate.other.limit=3"], "no evaluation 'other'"),
        (["grid.steps=[1,1]"], "two runs would be called"),
        (["jobs=-1"], "jobs: found -1; it must not be negative"),
        (["jobs=many"], "jobs"),
        (["variants={'..': {algo: sft}}"], r"'\.\.' has no letter or digit"),
        (["variants={'→': {algo: sft}}"], "'→' has no letter or digit"),
        (["variants={a b: {algo: sft}, a→b: {algo: sft}}"], "two runs would be called a-b/seed-0"),
        (["grid.seed=[1,2]"], "grid: seed is one of seed_keys"),
        (["sweep=gate", "data.seed=3"], r"common: data\.seed is one of seed_keys"),
        (["seed_keys=[]", "seeds=0..2"], r"seed_keys: found \[\]"),
        (["seeds=[true]"], "seeds: found"),
        (["sweep=gate", "algo=grpo"], "algo: every variant has values of its own"),
        (["grid.steps=[1,2]", "steps=3"], "steps: the grid has values of its own"),
        (["variants={a: {output: there}}"], r"variants\.a: each run has its own output"),
        (["evaluate={a: {suite: smoke, model: tiny}}"], r"evaluate\.a\.model: each run has its own"),
        (["evaluate={../a: {suite: smoke}}"], r"evaluate\.\.\./a: give it a name of letters"),
        (["grid=3", "grid.steps=[1]"], "grid is 3"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(arguments)


def test_values_are_written_as_one_types_them():
    assert [text(v) for v in (None, True, 0.0003, "a b", [1, "x"])] == ["null", "true", "0.0003", "a b", '[1, "x"]']


def test_a_text_that_looks_like_a_number_stays_one():
    """Where a run reads values as YAML; elsewhere it takes a text as it stands, quotes included."""
    keys = "{data.subset: '1', data.levels: ['1', é], model.system: '2', data.path: 'a: b'}"
    (run,) = load([f"variants={{a: {keys}}}"]).runs
    assert run.arguments("x")[:4] == ['data.subset="1"', 'data.levels=["1", "é"]', "model.system=2", 'data.path="a: b"']


def test_keys_that_end_alike_are_told_apart():
    assert load(["grid.optimizer.lr=[1]", "grid.critic.lr=[2]"]).labels == ["optimizer.lr=1, critic.lr=2"]


def test_a_file_with_nothing_behind_a_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("common:\ngrid:\nvariants: {A: {algo: sft}}\n")
    assert load([f"sweep={path}", "steps=3", "grid.group_size=[2]"]).runs[0].keys["steps"] == 3
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load([f"sweep={path}"])


def test_all_that_ship_can_be_read():
    for name in names():
        sweep = load([f"sweep={name}"])
        assert sweep.config.title and sweep.baseline in sweep.labels


def test_the_best_value_is_that_of_the_highest_mean_and_the_first_of_equals(file):
    sweep = load([f"sweep={file}", "select={key: optimizer.lr, measure: score}"])
    scores = {"A-lr-0.0001": (0.2, 0.4), "A-lr-0.0003": (0.5, 0.0), "B-lr-0.0001": (0.1, 0.1), "B-lr-0.0003": (0, 0.2)}
    rows = [{"run": f"{name}/seed-{s}", "score": v[s]} for name, v in scores.items() for s in (0, 1)]
    assert best_values(sweep, rows) == {"A": 1e-4, "B": 1e-4}
    assert group_of(sweep.runs[0], "optimizer.lr") == "A"
    for odd in ({}, {"score": float("nan")}, {"score": "B"}):
        with pytest.raises(ConfigError, match="B-lr-0.0003/seed-1 has no 'score'"):
            best_values(sweep, [*rows[:-1], {"run": rows[-1]["run"], **odd}])


def test_a_choice_goes_to_the_run_it_belongs_to():
    tree = "variants={A: {algo: sft}, C: {algo: grpo, optimizer.lr: 0.5}}"
    sweep = load([tree, "choose={sweep: rates, key: optimizer.lr}"])
    actual = with_choices(sweep, {"A": 1e-4})
    assert [run.keys["optimizer.lr"] for run in actual.runs] == [1e-4, 0.5]
    with pytest.raises(ConfigError, match="none of which is the variant"):
        with_choices(load([tree, "choose={sweep: rates, key: steps}"]), {"B": 3})
    with pytest.raises(ConfigError, match="none of which"):
        with_choices(load([tree, "choose={sweep: rates, key: steps, group: C}"]), {"A": 3})
    grouped = load([tree, "choose={sweep: rates, key: steps, group: B}"])
    assert {run.keys["steps"] for run in with_choices(grouped, {"B": 3}).runs} == {3}


def test_a_choice_is_that_of_the_longest_name_before_a_comma():
    sweep = load(["variants={'A, fast, 20 + 60': {algo: sft}, 'A, 3': {algo: sft}}", "choose={sweep: x, key: steps}"])
    chosen = with_choices(sweep, {"A": 1, "A, fast": 2, "sft": 3})
    assert [run.keys["steps"] for run in chosen.runs] == [2, 1]


@pytest.mark.parametrize("name", names())
def test_their_runs_and_evaluations_compose(name):
    from experiments.sweep.execute import check

    sweep = load([f"sweep={name}"])
    if sweep.config.choose:
        sweep = with_choices(sweep, {run.variant: 1e-4 for run in sweep.runs} | {"HPT": 1e-4})
    check(sweep)
    assert sweep.runs
