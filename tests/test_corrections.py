"""Corrections: each against its plainly written objective, on the algorithms that can take it, and their grammar."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

import algorithms
import upge
from experiments import config
from tests import textbook_corrections
from tests.policy import CASES, changed, sample
from upge import ConfigError

ALL = algorithms.corrections()
#: Settings under which a correction bites at the lengths of these tests.
SETTINGS = {
    "overlong": [
        "terms.rl.estimator.advantage.limit=6",
        "terms.rl.estimator.advantage.buffer=0.5",
        "terms.rl.estimator.advantage.penalty=0.75",
    ],
    "mis_geometric": ["terms.rl.estimator.mask.masks.1.low=0.9", "terms.rl.estimator.mask.masks.1.high=1.1"],
}
UNFIT = "cannot be applied"


@cache
def corrected(name: str) -> upge.Algorithm:
    return algorithms.load("grpo", SETTINGS.get(name, []), [name])


def gradient(loss, s) -> torch.Tensor:
    return torch.autograd.grad(torch.as_tensor(loss) + 0 * s.logits.sum(), s.logits, retain_graph=True)[0]


def message(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What they do.


def test_every_correction_of_the_list_ships_with_an_objective_and_a_description():
    expected = "tis icepop mis mis_geometric kl_k1 kl_k2 kl_k3 kl_reward entropy dual_clip dynamic_sampling overlong"
    assert sorted(expected.split()) == ALL
    for name in ALL:
        assert hasattr(textbook_corrections, name)
        file = algorithms.find(name, algorithms.CORRECTIONS)
        assert "Choices:" in algorithms.header(file) and OmegaConf.load(file).description


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_the_written_objectives(name, case):
    for seed in (0, 1):
        s = CASES[case](seed, False)
        found = gradient(corrected(name).estimate(s.batch).loss, s)
        expected = gradient(getattr(textbook_corrections, name)(s), s)
        assert (found - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_the_comparison_can_fail(name):
    """Each changes the gradient of these batches, so its objective is told apart from the plain one."""
    case = "far" if name == "dual_clip" else "ragged"  # where ratios exceed 3
    s = CASES[case](0, False)
    plain = gradient(textbook_corrections.grpo(s), s)
    assert (gradient(corrected(name).estimate(s.batch).loss, s) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("algorithm", algorithms.names())
def test_every_algorithm_takes_a_correction_or_says_why_not(algorithm):
    for name in ALL:
        try:
            found = algorithms.load(algorithm, corrections=[name])
        except ConfigError as error:
            reasons = ["no term that learns from rollouts", "no PPOClip", "already"]
            reasons += {"dynamic_sampling": ["sampling would replace"], "overlong": ["success"]}.get(name, [])
            assert UNFIT in str(error) and any(reason in str(error) for reason in reasons), error
            continue
        assert found.needs.rollouts
        if name in ("tis", "icepop", "mis", "mis_geometric"):
            assert "sampler_logprobs" in found.needs.columns
        if name.startswith("kl_"):
            assert found.needs.reference


def test_two_corrections_multiply():
    """The truncated weight and the entropy bonus together are both of them."""
    s = sample(3)
    both = gradient(algorithms.load("grpo", corrections=["tis", "entropy"]).estimate(s.batch).loss, s)
    bonus = gradient(textbook_corrections.entropy(s), s) - gradient(textbook_corrections.grpo(s), s)
    assert (both - gradient(textbook_corrections.tis(s), s) - bonus).abs().max() <= 1e-12


def test_a_demonstration_is_never_corrected():
    """Sampler log-probs of demonstrations mean nothing; whatever they hold, the gradient is the same."""
    s = sample(0)
    algorithm = algorithms.load("luffy", corrections=["icepop"])
    noise = torch.where(s.batch.is_demonstration[:, None], -50.0, s.batch.sampler_logprobs)
    other = changed(s, sampler_logprobs=noise)
    found = gradient(algorithm.estimate(other.batch).loss, other)
    assert torch.equal(found, gradient(algorithm.estimate(s.batch).loss, s))
    assert found[s.batch.is_demonstration].abs().max() > 0


# The grammar.


def tree(*arguments, **settings) -> dict:
    return OmegaConf.to_container(algorithms.read(*arguments, **settings), resolve=False)


def test_an_override_reaches_a_corrections_setting():
    loaded = algorithms.load("grpo", ["terms.rl.estimator.denominator.cap=3"], ["tis"])
    assert loaded.terms["rl"].estimator.denominator == upge.SamplerCorrected(upge.BehaviorPolicy(), 3)
    loaded = algorithms.load("grpo", ["terms.rl.estimator.mask.masks.0.high=0.28"], ["icepop"])
    assert loaded.terms["rl"].estimator.mask.masks[0] == upge.PPOClip(high=0.28)


def test_an_override_of_a_wrapped_setting_says_where_it_is():
    found = message(lambda: algorithms.load("grpo", ["terms.rl.estimator.mask.high=0.28"], ["icepop"]))
    assert "algo.terms.rl.estimator.mask.masks.0.high" in found


def test_corrections_apply_in_their_order():
    outer = algorithms.load("grpo", corrections=["overlong", "kl_reward"]).terms["rl"].estimator.advantage
    assert isinstance(outer, upge.KLShaped) and isinstance(outer.advantage, upge.OverlongShaped)
    outer = algorithms.load("grpo", corrections=["kl_reward", "overlong"]).terms["rl"].estimator.advantage
    assert isinstance(outer, upge.OverlongShaped) and isinstance(outer.advantage, upge.KLShaped)


def test_references_keep_their_meaning():
    """Inside a wrapped part, from beside it, and through two wraps."""
    loaded = (
        algorithms.load("gmpo", ["terms.rl.estimator.mask.masks.0.high=0.3"], ["icepop", "overlong"])
        .terms["rl"]
        .estimator
    )
    inner = loaded.denominator.denominator
    assert inner.high == 0.3 == loaded.mask.masks[0].high and inner.low == 0.4
    assert inner.advantage == loaded.advantage, "the sign that the denominator follows is that of the whole advantage"
    assert isinstance(loaded.advantage, upge.OverlongShaped)


def test_the_critic_learns_the_returns_of_the_shaped_reward():
    loaded = algorithms.load("amft", ["terms.rl.estimator.advantage.advantage.buffer=0.3"], ["overlong", "kl_reward"])
    shaped = loaded.terms["rl"].estimator.advantage.advantage
    assert loaded.critic.returns == upge.OverlongShaped(shaped.advantage.advantage, 1024, 0.3)
    plain, kl = algorithms.load("amft"), algorithms.load("amft", corrections=["kl_reward"])
    assert kl.critic == plain.critic and kl.terms != plain.terms


def test_a_critic_that_follows_a_whole_advantage_follows_it_into_the_wrap(tmp_path):
    """What its values stand for does not change: with a KL penalty beside them they would be live."""
    text = (algorithms.FOLDER / "ppo.yaml").read_text().replace("advantage.advantage}", "advantage}")
    begin, end = text.index("advantage:\n        _target_: upge.Whitened"), text.index("likelihood:")
    (tmp_path / "mine.yaml").write_text(f"{text[:begin]}advantage: {{_target_: upge.GAE}}\n      {text[end:]}")
    loaded = algorithms.load(str(tmp_path / "mine.yaml"), corrections=["kl_reward"])
    assert loaded.critic.returns == upge.GAE() == loaded.terms["rl"].estimator.advantage.advantage


def test_terms_share_the_settings_and_a_compared_demonstration_the_rewards():
    terms = algorithms.load("srft", ["terms.positive.estimator.denominator.cap=3"], ["tis"]).terms
    assert terms["positive"].estimator.denominator == terms["negative"].estimator.denominator
    assert terms["negative"].estimator.denominator.cap == 3
    assert isinstance(terms["offline"].estimator.denominator, upge.UnitDenominator)
    terms = algorithms.load("luffy", ["terms.rl.estimator.advantage.penalty=0.25"], ["overlong"]).terms
    assert terms["offline"].estimator.advantage.penalty == 0.25
    terms = algorithms.load("hpt", corrections=["overlong"]).terms
    assert isinstance(terms["sft"].estimator.advantage, upge.ConstantAdvantage)


def test_one_interval_chooses_prompts_and_counts_them():
    loaded = algorithms.load("grpo", ["sampling.gate.high=0.75"], ["dynamic_sampling"])
    assert loaded.sampling == upge.DynamicSampling(upge.PassRateBetween(0.0, 0.75), rounds=10)
    assert loaded.terms["rl"].gate.gates[1] == loaded.sampling.gate


def test_of_a_pipeline_each_stage_that_can_takes_it():
    read = tree("sft_then_grpo", ["tis"])
    assert read["corrected"] == ["tis"] == read["stages"]["reinforce"]["algorithm"]["corrected"]
    assert "corrected" not in read["stages"]["demonstrate"]["algorithm"]
    stages = algorithms.load("sft_then_grpo", ["stages.reinforce.algorithm=dapo"], ["tis"]).stages
    assert stages["reinforce"].algorithm.name == "dapo", "a stage that is replaced takes the corrections, too"
    assert isinstance(stages["reinforce"].algorithm.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    assert stages["demonstrate"].algorithm == algorithms.load("sft")


def test_a_correction_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("wrap: {estimator.advantage: {_target_: upge.Tempered, advantage: INNER, temperature: 2.0}}\n")
    loaded = algorithms.load("dr_grpo", corrections=[str(path)])
    assert loaded.terms["rl"].estimator.advantage == upge.Tempered(upge.GroupRelative(normalize_std=False), 2.0)


BAD_FILES = {
    "wrap: {estimator.mask: {_target_: upge.NoMask}}\n": ["wrap.estimator.mask", "INNER once"],
    "wrap: {estimator.mask: {a: INNER, b: INNER}}\n": ["INNER once"],
    "wrap: [a]\n": ["wrap is ['a']", "mapping"],
    "refuse: [a]\n": ["refuse is ['a']", "mapping"],
    "wraps: {}\n": ["the key 'wraps'", "did you mean 'wrap'?"],
    "wrap: {estimator.msk: {_target_: upge.AllOf, masks: [INNER]}}\n": ["terms.rl.estimator.msk is missing"],
    "- a\n": ["no mapping"],
    "a: [\n": ["not valid YAML"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_malformed_correction_is_one_error(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        algorithms.load("grpo", corrections=[str(path)])
    assert all(fragment in str(caught.value) for fragment in ("correction", *BAD_FILES[text])), caught.value


@pytest.mark.parametrize(
    ("algorithm", "names", "fragments"),
    [
        ("grpo", ["tsi"], ["'tsi'", "did you mean 'tis'?"]),
        ("grpo", ["absent.yaml"], ["there is no file absent.yaml", "kl_k3"]),
        ("grpo", ["tis", "tis"], ["'tis' is given twice"]),
        ("grpo", ["tis", "icepop"], ["'icepop' cannot be applied to grpo", "SamplerCorrected already"]),
        ("grpo", ["kl_k1", "kl_k3"], ["'kl_k3'", "regularizers.kl is there already"]),
        ("sft", ["tis"], ["'tis' cannot be applied to sft", "no term that learns from rollouts"]),
        ("gspo", ["dual_clip"], ["'dual_clip' cannot be applied to gspo", "no PPOClip"]),
        ("dapo", ["dynamic_sampling"], ["'dynamic_sampling'", "`sampling` already"]),
        ("dapo", ["overlong"], ["'overlong'", "OverlongShaped already"]),
        ("sft_then_grpo", ["tis", "tis"], ["'tis' is given twice"]),
    ],
)
def test_what_cannot_be_applied_says_so(algorithm, names, fragments):
    found = message(lambda: algorithms.load(algorithm, corrections=names))
    assert all(fragment in found for fragment in fragments), found


# The command line.


@pytest.mark.parametrize("text", ["tis,kl_k3", "[tis,kl_k3]", "[tis, kl_k3]"])
def test_the_command_line_takes_a_list(text):
    composed = config.compose(["algo=grpo", f"correction={text}", "algo.terms.rl.estimator.denominator.cap=3"])
    assert composed.names["correction"] == "tis,kl_k3" and composed.tree["algo"]["corrected"] == ["tis", "kl_k3"]
    assert composed.algorithm == algorithms.load("grpo", ["terms.rl.estimator.denominator.cap=3"], ["tis", "kl_k3"])


def test_what_is_written_to_config_yaml_is_complete():
    for arguments in (["algo=ppo", "correction=[overlong,tis]"], ["algo=sft_then_grpo", "correction=icepop"]):
        composed = config.compose([*arguments, "rollout.max_response_tokens=77"])
        written = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(composed.tree)))
        assert algorithms.compose(written.algo, composed.algorithm.name) == composed.algorithm
        assert "${" not in OmegaConf.to_yaml(written) and "77" in composed.algorithm.formula() + repr(composed)


def test_none_is_none_and_a_recipe_may_name_some(tmp_path, monkeypatch):
    assert config.compose(["correction=null"]).algorithm == config.compose([]).algorithm
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("algo: grpo\ncorrection: [tis, entropy]\n")
    plain = config._preset
    monkeypatch.setattr(
        config,
        "_preset",
        lambda g, n: (
            plain(g, n) if g != "recipe" else OmegaConf.to_container(OmegaConf.load(tmp_path / g / f"{n}.yaml"))
        ),
    )
    assert config.compose(["recipe=mine"]).names["correction"] == "tis,entropy"
    assert config.compose(["recipe=mine", "correction="]).names["correction"] is None


@pytest.mark.parametrize("text", ["correction=[3]", "correction={a: b}", "correction=[tis", "correction.cap=2"])
def test_what_is_no_list_of_names_is_refused(text):
    assert message(lambda: config.compose([text])).startswith("correction")
