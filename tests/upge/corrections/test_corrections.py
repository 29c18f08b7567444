"""Corrections: each against its plainly written objective, on the algorithms that can take it, and their grammar."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

import algorithms
import upge
from tests import textbook_corrections
from tests.policy import CASES, changed, guided, sample, with_distributions
from upge import ConfigError
from upge.instantiate import build

ALL = algorithms.corrections()
#: Settings under which a correction bites at the lengths of these tests.
SETTINGS = {
    "overlong": ["correction.overlong.limit=6", "correction.overlong.buffer=0.5", "correction.overlong.penalty=0.75"],
    "sequence_mask": ["correction.sequence_mask.threshold=0.05"],
    "mis_geometric": ["correction.mis_geometric.low=0.9", "correction.mis_geometric.high=1.1"],
}
#: The algorithm that each is compared on, where it is not grpo.
BASES = {"iw_opd": "opd"}
UNFIT = "cannot be applied"
#: They change which prompts are drawn, and nothing of a batch that is there.
DRAWS = {"curriculum"}


@cache
def corrected(name: str) -> upge.Algorithm:
    return algorithms.load(BASES.get(name, "grpo"), SETTINGS.get(name, []), [name])


def correction(name: str, **settings) -> upge.corrections.Correction:
    """What the file of a correction names, with some other settings."""
    node = OmegaConf.to_container(OmegaConf.load(algorithms.find(name, algorithms.CORRECTIONS)), resolve=True)
    del node["description"]
    return build({**node, **settings}, f"correction.{name}", upge.corrections.Correction)


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
    expected += " overlong_filter ratio_kl sequence_mask iw_opd optimal_baseline kl_full curriculum"
    assert sorted(expected.split()) == ALL
    for name in ALL:
        assert hasattr(textbook_corrections, name)
        file = algorithms.find(name, algorithms.CORRECTIONS)
        assert "Choices:" in algorithms.header(file) and OmegaConf.load(file).description


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_the_written_objectives(name, case):
    for seed in (0, 1):
        s = with_distributions(CASES[case](seed, False), seed)
        actual = gradient(corrected(name).estimate(s.batch).loss, s)
        expected = gradient(getattr(textbook_corrections, name)(s), s)
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_the_other_kinds_of_a_full_kl(kind):
    s = with_distributions(sample(0), 0)
    one = algorithms.load("grpo", [f"correction.kl_full.kind={kind}"], ["kl_full"])
    actual = gradient(one.estimate(s.batch).loss, s)
    expected, reverse = (gradient(getattr(textbook_corrections, n)(s), s) for n in (f"kl_full_{kind}", "kl_full"))
    assert (actual - expected).abs().max() <= 1e-10 and (reverse - expected).abs().max() > 1e-6


def test_a_full_kl_is_the_expectation_of_k2s_gradient():
    """On-policy, over the token that is sampled: k2 and the reverse KL, k3 and the forward KL."""
    s = with_distributions(sample(1), 1)
    given = s.batch.distributions
    for sampled, kind in (("kl_k2", "reverse"), ("kl_k3", "forward")):
        full = algorithms.load("grpo", [f"correction.kl_full.kind={kind}"], ["kl_full"]).plan(s.batch).alone("kl")
        plan = algorithms.load("grpo", corrections=[sampled]).plan(s.batch).alone("kl")
        total = torch.zeros_like(s.logits)
        for token in range(s.logits.shape[-1]):
            logprobs, reference = given.policy[..., token], given.reference[..., token]
            leaf = logprobs.detach().requires_grad_()
            batch = dataclasses.replace(s.batch, logprobs=leaf, reference_logprobs=reference)
            (slope,) = torch.autograd.grad(plan.estimate(batch).loss, leaf)
            total += gradient((logprobs.detach().exp() * slope * logprobs).sum(), s)
        expected = gradient(full.estimate(s.batch).loss, s)
        assert (total - expected).abs().max() <= 1e-12 and expected.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("kind=both", ["correction.kl_full", "'both'", "reverse"]),
        ("support={_target_: upge.SampledToken}", ["kl_full", "support", "SampledToken has no distribution"]),
        ("coefficient=.inf", ["coefficient", "finite"]),
    ],
)
def test_settings_of_a_full_kl_that_are_refused(override, parts):
    text = message(lambda: algorithms.load("grpo", [f"correction.kl_full.{override}"], ["kl_full"]))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("name", ALL)
def test_the_comparison_can_fail(name):
    """Each changes the gradient of these batches, so its objective is told apart from the plain one."""
    if name in DRAWS:
        assert corrected(name).sampling is not None and algorithms.load("grpo").sampling is None
        return
    case = "far" if name == "dual_clip" else "ragged"  # where ratios exceed 3
    s = with_distributions(CASES[case](0, False), 0)
    plain = gradient(getattr(textbook_corrections, BASES.get(name, "grpo"))(s), s)
    assert (gradient(corrected(name).estimate(s.batch).loss, s) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("algorithm", algorithms.names())
def test_every_algorithm_takes_a_correction_or_says_why_not(algorithm):
    for name in ALL:
        try:
            actual = algorithms.load(algorithm, corrections=[name])
        except ConfigError as error:
            reasons = ["no term that learns from rollouts", "no PPOClip", "already"]
            special = {
                "dynamic_sampling": ["sampling would replace", "it replays"],
                "overlong": ["success", "reads rewards", "RewardDecoupled"],
                "curriculum": ["its replay"],
            }
            reasons += special.get(name, []) + (["advantage LogRatio"] if name == "iw_opd" else [])
            reasons += ["advantage GroupRelative or LeaveOneOut"] if name == "optimal_baseline" else []
            assert UNFIT in str(error) and any(reason in str(error) for reason in reasons), error
            continue
        assert actual.needs.rollouts
        if name in ("tis", "icepop", "mis", "mis_geometric"):
            assert "sampler_logprobs" in actual.needs.columns
        if "kl" in name:
            assert actual.needs.reference


def test_two_corrections_multiply():
    """The truncated weight and the entropy bonus together are both of them."""
    s = sample(3)
    both = gradient(algorithms.load("grpo", corrections=["tis", "entropy"]).estimate(s.batch).loss, s)
    bonus = gradient(textbook_corrections.entropy(s), s) - gradient(textbook_corrections.grpo(s), s)
    assert (both - gradient(textbook_corrections.tis(s), s) - bonus).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["kl_reward", "overlong", "optimal_baseline"])
def test_a_ranking_by_the_advantage_of_another_term_follows_it(name):
    """KL-Cov ranks by the advantage of its term `rl`. Its penalty has no reward that could be changed."""
    loaded = algorithms.load("kl_cov", corrections=[name])
    plain = algorithms.load("kl_cov").terms
    rl, kl = (loaded.terms[term].estimator for term in ("rl", "kl"))
    assert rl.advantage != plain["rl"].estimator.advantage and kl.mask.advantage == rl.advantage
    assert kl.advantage == plain["kl"].estimator.advantage
    upge.testing.check_algorithm(loaded)


def test_a_penalty_is_no_response_that_has_become_unlikely():
    """KL-Cov's own term has the sign of the ratio in place of an advantage, and the mask asks for Â < 0."""
    plain, loaded = algorithms.load("kl_cov"), algorithms.load("kl_cov", corrections=["sequence_mask"])
    assert loaded.terms["kl"] == plain.terms["kl"] and loaded.terms["rl"] != plain.terms["rl"]
    alone = dataclasses.replace(plain, terms={"kl": plain.terms["kl"]})
    with pytest.raises(upge.corrections.NotApplicable, match="penalties .RatioSign., which do not rate responses"):
        upge.corrections.SequenceMask()(alone)


@pytest.mark.parametrize(("name", "is_filtered"), [("prefix_rft", True), ("uft", False)])
def test_the_prefix_of_a_cut_rollout_is_filtered_where_its_reward_judges_it(name, is_filtered):
    """And imitated as before where its reward is not read. No token that the policy sampled is learned from."""
    batch = guided(sample(0)).batch
    cut = (~batch.finished)[:, None] & batch.response_mask
    shown = cut & batch.is_demonstration_token
    plain, filtered = (algorithms.load(name, corrections=c).estimate(batch).weights for c in ([], ["overlong_filter"]))
    assert plain[shown].abs().sum() > 0 and plain[cut & ~shown].abs().sum() > 0
    assert not filtered[cut & ~shown].any() and bool(filtered[shown].any()) != is_filtered


def test_a_demonstration_is_never_corrected():
    """Sampler log-probs of demonstrations mean nothing; whatever they hold, the gradient is the same."""
    s = sample(0)
    algorithm = algorithms.load("luffy", corrections=["icepop"])
    noise = torch.where(s.batch.is_demonstration[:, None], -50.0, s.batch.sampler_logprobs)
    other = changed(s, sampler_logprobs=noise)
    actual = gradient(algorithm.estimate(other.batch).loss, other)
    assert torch.equal(actual, gradient(algorithm.estimate(s.batch).loss, s))
    assert actual[s.batch.is_demonstration].abs().max() > 0


# The grammar.


def tree(*arguments, **settings) -> dict:
    return OmegaConf.to_container(algorithms.read(*arguments, **settings), resolve=False)


def test_an_override_reaches_a_corrections_setting():
    loaded = algorithms.load("grpo", ["correction.tis.cap=3"], ["tis"])
    assert loaded.terms["rl"].estimator.denominator == upge.SamplerCorrected(upge.BehaviorPolicy(), 3)


def test_an_override_of_a_wrapped_part_is_written_as_without_the_correction():
    loaded = algorithms.load("grpo", ["terms.rl.estimator.mask.high=0.28"], ["icepop"])
    assert loaded.terms["rl"].estimator.mask.masks[0] == upge.PPOClip(high=0.28)


BAD_SETTINGS = {
    "correction.tis.cpa=3": ["correction.tis.cpa", "no setting 'cpa'", "did you mean 'cap'?"],
    "correction.tis.cap=much": ["correction.tis.cap", "'much'", "expected float"],
    "correction.tis.cap=.inf": ["correction.tis: ", "inf", "finite"],
    "correction.tis.level=response": ["correction.tis.level", "'response'", "sequence"],
    "correction.tis.level.deep=1": ["correction.tis.level", "{'deep': 1}"],
    "correction.icepop.low=0.1": ["correction.icepop.low", "the corrections are tis", "correction=icepop"],
    "correction.tis=null": ["correction.tis:", "correction.tis.cap=3"],
    "correction.tis._target_=upge.corrections.Entropy": ["correction.tis._target_:", "correction=NAME"],
    "correction.cap=3": ["correction.cap:", "correction.tis.cap=3"],
    "correction=icepop": ["correction:", "correction=NAME"],
    "correction.tis.cap={_target_: ": ["correction.tis.cap", "cannot be read"],
}


@pytest.mark.parametrize("override", BAD_SETTINGS)
def test_a_bad_setting_of_a_correction_is_one_error_by_its_key(override):
    actual = message(lambda: algorithms.load("grpo", [override], ["tis"]))
    assert actual.startswith("correction") and all(fragment in actual for fragment in BAD_SETTINGS[override]), actual


def test_a_setting_without_its_correction_is_refused():
    actual = message(lambda: algorithms.load("grpo", ["correction.tis.cap=3"]))
    assert "correction.tis.cap: there is no correction; add correction=tis" in actual


def test_corrections_apply_in_their_order():
    outer = algorithms.load("grpo", corrections=["overlong", "kl_reward"]).terms["rl"].estimator.advantage
    assert isinstance(outer, upge.KLShaped) and isinstance(outer.advantage, upge.OverlongShaped)
    outer = algorithms.load("grpo", corrections=["kl_reward", "overlong"]).terms["rl"].estimator.advantage
    assert isinstance(outer, upge.OverlongShaped) and isinstance(outer.advantage, upge.KLShaped)


def test_references_keep_their_meaning():
    """Inside a wrapped part, from beside it, and through two wraps."""
    loaded = algorithms.load("gmpo", ["terms.rl.estimator.mask.high=0.3"], ["icepop", "overlong"]).terms["rl"].estimator
    inner = loaded.denominator.denominator
    assert inner.high == 0.3 == loaded.mask.masks[0].high and inner.low == 0.4
    assert inner.advantage == loaded.advantage, "the sign that the denominator follows is that of the whole advantage"
    assert isinstance(loaded.advantage, upge.OverlongShaped)


def test_the_critic_learns_the_returns_of_the_shaped_reward():
    loaded = algorithms.load("amft", ["correction.overlong.buffer=0.3"], ["overlong", "kl_reward"])
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
    terms = algorithms.load("srft", ["correction.tis.cap=3"], ["tis"]).terms
    assert terms["positive"].estimator.denominator == terms["negative"].estimator.denominator
    assert terms["negative"].estimator.denominator.cap == 3
    assert isinstance(terms["offline"].estimator.denominator, upge.UnitDenominator)
    terms = algorithms.load("luffy", ["correction.overlong.penalty=0.25"], ["overlong"]).terms
    assert terms["offline"].estimator.advantage.penalty == 0.25
    terms = algorithms.load("hpt", corrections=["overlong"]).terms
    assert isinstance(terms["sft"].estimator.advantage, upge.ConstantAdvantage)


def test_one_interval_chooses_prompts_and_counts_them():
    loaded = algorithms.load("grpo", ["correction.dynamic_sampling.gate.high=0.75"], ["dynamic_sampling"])
    assert loaded.sampling == upge.DynamicSampling(upge.PassRateBetween(0.0, 0.75), rounds=10)
    assert loaded.terms["rl"].gate.gates[1] == loaded.sampling.gate


def test_of_a_pipeline_each_stage_that_can_takes_it():
    assert list(tree("sft_then_grpo", ["tis"])["correction"]) == ["tis"]
    stages = algorithms.load("sft_then_grpo", ["stages.reinforce.algorithm=dapo"], ["tis"]).stages
    assert stages["reinforce"].algorithm.name == "dapo", "a stage that is replaced takes the corrections, too"
    assert isinstance(stages["reinforce"].algorithm.terms["rl"].estimator.denominator, upge.SamplerCorrected)
    assert stages["demonstrate"].algorithm == algorithms.load("sft")


def test_a_correction_of_ones_own(tmp_path, monkeypatch):
    path = own(tmp_path, monkeypatch)
    loaded = algorithms.load("dr_grpo", corrections=[path])
    assert loaded.terms["rl"].estimator.advantage == upge.Tempered(upge.GroupRelative(normalize_std=False), 2.0)
    loaded = algorithms.load("dr_grpo", ["correction.mine.temperature=3"], ["tis", path])
    assert loaded.terms["rl"].estimator.advantage.temperature == 3
    assert "'mine' cannot be applied to sft" in message(lambda: algorithms.load("sft", corrections=[path]))
    said = message(lambda: algorithms.load("dr_grpo", ["correction.mine.temperature=-1"], [path]))
    assert said.startswith("correction.mine: Tempered.temperature: -1")


def own(folder, monkeypatch, returned: str = "wrap(algorithm, 'advantage', self.tempered)") -> str:
    """The path of a correction of the user's own, `mine.yaml`, whose class is in the folder that they start from."""
    (folder / "own_correction.py").write_text(OWN.replace("RETURNED", returned))
    (folder / "mine.yaml").write_text("description: x\n_target_: own_correction.Temper\ntemperature: 2.0\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_correction", raising=False)
    return str(folder / "mine.yaml")


OWN = """
from dataclasses import dataclass
import upge
from upge.corrections import Correction, wrap

@dataclass(frozen=True)
class Temper(Correction):
    temperature: float = 1.0

    def tempered(self, inner):
        return upge.Tempered(inner, self.temperature)

    def apply(self, algorithm):
        return RETURNED
"""


def test_a_correction_of_ones_own_that_returns_no_algorithm(tmp_path, monkeypatch):
    path = own(tmp_path, monkeypatch, "None")
    assert "correction.mine: Temper returned None" in message(lambda: algorithms.load("grpo", corrections=[path]))
    assert "correction.mine: " in message(lambda: algorithms.load("sft_then_grpo", corrections=[path]))


BAD_FILES = {
    "wrap: {estimator.mask: {_target_: upge.AllOf, masks: [INNER]}}\n": ["the keys wrap", "no `_target_`", "TIS"],
    "": ["is empty", "no `_target_`"],
    "_target_: upge.corrections.TSI\n": ["correction.mine._target_", "did you mean 'TIS'?"],
    "_target_: upge.PPOClip\n": ["correction.mine", "PPOClip", "expected a Correction"],
    "_target_: upge.corrections.Correction\n": ["correction.mine", "abstract"],
    "_target_: upge.corrections.Overlong\n": ["correction.mine.limit", "missing"],
    "_target_: upge.corrections.TIS\ncap: -1\n": ["correction.mine", "-1"],
    "_target_: upge.corrections.TIS\ncap: ${nowhere}\n": ["correction.mine.cap", "nowhere"],
    "- a\n": ["is not a mapping"],
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
        ("grpo", ["tis", "icepop"], ["'icepop' cannot be applied to grpo", "already has upge.SamplerCorrected"]),
        ("grpo", ["kl_k1", "kl_k3"], ["'kl_k3'", "regularizers.kl already exists"]),
        ("grpo", ["kl_k2", "kl_full"], ["'kl_full'", "regularizers.kl already exists"]),
        ("sft", ["tis"], ["'tis' cannot be applied to sft", "no term that learns from rollouts"]),
        ("gspo", ["dual_clip"], ["'dual_clip' cannot be applied to gspo", "no PPOClip"]),
        ("dapo", ["dynamic_sampling"], ["'dynamic_sampling'", "already has `sampling`"]),
        ("dapo", ["overlong"], ["'overlong'", "already has upge.OverlongShaped"]),
        ("sft_then_grpo", ["tis", "tis"], ["'tis' is given twice"]),
        ("sft_then_grpo", ["dual_clip", "icepop", "mis"], ["'mis' cannot be applied to sft_then_grpo"]),
    ],
)
def test_what_cannot_be_applied_says_so(algorithm, names, fragments):
    actual = message(lambda: algorithms.load(algorithm, corrections=names))
    assert all(fragment in actual for fragment in fragments), actual


# The command line.
