"""What a correction is refused on, and that an override changes what it wraps and never the correction itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from omegaconf import OmegaConf

import algorithms
import upge
from experiments import config
from tests.upge.corrections.test_corrections import correction, message, tree
from upge.train.folder import RunFolder

ESTIMATOR = "terms.rl.estimator"


# Refused from the start.


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        *((n, "its term 'sft' learns from demonstrations") for n in "hpt hpt_soft superrl chord_mu amft srft".split()),
        *((n, "its term 'offline' learns from demonstrations") for n in "luffy rl_plus hpt_offpolicy".split()),
        *(
            (name, f"'{term}' learns from the beginnings of demonstrations that its rollouts continue, and sampling")
            for name, term in (("prefix_rft", "prefix"), ("uft", "hint"))
        ),
        ("relift", "its `interleaved_update` collects prompts"),
    ],
)
def test_sampling_does_not_take_away_what_demonstrations_are_for(algorithm, reason):
    said = message(lambda: algorithms.load(algorithm, corrections=["dynamic_sampling"]))
    assert all(f in said for f in [f"to {algorithm}", "sampling would replace", "file of your own", reason]), said


def test_sampling_and_replay_do_not_go_together():
    said = message(lambda: algorithms.load("exgrpo", corrections=["dynamic_sampling"]))
    assert "to exgrpo" in said and "replays earlier rollouts" in said, said


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
    assert f"the gate of its term 'rl' chooses prompts by their pass rate and is open at {rate}," in said, said


def test_a_gate_of_ones_own_says_where_it_is_closed():
    """One that reads rewards and does not say so may be open where sampling is closed."""

    @dataclass(frozen=True)
    class Halves(upge.Gate):
        reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "is_demonstration"})

        def __call__(self, batch):
            return (batch.pass_rate == 0.5).double()

    class Told(Halves):
        def at_pass_rate(self, rate):
            return float(rate == 0.5)

    grpo = algorithms.load("grpo")
    for gate in (Halves(), Told()):
        algorithm = replace(grpo, terms={"rl": replace(grpo.terms["rl"], gate=gate)})
        if isinstance(gate, Told):
            assert upge.corrections.DynamicSampling()(algorithm).sampling is not None
            continue
        with pytest.raises(upge.corrections.NotApplicable, match="open at 0"):
            upge.corrections.DynamicSampling()(algorithm)


def test_a_file_of_ones_own_may_sample_as_it_likes(tmp_path):
    text = (algorithms.FOLDER / "hpt.yaml").read_text()
    sampling = "sampling: {_target_: upge.DynamicSampling, gate: {_target_: upge.PassRateAtMost, threshold: 0.5}}\n"
    (tmp_path / "mine.yaml").write_text(text + sampling)
    assert algorithms.load(str(tmp_path / "mine.yaml")).sampling.gate == upge.PassRateAtMost(0.5)


@pytest.mark.parametrize("algorithm", ["reinforce", "srft"])
def test_overlong_is_nothing_for_an_advantage_that_asks_for_success(algorithm):
    said = message(lambda: algorithms.load(algorithm, corrections=["overlong"]))
    assert f"to {algorithm}" in said and "is a SignedReward, which only checks" in said and "GroupRelative" in said
    override = f"{ESTIMATOR}.advantage={{_target_: upge.SignedReward}}"
    said = message(lambda: algorithms.load("grpo", [override], ["overlong"]))
    assert "'overlong' cannot be applied" in said and "SignedReward" in said


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_plus_plus"])
def test_no_response_pays_twice_for_its_kl(algorithm):
    said = message(lambda: algorithms.load(algorithm, corrections=["kl_reward"]))
    place = "terms.rl.estimator.advantage.advantage.reward is a KLPenalizedReward"
    assert f"to {algorithm}" in said and place in said and "coefficient" in said
    reward = "{_target_: upge.KLPenalizedReward, reward: {_target_: upge.OutcomeReward}}"
    inner = f"{{_target_: upge.ReturnToGo, reward: {reward}}}"
    said = message(lambda: algorithms.load("grpo", [f"{ESTIMATOR}.advantage={inner}"], ["kl_reward"]))
    assert "'kl_reward' cannot be applied" in said and "estimator.advantage.reward is a KLPenalized" in said


def test_a_stage_that_cannot_take_it_goes_without(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stages: {a: {algorithm: reinforce}, b: {algorithm: grpo}, c: {algorithm: hpt}}\n")
    stages = algorithms.load(str(path), corrections=["overlong", "dynamic_sampling"]).stages
    assert [s.algorithm.sampling is None for s in stages.values()] == [False, False, True]
    advantages = [s.algorithm.terms["rl"].estimator.advantage for s in stages.values()]
    assert [isinstance(a, upge.OverlongShaped) for a in advantages] == [False, True, True]


# Overrides of what a correction wraps.

DOCUMENTED = (  # in rloo.yaml
    "{_target_: upge.KLShaped, coefficient: 0.05, kind: k1, future: true, advantage: {_target_: upge.LeaveOneOut}}"
)
PART = "{_target_: upge.SamplerCorrected, denominator: {_target_: upge.CurrentPolicy}}"
PENALTY = "{_target_: upge.KLPenalty, coefficient: 0.1, reduction: {_target_: upge.TokenMean}}"
TERM = (
    "{source: rollouts, gate: {_target_: upge.ConstantGate}, reduction: {_target_: upge.TokenMean}, estimator: {mask: "
    "{_target_: upge.NoMask}, denominator: {_target_: upge.CurrentPolicy}, advantage: {_target_: upge.LeaveOneOut}}}"
)
#: (algorithm, correction, override): each is applied, and the correction on top of it.
WRAPPED = [
    ("grpo", "tis", f"{ESTIMATOR}.denominator={{_target_: upge.CurrentPolicy}}"),
    ("rloo", "overlong", f"{ESTIMATOR}.advantage={DOCUMENTED}"),
    ("grpo", "icepop", f"{ESTIMATOR}.mask={{_target_: upge.NoMask}}"),
    ("grpo", "icepop", f"{ESTIMATOR}.mask={{_target_: upge.AllOf, masks: [{{_target_: upge.PPOClip}}]}}"),
    ("srft", "tis", "terms.negative.estimator.denominator={_target_: upge.UnitDenominator}"),
    ("luffy", "overlong", "terms.offline.estimator.advantage={_target_: upge.GroupRelative}"),
    ("luffy", "overlong", "terms.offline.estimator.advantage={_target_: upge.ConstantAdvantage}"),
    ("ppo", "overlong", "critic.returns={_target_: upge.GAE, lam: 0.5}"),
    ("ppo", "overlong", "critic=null"),
    ("grpo", "tis", f"terms={{rl: {TERM}}}"),
    ("grpo", "tis", f"terms.more={TERM}"),
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask={{_target_: upge.PPOClip, high: 0.28}}"),
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask.low=0.1"),
    ("grpo", "kl_k3", "description=other"),
    ("grpo", "entropy", f"regularizers.more={PENALTY}"),
    ("grpo", "dynamic_sampling", "terms.rl.gate={_target_: upge.Schedule}"),
    ("sft_then_grpo", "tis", f"stages.reinforce.algorithm.{ESTIMATOR}.denominator={{_target_: upge.CurrentPolicy}}"),
    ("sft_then_grpo", "tis", "stages.reinforce.algorithm=dr_grpo"),
]


@pytest.mark.parametrize(("algorithm", "name", "override"), WRAPPED)
def test_an_override_changes_the_part_that_the_correction_wraps(algorithm, name, override):
    plain, corrected = algorithms.load(algorithm, [override]), algorithms.load(algorithm, [override], [name])
    assert plain != algorithms.load(algorithm) and corrected != plain
    assert corrected == correction(name)(plain)


#: (algorithm, correction, override): what the override makes cannot take the correction.
UNFIT = {
    ("grpo", "mis", f"{ESTIMATOR}.denominator={PART}"): [
        "terms.rl.estimator.denominator already has upge.SamplerCorrected"
    ],
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask={{_target_: upge.NoMask}}"): ["no PPOClip"],
    ("grpo", "dual_clip", f"{ESTIMATOR}.mask.dual=4"): ["upge.PPOClip already has dual: 4"],
    ("grpo", "kl_k3", f"regularizers.kl={PENALTY}"): ["regularizers.kl already exists"],
    ("dapo", "dynamic_sampling", "sampling.rounds=3"): ["already has `sampling`"],
    ("grpo", "dynamic_sampling", "terms.rl.source=demonstrations"): ["no term that learns from rollouts"],
    ("sft_then_grpo", "tis", "stages.reinforce.algorithm=sft"): ["no term that learns from rollouts"],
}


@pytest.mark.parametrize(("algorithm", "correction", "override"), UNFIT)
def test_what_an_override_makes_unfit_is_refused(algorithm, correction, override):
    said = message(lambda: algorithms.load(algorithm, [override], [correction]))
    assert f"correction: '{correction}' cannot be applied to {algorithm}: " in said
    assert all(fragment in said for fragment in UNFIT[algorithm, correction, override]), said


@pytest.mark.parametrize(
    "override",
    ["corrected=[]", "corrected=null", "stages.reinforce.algorithm.corrected=[]",
     "stages.reinforce.algorithm.correction={tis: {_target_: upge.corrections.TIS}}"],
)  # fmt: skip
def test_a_correction_is_chosen_by_its_key_alone(override):
    said = message(lambda: algorithms.load("sft_then_grpo", [override], ["tis"]))
    assert said.startswith(f"algo.{override.partition('=')[0]}: ") and "correction=NAME" in said, said


def test_the_tree_of_an_earlier_version_is_refused():
    """It says which corrections it had in `corrected`, and its parts hold them already."""
    node = OmegaConf.create({**tree("grpo"), "corrected": ["tis"]})
    said = message(lambda: algorithms.compose(node, "grpo"))
    assert "algo.corrected" in said and "correction=NAME" in said


def test_an_algorithms_file_names_no_correction(tmp_path):
    text = (algorithms.FOLDER / "grpo.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}correction: {{tis: {{_target_: upge.corrections.TIS}}}}\n")
    assert "algo.correction: " in message(lambda: algorithms.load(str(tmp_path / "mine.yaml")))
    (tmp_path / "all.yaml").write_text("stages: {a: {algorithm: mine.yaml}}\n")
    said = message(lambda: algorithms.load(str(tmp_path / "all.yaml")))
    assert "algo.stages.a.algorithm.correction: " in said
    term = json.dumps(tree("sft")["terms"]["sft"])
    assert "correction" in algorithms.load("grpo", [f"terms.correction={term}"]).terms, "but a term may be called so"


def test_a_correction_outside_another_wraps_it():
    override = [f"{ESTIMATOR}.advantage={{_target_: upge.LeaveOneOut}}"]
    part = algorithms.load("grpo", override, ["kl_reward", "overlong"]).terms["rl"].estimator.advantage
    assert isinstance(part, upge.OverlongShaped) and isinstance(part.advantage, upge.KLShaped)
    assert part.advantage.advantage == upge.LeaveOneOut()


def test_stages_that_an_override_puts_there_take_the_corrections():
    said = ["stages.more={algorithm: dr_grpo}", "stages.reinforce.algorithm=sft"]
    stages = algorithms.load("sft_then_grpo", said, ["tis"]).stages
    assert isinstance(stages["more"].algorithm.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    steps = ["algo.stages.reinforce.algorithm=sft", "algo.stages.demonstrate.algorithm=grpo"]
    composed = config.compose(["algo=sft_then_grpo", "correction=tis", *steps])
    actual = composed.algorithm.stages["demonstrate"].algorithm
    assert isinstance(actual.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    written = json.dumps(tree("grpo"))
    stages = algorithms.load("sft_then_grpo", [f"stages.third={{algorithm: {written}}}"], ["tis"]).stages
    assert stages["third"].algorithm.terms == stages["reinforce"].algorithm.terms, "also a stage that is written out"


def test_on_the_command_line_it_is_the_same_error():
    for arguments, begins in {
        ("algo=sft_then_grpo", "correction=tis", "algo.stages.reinforce.algorithm=sft"): "correction: 'tis' cannot",
        ("algo=grpo", "correction=tis", "algo.corrected=[]"): "algo.corrected: unknown key",
        ("algo=grpo", "correction=tis", "correction.tis.cap=x"): "correction.tis.cap: found 'x'",
        ("algo=grpo", "correction.tis.cap=3"): "correction.tis.cap: there is no correction",
        ("algo=grpo", "algo.=3"): "algo.",
    }.items():
        assert message(lambda given=arguments: config.compose(given)).startswith(begins)


def test_the_limit_of_overlong_follows_the_run():
    given = ["algo=sft_then_grpo", "correction=overlong", "rollout.max_response_tokens=77"]
    actual = config.compose(given).algorithm.stages["reinforce"].algorithm.terms["rl"].estimator.advantage
    assert actual.limit == 77
    actual = config.compose([*given, "correction.overlong.limit=50"]).algorithm.stages["reinforce"].algorithm
    assert actual.terms["rl"].estimator.advantage.limit == 50


def test_a_continued_run_has_the_same_corrections(tmp_path):
    """config.yaml holds them with their settings, so another setting is another run."""
    given = ["algo=grpo", "correction=[tis,overlong]", "correction.tis.cap=3"]
    folder = RunFolder(tmp_path / "run")
    folder.start(config.compose(given).tree, {"command": "", "started": "", "from_step": 0}, continues=False)
    assert folder.different(config.compose(given).tree) == []
    assert folder.different(config.compose([*given, "correction.tis.cap=4"]).tree) == ["algo.correction.tis.cap"]
    assert folder.different(config.compose(["algo=grpo", "correction=tis", "correction.tis.cap=3"]).tree)
    assert folder.different(config.compose(["algo=grpo"]).tree)


def test_the_geometric_form_has_no_weight():
    loaded = algorithms.load("grpo", corrections=["mis_geometric"]).terms["rl"].estimator
    assert loaded.denominator == upge.BehaviorPolicy()
    assert loaded.mask.masks[1] == upge.SequenceSamplerBand(0.999, 1.001, "geometric")
