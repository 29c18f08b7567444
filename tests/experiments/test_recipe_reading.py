"""How a recipe is read: its bases, its dotted keys, its overrides, and what is wrong with one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import config
from experiments.config import compose, presets, read_recipe
from upge.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "experiments" / "configs" / "recipe"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for recipes of one's own, and a function that writes one."""
    plain = config._preset
    (tmp_path / "recipe" / "base").mkdir(parents=True)

    def preset(group: str, name: str) -> dict:
        if not group.startswith("recipe"):
            return plain(group, name)
        with monkeypatch.context() as patch:
            patch.setattr(config, "CONFIGS", tmp_path)
            return plain(group, name)

    def write(name: str, text: str) -> None:
        (tmp_path / "recipe" / f"{name}.yaml").write_text(text)

    monkeypatch.setattr(config, "_preset", preset)
    listed = config.presets
    monkeypatch.setattr(
        config,
        "presets",
        lambda g: sorted(p.stem for p in (tmp_path / g).glob("*.yaml")) if g.startswith("recipe") else listed(g),
    )
    return write


def message(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(arguments))
    return str(caught.value)


def test_a_recipe_changes_its_bases_in_their_order(folder):
    folder("base/shared", "steps: 7\nseed: 3\noptimizer: {lr: 0.1, beta1: 0.5}\noverrides: [terms.rl.coefficient=2]\n")
    folder("first", "base: shared\nalgo: hpt\nsteps: 8\noptimizer.lr: 0.2\nmodel.opening: a\n")
    folder("base/second", "model.opening: b\nmodel.system: s\n")
    folder("mine", "base: [first, second]\nseed: 4\noverrides: [terms.rl.coefficient=3, terms.sft.coefficient=5]\n")
    composed = compose(["recipe=mine", "model.system=t", "algo.terms.sft.coefficient=6"])
    run, terms = composed.config, composed.algorithm.terms
    assert (run.steps, run.seed, run.optimizer.lr, run.optimizer.beta1) == (8, 4, 0.2, 0.5)
    assert (run.model.opening, run.model.system) == ("b", "t")
    # The base's, the recipe's own, the command line's.
    assert (terms["rl"].coefficient, terms["sft"].coefficient) == (3.0, 6.0)
    given = [text.removeprefix("terms.") for text in read_recipe("mine").overrides]
    assert given == ["rl.coefficient=2", "rl.coefficient=3", "sft.coefficient=5"]


def test_a_base_is_no_recipe(folder):
    folder("base/shared", "steps: 7\n")
    folder("mine", "base: shared\n")
    assert "no recipe 'shared'" in message("recipe=shared")


def test_bad_recipes_are_refused_by_name(folder):
    folder("around", "base: back\n")
    folder("back", "base: around\n")
    assert "recipe=around" in message("recipe=around") and "around → back → around" in message("recipe=around")
    folder("lost", "base: arond\n")
    assert "no recipe/base 'arond'" in message("recipe=lost")
    folder("single", "overrides: terms.rl.coefficient=2\n")
    assert "recipe=single: overrides" in message("recipe=single")
    folder("nested", "algo: {terms: {}}\n")
    assert "recipe=nested" in message("recipe=nested") and "overrides" in message("recipe=nested")
    folder("unknown", "optimizer.rate: 2\n")
    assert "optimizer.rate: unknown key" in message("recipe=unknown")


def test_overrides_that_do_not_fit_are_the_recipes_fault_and_the_command_lines_its_own(folder):
    folder("mine", "algo: hpt\noverrides: [terms.sft.gate.threshold=0.5]\n")
    actual = message("recipe=mine", "algo=grpo")
    assert "recipe=mine" in actual and "algo=grpo" in actual and "terms.sft" in actual
    actual = message("recipe=mine", "algo.terms.sft.gate.treshold=0.1")
    assert "recipe=" not in actual and "treshold" in actual


def test_the_pages_own_recipe_composes(folder):
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for name in ("hpt-qwen2.5-math-7b", "hpt-qwen2.5-math-1.5b", "base/paper"):
        folder(name, (RECIPES / f"{name}.yaml").read_text("utf-8"))
    folder("mine", text)
    composed = compose(["recipe=mine"])
    assert composed.config.optimizer.lr == 2e-6 and composed.config.seed == 1
    assert composed.algorithm.terms["rl"].gate.threshold == 0.125 and composed.algorithm.terms["sft"].coefficient == 0.3


def test_names_of_ones_own_take_the_place_of_the_presets_examples(folder):
    """As on the command line; other keys of the data set are merged."""
    sets = "{mine: {_target_: upge.data.Arithmetic, train_size: 8}}"
    folder("mine", f"data: mixture\ndata.sets: {sets}\ndata.weights: {{mine: 1}}\n")
    actual = compose(["recipe=mine"]).tree["data"]
    assert actual["weights"] == {"mine": 1} and list(actual["sets"]) == ["mine"]
    assert actual == compose(["data=mixture", f"data.sets={sets}", "data.weights={mine: 1}"]).tree["data"]


def test_a_recipe_gives_a_correction_its_settings_as_overrides(folder):
    folder("mine", "algo: grpo\ncorrection: [tis, entropy]\noverrides: [correction.tis.cap=3]\n")
    algorithm = compose(["recipe=mine"]).algorithm
    assert algorithm.terms["rl"].estimator.denominator.cap == 3
    assert compose(["recipe=mine", "correction.tis.cap=4"]).algorithm.terms["rl"].estimator.denominator.cap == 4
    said = message("recipe=mine", "correction=icepop")
    assert "its overrides do not fit algo=grpo with correction=icepop" in said and "correction.tis.cap" in said
    for text in ("correction.tis.cap: 3\n", "correction: {tis: {cap: 3}}\n"):
        folder("nested", f"algo: grpo\n{text}")
        assert "a preset cannot change `correction`" in message("recipe=nested")


# Overrides of settings that follow others.

RL, SFT = "algo.terms.rl.gate", "algo.terms.sft.gate"


@pytest.mark.parametrize(
    "overrides, note",
    [
        ([f"{RL}.threshold=0.5"], f"{RL}.threshold=0.5 no longer follows {SFT}.threshold=0.0; to change both, set"),
        ([f"{RL}={{_target_: upge.PassRateAbove, threshold: 0.5}}"], f"{RL}.threshold=0.5 no longer follows {SFT}"),
        ([f"{RL}.threshold=0.5", f"{SFT}.threshold=0.25"], f"no longer follows {SFT}.threshold=0.25"),
        ([f"{SFT}.threshold=0.5"], ""),
        ([f"{RL}.threshold=0.5", f"{SFT}.threshold=0.5"], ""),
        ([f"{RL}={{_target_: upge.ConstantGate}}"], ""),
    ],
)
def test_an_override_that_splits_two_settings_is_noted(overrides, note):
    """A setting of the file that follows another one, but afterwards has a value of its own that differs."""
    notes = compose(["algo=hpt", *overrides]).notes
    assert len(notes) == int(bool(note)) and note in "".join(notes)


def test_a_split_part_is_noted_without_its_settings():
    (note,) = compose(["algo=amft", "algo.critic.returns={_target_: upge.GAE, lam: 0.9}"]).notes
    assert note.startswith("algo.critic.returns no longer follows algo.terms.rl.estimator.advantage.advantage; ")


def test_a_penalty_on_changes_within_a_step_of_one_update_is_noted():
    staged = ["algo=sft_then_grpo", "algo.stages.reinforce.algorithm=kl_cov"]
    for arguments, path in ((["algo=kl_cov"], "algo"), (staged, "algo.stages.reinforce.algorithm")):
        (note,) = compose(arguments).notes
        assert note.startswith(f"{path}.terms.kl has no effect: ") and note.endswith("optimizer.epochs to 2 or more")
        assert not compose([*arguments, "optimizer.epochs=2"]).notes
        assert not compose([*arguments, "optimizer.mini_batches=2"]).notes


def test_overrides_of_a_recipe_split_on_purpose():
    """What the recipe splits is its choice; only the command line's overrides are noted."""
    assert not any(compose([f"recipe={name}"]).notes for name in presets("recipe"))
