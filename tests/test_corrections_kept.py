"""What a correction is refused on, and that no override undoes one silently."""

from __future__ import annotations

import json

import pytest

import algorithms
import upge
from experiments import config
from tests.test_corrections import message, tree
from upge import ConfigError

ESTIMATOR = "terms.rl.estimator"


# Refused from the start.


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        *((n, "its term 'sft' learns from demonstrations") for n in "hpt hpt_soft superrl chord_mu amft srft".split()),
        *((n, "its term 'offline' learns from demonstrations") for n in "luffy rl_plus hpt_offpolicy".split()),
        ("relift", "its `interleaved_update` gathers questions"),
    ],
)
def test_sampling_does_not_take_away_what_demonstrations_are_for(algorithm, reason):
    said = message(lambda: algorithms.load(algorithm, corrections=["dynamic_sampling"]))
    assert all(f in said for f in [f"to {algorithm}", "sampling would replace", "file of your own", reason]), said


def gated(folder, gate: str) -> str:
    """grpo with another gate, as a file of a user's own."""
    text = (algorithms.FOLDER / "grpo.yaml").read_text()
    (folder / "mine.yaml").write_text(
        text.replace("gate: {_target_: upge.ConstantGate, coefficient: 1.0}", f"gate: {gate}")
    )
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(
    ("gate", "rate"),
    [
        ("{_target_: upge.PassRateAtMost, threshold: 0.5}", "0"),
        ("{_target_: upge.PassRateAbove, threshold: 0.5}", "1"),
        ("{_target_: upge.Complement, gate: {_target_: upge.PassRateBetween, low: 0.2, high: 1.0}}", "0"),
        ("{_target_: upge.PassRateBetween, low: 0.2, high: 0.8}", None),
        ("{_target_: upge.Schedule}", None),
        ("{_target_: upge.EntropyWeight}", None),
    ],
)
def test_a_gate_for_questions_that_sampling_would_replace(gate, rate, tmp_path):
    """One that is closed wherever sampling is, and one that does not look at pass rates, are no contradiction."""
    path = gated(tmp_path, gate)
    if rate is None:
        loaded = algorithms.load(path, corrections=["dynamic_sampling"])
        assert loaded.sampling is not None and loaded.terms["rl"].gate.gates[0] != upge.ConstantGate()
        return
    said = message(lambda: algorithms.load(path, corrections=["dynamic_sampling"]))
    assert f"the gate of its term 'rl' chooses questions by their pass rate and is open at {rate}," in said, said


def test_a_file_of_ones_own_may_sample_as_it_likes(tmp_path):
    text = (algorithms.FOLDER / "hpt.yaml").read_text()
    sampling = "sampling: {_target_: upge.DynamicSampling, gate: {_target_: upge.PassRateAtMost, threshold: 0.5}}\n"
    (tmp_path / "mine.yaml").write_text(text + sampling)
    assert algorithms.load(str(tmp_path / "mine.yaml")).sampling.gate == upge.PassRateAtMost(0.5)


@pytest.mark.parametrize("algorithm", ["reinforce", "srft"])
def test_overlong_is_nothing_for_an_advantage_that_asks_for_success(algorithm):
    said = message(lambda: algorithms.load(algorithm, corrections=["overlong"]))
    assert f"to {algorithm}" in said and "is a SignedReward, which only asks" in said and "GroupRelative" in said
    override = f"{ESTIMATOR}.advantage.advantage={{_target_: upge.SignedReward}}"
    said = message(lambda: algorithms.load("grpo", [override], ["overlong"]))
    assert "nothing for the correction 'overlong'" in said and "SignedReward" in said


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_plus_plus"])
def test_no_response_pays_twice_for_its_kl(algorithm):
    said = message(lambda: algorithms.load(algorithm, corrections=["kl_reward"]))
    place = "terms.rl.estimator.advantage.advantage.reward is a KLPenalizedReward"
    assert f"to {algorithm}" in said and place in said and "coefficient" in said
    reward = "{_target_: upge.KLPenalizedReward, reward: {_target_: upge.OutcomeReward}}"
    inner = f"{{_target_: upge.ReturnToGo, reward: {reward}}}"
    said = message(lambda: algorithms.load("grpo", [f"{ESTIMATOR}.advantage.advantage={inner}"], ["kl_reward"]))
    assert "nothing for the correction 'kl_reward'" in said and "advantage.advantage.reward is a KLPenalized" in said


def test_a_stage_that_cannot_take_it_goes_without(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stages: {a: {algorithm: reinforce}, b: {algorithm: grpo}, c: {algorithm: hpt}}\n")
    stages = algorithms.load(str(path), corrections=["overlong", "dynamic_sampling"]).stages
    assert [s.algorithm.sampling is None for s in stages.values()] == [False, False, True]
    advantages = [s.algorithm.terms["rl"].estimator.advantage for s in stages.values()]
    assert [isinstance(a, upge.OverlongShaped) for a in advantages] == [False, True, True]


# Undone by an override.

DOCUMENTED = (  # in rloo.yaml
    "{_target_: upge.KLShaped, coefficient: 0.05, kind: k1, future: true, advantage: {_target_: upge.LeaveOneOut}}"
)
GATES = "terms.rl.gate.gates"
UNDONE = {
    ("grpo", "tis", f"{ESTIMATOR}.denominator={{_target_: upge.BehaviorPolicy}}"): [
        f"algo.{ESTIMATOR}.denominator: this would leave {ESTIMATOR}.denominator without upge.SamplerCorrected",
        f"algo.{ESTIMATOR}.denominator.denominator={{_target_",
    ],
    ("rloo", "overlong", f"{ESTIMATOR}.advantage={DOCUMENTED}"): [
        "OverlongShaped",
        f"algo.{ESTIMATOR}.advantage.advantage={{_target_",
    ],
    ("grpo", "icepop", f"{ESTIMATOR}.mask={{_target_: upge.PPOClip}}"): ["ImportanceBand", "mask.masks.0={_target_"],
    ("grpo", "icepop", f"{ESTIMATOR}.mask.masks=[{{_target_: upge.PPOClip}}]"): ["ImportanceBand", "mask.masks.0="],
    ("srft", "tis", "terms.negative.estimator.denominator={_target_: upge.CurrentPolicy}"): [
        "algo.terms.negative.estimator.denominator.denominator="
    ],
    ("luffy", "overlong", "terms.offline.estimator.advantage={_target_: upge.GroupRelative}"): [
        "algo.terms.offline.estimator.advantage.advantage="
    ],
    ("ppo", "overlong", "critic.returns={_target_: upge.GAE}"): ["algo.critic.returns.advantage="],
    ("grpo", "tis", "terms={rl: {source: rollouts, estimator: {denominator: {_target_: upge.BehaviorPolicy}}}}"): [
        f"algo.{ESTIMATOR}.denominator.denominator="
    ],
    ("grpo", "tis", "terms.more={source: rollouts, estimator: {denominator: {_target_: upge.BehaviorPolicy}}}"): [
        "algo.terms.more: this would leave terms.more.estimator.denominator without upge.SamplerCorrected"
    ],
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask={{_target_: upge.PPOClip, high: 0.28}}"): ["without upge.PPOClip's dual"],
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask.dual=null"): ["without upge.PPOClip's dual"],
    ("grpo", "kl_k3", "regularizers=null"): ["leave regularizers.kl without upge.KLPenalty"],
    ("grpo", "kl_k3", "regularizers.kl={_target_: upge.EntropyBonus}"): ["without upge.KLPenalty"],
    ("grpo", "dynamic_sampling", "sampling=null"): ["leave sampling without upge.DynamicSampling"],
    ("grpo", "dynamic_sampling", "terms.rl.gate={_target_: upge.ConstantGate}"): ["ProductOf", f"{GATES}.0="],
    ("grpo", "dynamic_sampling", f"{GATES}.1={{_target_: upge.ConstantGate}}"): ["ProductOf", f"{GATES}.0="],
    ("grpo", "dynamic_sampling", "terms.rl.source=demonstrations"): ["nothing for the correction", "no term"],
    ("sft_then_grpo", "tis", f"stages.reinforce.algorithm.{ESTIMATOR}.denominator={{_target_: upge.BehaviorPolicy}}"): [
        f"algo.stages.reinforce.algorithm.{ESTIMATOR}.denominator.denominator="
    ],
    ("sft_then_grpo", "tis", "stages.reinforce.algorithm=sft"): [
        "algo.stages: no stage has the correction 'tis' any more",
        "reinforce: it has no term that learns from rollouts",
    ],
    ("grpo", "tis", "corrected=[]"): ["algo.corrected: `corrected` says", "correction=NAME"],
    ("grpo", "tis", "corrected=null"): ["algo.corrected: `corrected` says"],
    ("grpo", "tis", "corrected.0=icepop"): ["algo.corrected.0: `corrected` says"],
    ("sft_then_grpo", "tis", "stages.reinforce.algorithm.corrected=[]"): ["algorithm.corrected: `corrected` says"],
    ("sft_then_grpo", "tis", "stages.reinforce.algorithm={corrected: [mis], terms: {}}"): ["`corrected` says"],
}


@pytest.mark.parametrize(("algorithm", "correction", "override"), UNDONE)
def test_no_override_undoes_a_correction_silently(algorithm, correction, override):
    said = message(lambda: algorithms.load(algorithm, [override], [correction]))
    assert all(fragment in said for fragment in UNDONE[algorithm, correction, override]), said


def test_an_algorithm_without_corrections_has_no_record_to_write():
    assert "`corrected` says" in message(lambda: algorithms.load("grpo", ["corrected=[tis]"]))
    term = json.dumps(tree("sft")["terms"]["sft"])
    assert "corrected" in algorithms.load("grpo", [f"terms.corrected={term}"]).terms, "but a term may be called so"


CORRECTED = "{_target_: upge.SamplerCorrected, denominator: {_target_: upge.CurrentPolicy}}"
PENALTY = "{_target_: upge.KLPenalty, coefficient: 0.1, reduction: {_target_: upge.TokenMean}}"
KEPT = {
    ("grpo", "tis"): f"{ESTIMATOR}.denominator.denominator={{_target_: upge.CurrentPolicy}}",
    ("grpo", "mis"): f"{ESTIMATOR}.denominator={CORRECTED}",
    ("grpo", "icepop"): f"{ESTIMATOR}.mask.masks.0={{_target_: upge.NoMask}}",
    ("grpo", "dual_clip"): f"{ESTIMATOR}.mask.dual=4",
    ("grpo", "kl_k3"): "regularizers.kl.coefficient=0.04",
    ("grpo", "entropy"): f"regularizers.more={PENALTY}",
    ("grpo", "dynamic_sampling"): f"{GATES}.0={{_target_: upge.Schedule}}",
    ("ppo", "overlong"): "critic=null",
    ("luffy", "overlong"): "terms.offline.estimator.advantage={_target_: upge.ConstantAdvantage}",
}


@pytest.mark.parametrize(("algorithm", "correction"), KEPT)
def test_what_keeps_the_correction_is_allowed(algorithm, correction):
    loaded = algorithms.load(algorithm, [KEPT[algorithm, correction]], [correction])
    assert loaded != algorithms.load(algorithm, corrections=[correction])


def test_a_correction_outside_another_does_not_hide_it():
    """Each finds its part below the other's, and so do the places in messages."""
    override = [f"{ESTIMATOR}.advantage.advantage={{_target_: upge.LeaveOneOut}}"]
    said = message(lambda: algorithms.load("grpo", override, ["kl_reward", "overlong"]))
    assert "'kl_reward'" in said and f"algo.{ESTIMATOR}.advantage.advantage.advantage={{_target_" in said
    deeper = override[0].replace(".advantage=", ".advantage.advantage=")
    part = algorithms.load("grpo", [deeper], ["kl_reward", "overlong"]).terms["rl"].estimator.advantage
    assert part.advantage.advantage == upge.LeaveOneOut()


def test_a_correction_of_ones_own_is_kept_by_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("wrap: {estimator.advantage: {_target_: upge.Tempered, advantage: INNER, temperature: 2.0}}\n")
    override = f"{ESTIMATOR}.advantage={{_target_: upge.LeaveOneOut}}"
    assert "without upge.Tempered" in message(lambda: algorithms.load("grpo", [override], [str(path)]))
    assert tree("grpo", [str(path)])["corrected"] == [str(path)]


def test_new_stages_take_the_corrections_and_only_the_last_state_counts():
    said = ["stages.more={algorithm: dr_grpo}", "stages.reinforce.algorithm=sft"]
    stages = algorithms.load("sft_then_grpo", said, ["tis"]).stages
    assert isinstance(stages["more"].algorithm.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    steps = ["algo.stages.reinforce.algorithm=sft", "algo.stages.demonstrate.algorithm=grpo"]
    composed = config.compose(["algo=sft_then_grpo", "correction=tis", *steps])
    found = composed.algorithm.stages["demonstrate"].algorithm
    assert isinstance(found.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    written = json.dumps(tree("grpo"))
    stages = algorithms.load("sft_then_grpo", [f"stages.third={{algorithm: {written}}}"], ["tis"]).stages
    assert stages["third"].algorithm.terms == stages["reinforce"].algorithm.terms, "also a stage that is written out"


def test_on_the_command_line_it_is_the_same_error():
    for arguments in (
        ["algo=grpo", "correction=tis", f"algo.{ESTIMATOR}.denominator={{_target_: upge.BehaviorPolicy}}"],
        ["algo=sft_then_grpo", "correction=tis", "algo.stages.reinforce.algorithm=sft"],
        ["algo=grpo", "correction=tis", "algo.corrected=[]"],
        ["algo=grpo", "algo.=3"],
    ):
        with pytest.raises(ConfigError, match=r"^algo\."):
            config.compose(arguments)


def test_the_geometric_form_has_no_weight():
    loaded = algorithms.load("grpo", corrections=["mis_geometric"]).terms["rl"].estimator
    assert loaded.denominator == upge.BehaviorPolicy()
    assert loaded.mask.masks[1] == upge.SequenceSamplerBand(0.999, 1.001, "geometric")
