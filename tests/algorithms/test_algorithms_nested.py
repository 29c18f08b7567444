"""Algorithms inside others: what a file names is put in its place, overridden there, and named in full in errors."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import algorithms
import upge
from tests.algorithms.test_algorithms import MASK, message


def test_a_named_algorithm_is_put_in_its_place_and_overrides_reach_inside():
    stages = algorithms.load("sft_then_grpo", ["stages.reinforce.algorithm.terms.rl.estimator.mask.high=0.28"]).stages
    assert stages["demonstrate"].algorithm == algorithms.load("sft")
    assert stages["reinforce"].algorithm == algorithms.load("grpo", [f"{MASK}.high=0.28"])
    relift = algorithms.load(
        "relift", ["interleaved_update.algorithm.terms.sft.coefficient=0.5", "interleaved_update.size=3"]
    )
    assert relift.interleaved_update.algorithm == algorithms.load("sft", ["terms.sft.coefficient=0.5"])
    assert relift.interleaved_update.size == 3
    amft = algorithms.load("amft", ["validation.terms.sft.coefficient=2"])
    assert amft.validation == algorithms.load("sft", ["terms.sft.coefficient=2"])


def test_interpolations_inside_a_nested_tree_hold_and_follow_the_run():
    overrides = ["stages.reinforce.algorithm=hpt", "stages.reinforce.algorithm.terms.sft.gate.threshold=0.5"]
    root = OmegaConf.create({"rollout": {"max_response_tokens": 77}})
    root.algo = algorithms.override(algorithms.read("sft_then_grpo"), overrides)
    terms = algorithms.compose(root.algo, "x").stages["reinforce"].algorithm.terms
    assert terms["rl"].gate.threshold == 0.5 and terms["rl"].reduction.length == 77


def test_a_stage_and_its_regularizer_can_be_added():
    bonus = "{_target_: upge.EntropyBonus, coefficient: 0.1, reduction: {_target_: upge.TokenMean}}"
    stages = algorithms.load(
        "sft_then_grpo",
        ["stages.polish={algorithm: rloo, lr_factor: 0.1}", f"stages.polish.algorithm.regularizers.bonus={bonus}"],
    ).stages
    assert list(stages) == ["demonstrate", "reinforce", "polish"] and stages["polish"].lr_factor == 0.1
    assert stages["polish"].algorithm.regularizers["bonus"].coefficient == 0.1


def test_critic_and_sampling_can_be_overridden_and_follow_the_terms():
    advantage = "terms.rl.estimator.advantage.advantage"
    loaded = algorithms.load("ppo", [f"{advantage}.lam=0.5", "critic.clip=null"])
    assert loaded.critic.returns.lam == 0.5 and loaded.critic.clip is None
    assert algorithms.load("dapo", ["terms.rl.gate.high=0.9"]).sampling.gate == upge.PassRateBetween(0.0, 0.9)
    assert algorithms.load("dapo", ["sampling=null"]).sampling is None


NESTED = {
    ("sft_then_grpo", "stages.reinforce.algorithm=grop"): ["algo.stages.reinforce.algorithm", "did you mean 'grpo'?"],
    ("sft_then_grpo", "stages.reinforce.algorithm=sft_then_grpo"): ["reinforce.algorithm", "stages of its own"],
    ("sft_then_grpo", "stages.reinforce.algorithm=3"): ["algo.stages.reinforce.algorithm", "found 3", "name"],
    ("sft_then_grpo", "stages.reinforce.share=0"): ["algo.stages.reinforce", "share=0", "positive"],
    ("sft_then_grpo", "stages.reinforce.share=.inf"): ["algo.stages.reinforce", "share=inf", "finite"],
    ("sft_then_grpo", "stages.reinforce.lr_factor=.inf"): ["algo.stages.reinforce", "lr_factor=inf", "finite"],
    ("sft_then_grpo", "stages.x y={algorithm: sft}"): ["algo.stages", "'x y'", "letters, digits, _ and -"],
    ("sft_then_grpo", "stages.reinforce.algorithm.terms={a b: {}}"): ["algo.stages.reinforce.algorithm.terms", "'a b'"],
    ("sft_then_grpo", "stages.reinforce.shore=1"): ["algo.stages.reinforce.shore", "did you mean 'share'?"],
    ("sft_then_grpo", "stages.third={share: 1}"): ["algo.stages.third.algorithm", "missing"],
    ("sft_then_grpo", "stages=3"): ["algo.stages", "found 3", "mapping"],
    ("sft_then_grpo", "terms={}"): ["both `terms` and `stages`"],
    ("sft_then_grpo", "critic={}"): ["algo.critic", "unknown key"],
    ("sft_then_grpo", f"stages.reinforce.algorithm.{MASK}.high=-1"): ["stages.reinforce.algorithm.terms.rl", "high=-1"],
    ("relift", "interleaved_update.size=0"): ["algo.interleaved_update", "size=0"],
    ("relift", "interleaved_update.size=null"): ["algo.interleaved_update.size", "found None", "number of prompts"],
    ("relift", "interleaved_update.size=1.5"): ["algo.interleaved_update.size", "found 1.5", "int"],
    ("relift", "interleaved_update.own_optimizer=1"): [
        "algo.interleaved_update.own_optimizer",
        "found 1",
        "true or false",
    ],
    ("relift", "interleaved_update.lr_factor=.inf"): ["algo.interleaved_update.lr_factor", "found inf", "finite"],
    ("hpt", "terms.sft=null"): ["algo.terms.sft: found None", "terms.sft.coefficient=0"],
    ("grpo", "terms={off: {}}"): ["algo.terms", "False", "off", "in quotes"],
    ("grpo", "regularizers={a.b: {}}"): ["algo.regularizers", "'a.b'", "letters"],
    ("sft", "sampling={_target_: upge.DynamicSampling, gate: {_target_: upge.ConstantGate}}"): ["sampling", "rollouts"],
    ("relift", "interleaved_update.gate={_target_: upge.NoMask}"): ["algo.interleaved_update.gate", "a Gate"],
    ("relift", "interleaved_update.algorithm=grpo"): ["algo.interleaved_update", "'grpo'", "demonstrations"],
    ("relift", "interleaved_update={size: 3}"): ["algo.interleaved_update.algorithm", "missing"],
    ("grpo", "interleaved_update.size=3"): ["algo.interleaved_update.size", "no 'interleaved_update'"],
    ("amft", "validation=null"): ["algo", "validation"],
    ("grpo", "validation=[sft]"): ["algo.validation", "['sft']", "name"],
    ("ppo", "critic.returns.lam=1"): ["critic.returns", "is a reference to", "critic.returns={_target_: ...}"],
    ("ppo", "critic={_target_: upge.GAE}"): ["algo.critic", "a ValueLoss"],
    ("grpo", "sampling={_target_: upge.DynamicSampling}"): ["algo.sampling.gate", "missing"],
}


@pytest.mark.parametrize(("name", "override"), NESTED)
def test_a_bad_key_inside_is_named_in_full(name, override):
    actual = message(lambda: algorithms.load(name, [override]))
    assert all(fragment in actual for fragment in NESTED[name, override]) and "\n" not in actual, actual


def test_an_algorithm_that_contains_itself_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"stages: {{a: {{algorithm: {path}}}}}\n")
    assert "contains itself" in message(lambda: algorithms.load(str(path)))


def test_a_file_beside_the_one_that_names_it_is_found(tmp_path, monkeypatch):
    """Its own folder comes first, then the one that the user starts from."""
    grpo = (algorithms.FOLDER / "grpo.yaml").read_text()
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "inner.yaml").write_text(grpo.replace("low: 0.2", "low: 0.1"))
    (tmp_path / "mine" / "deep" / "pipe.yaml").write_text("stages: {a: {algorithm: inner.yaml}}\n")
    (tmp_path / "mine" / "above.yaml").write_text(grpo + "validation: deep/inner.yaml\n")
    (tmp_path / "inner.yaml").write_text(grpo.replace("low: 0.2", "low: 0.9"))
    (tmp_path / "here.yaml").write_text(grpo.replace("low: 0.2", "low: 0.3"))
    monkeypatch.chdir(tmp_path)
    assert algorithms.load("mine/above.yaml").validation.terms["rl"].estimator.mask.low == 0.1
    actual = algorithms.load("mine/deep/pipe.yaml", ["stages.b={algorithm: here.yaml}"])
    assert [s.algorithm.terms["rl"].estimator.mask.low for s in actual.stages.values()] == [0.1, 0.3]
    assert actual.stages["a"].algorithm.name == "inner"
    (tmp_path / "mine" / "lost.yaml").write_text("stages: {a: {algorithm: here2.yaml}}\n")
    said = message(lambda: algorithms.load("mine/lost.yaml"))
    assert "algo.stages.a.algorithm: there is no file here2.yaml in mine or in the working directory" in said


@pytest.mark.parametrize("name", ["a b", "r.l", "größe", "on"])
def test_a_name_that_no_key_can_have_is_refused_with_its_place(name, tmp_path):
    """Before it becomes a part of keys and references."""
    path = tmp_path / "mine.yaml"
    path.write_text((algorithms.FOLDER / "srft.yaml").read_text().replace("  positive:", f"  {name}:"))
    said = message(lambda: algorithms.load(str(path), corrections=["tis"]))
    assert said.startswith("algo.terms: found the name") and "\n" not in said
    path.write_text((algorithms.FOLDER / "srft.yaml").read_text().replace("  positive:", "  the-1st_term:"))
    terms = algorithms.load(str(path), ["correction.tis.cap=3"], ["tis"]).terms
    assert terms["negative"].estimator.denominator.cap == 3
