"""Algorithms as files: loading, overrides, errors by key, users' own parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

import algorithms
import upge
from tests.literal import trajectories
from upge import ConfigError

MASK = "terms.rl.estimator.mask"


def message(call) -> str:
    """The message of the `ConfigError` that `call` raises: all of it, and of no other exception."""
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def with_file(folder, monkeypatch, name: str, text: str) -> None:
    """A module of the user's own, in the folder that they start from."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


# Loading and overrides.


def test_names_are_the_files():
    assert {"sft", "reinforce", "grpo", "dr_grpo", "hpt"} <= set(algorithms.names())
    assert all(algorithms.load(name).name == name for name in algorithms.names())
    assert all(algorithms.load(name).description for name in algorithms.names())


def test_an_override_changes_one_setting():
    plain, changed = algorithms.load("grpo"), algorithms.load("grpo", [f"{MASK}.high=0.28"])
    assert changed.terms["rl"].estimator.mask == upge.PPOClip(low=0.2, high=0.28)
    assert plain.terms["rl"].estimator.mask == upge.PPOClip(low=0.2, high=0.2)
    assert dataclasses.replace(changed.terms["rl"], estimator=plain.terms["rl"].estimator) == plain.terms["rl"]


def test_a_mapping_with_target_replaces_the_part_and_its_settings():
    loaded = algorithms.load("grpo", [f"{MASK}={{_target_: upge.ImportanceBand, high: 2.0}}"])
    assert loaded.terms["rl"].estimator.mask == upge.ImportanceBand(low=0.5, high=2.0)
    nested = (
        f"{MASK}={{_target_: upge.AllOf, masks: [{{_target_: upge.NoMask}}, {{_target_: upge.PPOClip, low: 0.1}}]}}"
    )
    expected = upge.AllOf((upge.NoMask(), upge.PPOClip(low=0.1)))
    assert algorithms.load("grpo", [nested]).terms["rl"].estimator.mask == expected


def test_overrides_apply_in_order_and_may_add_a_setting():
    loaded = algorithms.load("grpo", [f"{MASK}={{_target_: upge.PPOClip}}", f"{MASK}.dual=3", f"{MASK}.dual=4"])
    assert loaded.terms["rl"].estimator.mask == upge.PPOClip(dual=4)


def test_the_target_alone_can_change_where_there_are_no_settings():
    loaded = algorithms.load("grpo", ["terms.rl.estimator.denominator._target_=upge.CurrentPolicy"])
    assert loaded.terms["rl"].estimator.denominator == upge.CurrentPolicy()


def test_a_regularizer_and_a_term_can_be_added():
    penalty = "{_target_: upge.KLPenalty, coefficient: 0.001, reduction: {_target_: upge.SequenceMean}}"
    loaded = algorithms.load("grpo", [f"regularizers.kl={penalty}"])
    assert loaded.regularizers == {"kl": upge.KLPenalty(0.001, upge.SequenceMean())}
    assert loaded.needs.reference and not algorithms.load("grpo").needs.reference
    extra = OmegaConf.to_container(algorithms.read("sft").terms.sft)
    loaded = algorithms.load("grpo", [f"terms.expert={extra}"])
    assert list(loaded.terms) == ["rl", "expert"] and loaded.needs.demonstrations


def test_load_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((algorithms.FOLDER / "grpo.yaml").read_text().replace("low: 0.2", "low: 0.1"))
    loaded = algorithms.load(str(path), ["terms.rl.coefficient=2"])
    assert loaded.name == "mine"
    assert loaded.terms["rl"].estimator.mask.low == 0.1 and loaded.terms["rl"].coefficient == 2


def test_read_does_not_change_with_overrides():
    node = algorithms.read("grpo")
    before = OmegaConf.to_yaml(node)
    algorithms.override(node, [f"{MASK}.high=0.5"])
    assert OmegaConf.to_yaml(node) == before


@pytest.mark.parametrize("name", ["reinforce", "dr_grpo", "hpt"])
def test_the_length_follows_the_run(name):
    """1024 where there is no run; the run's response limit as part of a run's configuration, after an override too."""
    assert algorithms.load(name).terms["rl"].reduction.length == 1024
    root = OmegaConf.create({"rollout": {"max_response_tokens": 77}})
    root.algo = algorithms.read(name)
    assert algorithms.compose(root.algo, name).terms["rl"].reduction.length == 77
    root.algo = algorithms.override(root.algo, ["terms.rl.coefficient=0.5"])
    assert algorithms.compose(root.algo, name).terms["rl"].reduction.length == 77
    root.algo = algorithms.override(root.algo, ["terms.rl.reduction.length=5"])
    assert algorithms.compose(root.algo, name).terms["rl"].reduction.length == 5


def test_an_interpolation_in_an_override_follows_the_run():
    root = OmegaConf.create({"rollout": {"max_response_tokens": 77}})
    root.algo = algorithms.override(
        algorithms.read("hpt"), ["terms.rl.reduction.length=${rollout.max_response_tokens}"]
    )
    assert algorithms.compose(root.algo, "hpt").terms["rl"].reduction.length == 77


def test_both_gates_of_hpt_share_one_threshold():
    terms = algorithms.load("hpt", ["terms.sft.gate.threshold=0.25"]).terms
    assert terms["rl"].gate == upge.PassRateAbove(0.25) and terms["sft"].gate == upge.PassRateAtMost(0.25)


# Errors: each names the key, what was found and what to do.

OVERRIDES = {
    f"{MASK}.hihg=1": ["algo.terms.rl.estimator.mask.hihg", "PPOClip", "did you mean 'high'?"],
    f"{MASK}.high=abc": ["algo.terms.rl.estimator.mask.high", "'abc'", "expected float"],
    f"{MASK}.high=-1": ["algo.terms.rl.estimator.mask", "high=-1", "must not be negative"],
    f"{MASK}.high=.nan": ["algo.terms.rl.estimator.mask.high", "nan"],
    f"{MASK}.low=null": ["algo.terms.rl.estimator.mask.low", "None", "expected float"],
    f"{MASK}.low=true": ["algo.terms.rl.estimator.mask.low", "True", "expected float"],
    f"{MASK}={{}}": ["algo.terms.rl.estimator.mask", "{}", "_target_", "StabilizationMask"],
    f"{MASK}=upge.NoMask": ["algo.terms.rl.estimator.mask", "'upge.NoMask'", "give a mapping with `_target_`"],
    f"{MASK}={{_target_: upge.NoMask, low: 1}}": ["algo.terms.rl.estimator.mask.low", "has no settings"],
    f"{MASK}={{_target_: upge.PPOClipp}}": ["mask._target_", "'PPOClipp'", "did you mean 'PPOClip'?"],
    f"{MASK}={{_target_: PPOClip}}": ["mask._target_", "'PPOClip'", "dotted path such as upge.NoMask"],
    f"{MASK}={{_target_: .Mask}}": ["mask._target_", "'.Mask'", "dotted path"],
    f"{MASK}={{_target_: 3}}": ["mask._target_", "found 3", "dotted path"],
    f"{MASK}={{_target_: no_such_file.Mask}}": ["mask._target_", "no module 'no_such_file'", "PYTHONPATH"],
    f"{MASK}={{_target_: upge.nope.Mask}}": ["mask._target_", "no module 'upge.nope'"],
    f"{MASK}={{_target_: upge.__version__}}": ["mask._target_", "not a class or function"],
    f"{MASK}={{_target_: upge.StabilizationMask}}": [
        "algo.terms.rl.estimator.mask._target_: upge.StabilizationMask is abstract, it lacks __call__; give a class",
        "with this method",
    ],
    "terms.rl.gate={_target_: upge.StatefulGate, variable: a}": ["is abstract, it lacks initial, updated; give"],
    f"{MASK}={{_target_: upge.UnitDenominator}}": ["estimator.mask", "UnitDenominator", "a StabilizationMask"],
    f"{MASK}={{_target_: upge.AllOf, masks: [1]}}": ["algo.terms.rl.estimator.mask.masks", "(1,)"],
    f"{MASK}={{_target_: ": ["algo.terms.rl.estimator.mask", "'{_target_: '"],
    f"{MASK}._target_=upge.ImportanceBand": ["mask._target_", "upge.PPOClip", "(dual, high, low)", "mask={_target_: "],
    "terms.rll.source=all": ["algo.terms.rll.source", "no 'terms.rll'", "did you mean 'terms.rl.source'?"],
    "terms.rl.source=rollout": ["algo.terms.rl.source", "'rollout'", "did you mean 'rollouts'?"],
    "terms.rl.source.deep=1": ["algo.terms.rl.source", "{'deep': 1}", "rollouts"],
    "terms.rl.colour=blue": ["algo.terms.rl.colour", "unknown key", "source"],
    "terms.rl.gate=null": ["algo.terms.rl.gate", "None", "a Gate"],
    "terms.rl.gate={_target_: upge.PassRateAbove, threshold: 2}": ["algo.terms.rl.gate", "threshold: 2", "0 and 1"],
    "terms.rl.coefficient=much": ["algo.terms.rl.coefficient", "'much'", "expected float"],
    "terms.rl.coefficient=.nan": ["algo.terms.rl.coefficient", "nan"],
    "terms.rl.estimator=plain": ["algo.terms.rl.estimator", "'plain'", "expected UnifiedGradient"],
    "terms.rl.estimator.maks={_target_: upge.NoMask}": ["algo.terms.rl.estimator.maks", "did you mean 'mask'?"],
    "terms.rl.reduction={_target_: upge.FixedLength}": ["algo.terms.rl.reduction.length", "missing", "FixedLength"],
    "terms.rl.reduction.length=0": ["algo.terms.rl.reduction", "length: 0", "at least 1"],
    "terms.rl.reduction.length=${nowhere}": ["algo.terms.rl.reduction.length", "nowhere", "a value of its own"],
    "terms.rl=null": ["algo.terms.rl", "None", "estimator, gate, reduction, source"],
    "terms.rl={source: rollouts}": ["algo.terms.rl.estimator", "missing", "estimator, gate, reduction, source"],
    "terms=null": ["algo.terms", "None", "at least one named term"],
    "term.rl.source=all": ["algo.term.rl.source", "no 'term.rl'", "did you mean 'terms.rl.source'?"],
    "colour=blue": ["algo.colour", "unknown key", "critic, description, guidance, interleaved_update"],
    "regularizers=kl": ["algo.regularizers", "'kl'", "mapping from names"],
    "regularizers.kl=1": ["algo.regularizers.kl", "'1'", "a Regularizer"],
    "regularizers.kl={_target_: upge.KLPenalty}": ["algo.regularizers.kl.coefficient", "missing"],
    "steps": ["'steps'", "key=value"],
    "=3": ["'=3'", "key=value"],
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_override_is_one_error_with_key_value_and_fix(override):
    actual = message(lambda: algorithms.load("dr_grpo", [override]))
    assert all(fragment in actual for fragment in OVERRIDES[override]), actual
    assert "\n" not in actual


FILES = {
    "": ["algo.terms", "None", "at least one named term"],
    "- a\n": ["is not a mapping", "`terms`"],
    "a: [\n": ["not valid YAML", "line 2"],
    "3": ["not valid YAML"],
    "description: x\n": ["algo.terms", "None"],
    "terms: {}\n": ["algo.terms", "{}"],
    "terms: [a]\n": ["algo.terms", "['a']"],
    "terms: {rl: 3}\n": ["algo.terms.rl", "found 3", "mapping with the keys"],
    "terms: {1: {}}\n": ["algo.terms.1.estimator", "missing"],
    "terms: 1\nterms: 2\n": ["duplicate key terms", "line 2"],
    "terms: ???\n": ["algo.terms", "???"],
    "terms: {rl: {source: '${nope}'}}\n": ["algo.terms.rl.source", "nope"],
    "terms: {}\nteacher: {self: true}\n": ["algo.teacher", "give teacher.KEY=VALUE on the command line"],
    "terms: {}\nterm: {}\n": ["algo.term", "unknown key", "did you mean 'terms'?"],
    "1: 2\n": ["algo.1", "unknown key"],
}


@pytest.mark.parametrize("text", FILES)
def test_a_malformed_file_is_one_error(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    actual = message(lambda: algorithms.load(str(path)))
    assert all(fragment in actual for fragment in FILES[text]), actual


def test_a_file_that_is_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in message(lambda: algorithms.load(str(tmp_path / "mine.yaml")))
    assert "did you mean 'grpo'?" in message(lambda: algorithms.load("grop"))
    absent = message(lambda: algorithms.load(str(tmp_path / "absent.yaml")))
    assert "there is no file" in absent and "absent.yaml" in absent and "hpt" in absent


# A user's own part.

OWN = """
from dataclasses import dataclass
import torch
import upge

@dataclass(frozen=True)
class TopHalf(upge.StabilizationMask):
    '''Only tokens less likely than `below` may move.'''
    below: float = 0.5
    reads = frozenset({"logprobs"})

    def __call__(self, batch, advantages):
        return (batch.logprobs.detach().exp() < self.below).to(advantages.dtype)
"""


def test_a_users_own_file_needs_no_registration(tmp_path, monkeypatch):
    with_file(tmp_path, monkeypatch, "own_mask", OWN)
    assert len([line for line in OWN.splitlines() if line.strip()]) <= 15
    loaded = algorithms.load("dr_grpo", [f"{MASK}={{_target_: own_mask.TopHalf, below: 0.4}}"])
    batch = trajectories([[0.3, 0.6], [0.1]], rewards=[1.0, 0.0], group=[0, 0])
    weights = loaded.estimate(batch).weights * 1024 * 2
    assert torch.allclose(weights, torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64))
    upge.testing.check_algorithm(loaded)
    assert "TopHalf(below=0.4)" in loaded.formula()
    actual = message(lambda: algorithms.load("dr_grpo", [f"{MASK}={{_target_: own_mask.TopHalf, belw: 0.4}}"]))
    assert "algo.terms.rl.estimator.mask.belw" in actual and "did you mean 'below'?" in actual


def test_a_part_without_settings_may_be_a_plain_class(tmp_path, monkeypatch):
    text = OWN.replace("@dataclass(frozen=True)\n", "").replace("    below: float = 0.5\n", "")
    with_file(tmp_path, monkeypatch, "own_plain", text.replace("self.below", "0.5"))
    loaded = algorithms.load("dr_grpo", [f"{MASK}={{_target_: own_plain.TopHalf}}"])
    assert loaded.needs.columns >= {"logprobs"}
    upge.testing.check_algorithm(loaded)


BROKEN = {
    "def f(:\n": ["SyntaxError", "line 1"],
    "\nx = nothing\n": ["NameError", "'nothing'", "line 2"],
    "import not_there\n": ["No module named 'not_there'"],
    "from upge import NotThere\n": ["NotThere"],
    "1 / 0\n": ["ZeroDivisionError", "line 1"],
}


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_users_file_that_cannot_be_imported_is_named(number, tmp_path, monkeypatch):
    text, fragments = list(BROKEN.items())[number]
    with_file(tmp_path, monkeypatch, f"own_broken_{number}", text)
    actual = message(lambda: algorithms.load("grpo", [f"{MASK}={{_target_: own_broken_{number}.Mask}}"]))
    assert f"importing own_broken_{number} failed" in actual and "mask._target_" in actual
    assert all(fragment in actual for fragment in fragments), actual


def test_a_part_that_refuses_its_settings_is_named_by_key(tmp_path, monkeypatch):
    text = OWN.replace('    reads = frozenset({"logprobs"})\n', "")
    with_file(tmp_path, monkeypatch, "own_silent", text)
    actual = message(lambda: algorithms.load("grpo", [f"{MASK}={{_target_: own_silent.TopHalf}}"]))
    assert "algo.terms.rl.estimator.mask" in actual and "reads = frozenset" in actual
