"""What an algorithm prints and what it needs: formulas, columns, group size, demonstrations."""

from __future__ import annotations

import re

import pytest

import algorithms
import upge
from tests import compositions
from tests.algorithms.test_algorithms import message
from tests.literal import trajectories

# Formulas.

FACTORS = {
    "sft": (["Σ_{τ* demo}", "1/Σ|τ|", "1/π_θ · ∇π_θ"], [r"\frac{1}{\pi_\theta}", r"\nabla\pi_\theta"]),
    "reinforce": (["Σ_{τ~π_old}", "1/(N·1024)", "1/π_θ", "(+1 if R=1 else -1)"], [r"\frac{1}{N\cdot 1024}"]),
    "grpo": (
        ["1/(Q·n·|τ|)", "1[r ≤ 1.2 if A>0; r ≥ 0.8 if A<0]", "1/π_old", "(R − mean R)/(std R + 1e-06)"],
        [r"\mathbb{1}[r\le 1.2", r"\frac{1}{\pi_{old}}", r"\frac{R-\mathrm{mean}R}{\mathrm{std}R+10^{-6}}"],
    ),
    "dr_grpo": (["1/(N·1024)", "1[r ≤ 1.2", "1/π_old", "(R − mean R) · ∇π_θ"], [r"\left(R-\mathrm{mean}R\right)"]),
    "hpt": (
        [
            "1[P > 0] · 1/(Q_all·n_all·1024)",
            "1/π_old · (R − mean R)",
            "1[P ≤ 0] · 1/(Q_all·n_all·|τ|)",
            "[rl]",
            "[sft]",
        ],
        [r"\mathbb{1}[P>0]", r"\mathbb{1}[P\le 0]", r"\sum_{\tau^*}"],
    ),
}


@pytest.mark.parametrize("name", FACTORS)
def test_formula_shows_the_factors(name):
    algorithm = algorithms.load(name)
    for style, fragments in zip(("text", "latex"), FACTORS[name], strict=True):
        printed = algorithm.formula(style)
        assert all(fragment in printed for fragment in fragments), printed


@pytest.mark.parametrize("name", compositions.ALL)
def test_formula_holds_every_factor_once_and_its_braces_balance(name):
    algorithm = compositions.load(name)
    text, latex = algorithm.formula("text"), algorithm.formula("latex")
    assert text.startswith("∇J = ") and latex.startswith(r"\nabla J = ")
    for path, part in algorithm.parts.items():
        if path.split(".")[0] in ("critic", "sampling", "interleaved_update"):
            continue  # no factors of the policy's gradient
        printed = part.formula()
        assert printed.text == "1" or printed.text in text, path
        assert printed.latex == "1" or printed.latex in latex.replace("+ -", "-") or "regularizers" in path, path
    assert len(text.splitlines()) == len(algorithm.terms) + len(algorithm.regularizers)
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0 and len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex))
    assert not re.search(r"\+ [+-]|· ·|\\cdot \\cdot", latex + text)


@pytest.mark.parametrize(
    "first, second",
    [
        (upge.TokenMean(over="term"), upge.TokenMean(over="batch")),
        (upge.SequenceMean(over="term"), upge.SequenceMean(over="batch")),
        (upge.SequenceMean(over="term", tokens="sum"), upge.SequenceMean(over="batch", tokens="sum")),
        (upge.FixedLength(8, over="term"), upge.FixedLength(8, over="batch")),
        (upge.QuestionMean(over="term"), upge.QuestionMean(over="batch")),
        (upge.QuestionMean(over="batch"), upge.QuestionMean(over="batch", within="kind")),
        (upge.QuestionMean(over="term", within="kind"), upge.QuestionMean(over="batch", within="kind")),
        (upge.EntropyBonus(0.1, upge.TokenMean()), upge.EntropyBonus(0.1, upge.TokenMean(), "demonstrations")),
        (upge.KLPenalty(0.1, upge.TokenMean()), upge.KLPenalty(0.1, upge.TokenMean(over="batch"))),
    ],
)
def test_what_is_counted_and_summed_over_is_printed(first, second):
    """Parts that differ only in the trajectories that they count or sum over do not print the same formula."""
    one, other = first.formula(), second.formula()
    assert one.text != other.text and one.latex != other.latex


def test_formula_in_another_style_is_refused():
    actual = message(lambda: algorithms.load("sft").formula("html"))
    assert "'html'" in actual and "'text' or 'latex'" in actual


# What an algorithm needs.

CONFIGURED = ("behavior_logprobs", "sampler_logprobs", "entropies")


def test_needs_are_read_off_the_parts():
    hpt, sft, gae = algorithms.load("hpt").needs, algorithms.load("sft").needs, compositions.load("gae_ppo").needs
    assert (hpt.rollouts, hpt.demonstrations, hpt.group_size, hpt.critic, hpt.reference) == (
        True,
        True,
        2,
        False,
        False,
    )
    assert (sft.rollouts, sft.demonstrations, sft.group_size) == (False, True, 1)
    assert gae.critic and gae.group_size == 1 and not gae.demonstrations
    dpo = compositions.load("dpo").needs
    assert dpo.preference_pairs and dpo.reference and not dpo.rollouts
    assert compositions.load("dpo").reach == "group" and compositions.load("gspo").reach == "trajectory"
    assert algorithms.load("grpo").reach == "token"


@pytest.mark.parametrize("name", ["hpt", "grpo", "dr_grpo"])
def test_one_rollout_per_prompt_is_refused_where_groups_are_compared(name):
    actual = message(lambda: algorithms.load(name).check(group_size=1, provided=CONFIGURED))
    assert "group_size: 1" in actual and "algo.terms.rl." in actual and "2 or more" in actual


def test_a_pass_rate_gate_alone_needs_rollouts_in_groups():
    """Demonstrations where the rollouts fail: no term learns from rollouts, the gate still looks at them."""
    gated = algorithms.load("sft", ["terms.sft.gate={_target_: upge.PassRateAtMost}"])
    assert gated.needs.rollouts and gated.needs.group_size == 2
    actual = message(lambda: gated.check(group_size=1))
    assert "group_size: 1" in actual and "algo.terms.sft.gate (PassRateAtMost)" in actual


@pytest.mark.parametrize("name", ["sft", "reinforce"])
def test_one_rollout_per_prompt_is_fine_elsewhere(name):
    assert algorithms.load(name).check(group_size=1, demonstrations=3, provided=CONFIGURED) is None


@pytest.mark.parametrize("name", ["sft", "hpt"])
def test_data_without_demonstrations_are_refused(name):
    actual = message(lambda: algorithms.load(name).check(group_size=8, demonstrations=0, provided=CONFIGURED))
    assert "algo.terms.sft.source: demonstrations" in actual and "has none" in actual and "choose data" in actual
    assert algorithms.load(name).check(group_size=8, demonstrations=None, provided=CONFIGURED) is None


def test_demonstrations_that_only_a_regularizer_uses_are_missed_too():
    bonus = (
        "{_target_: upge.EntropyBonus, coefficient: 1, source: demonstrations, reduction: {_target_: upge.TokenMean}}"
    )
    loaded = algorithms.load("grpo", [f"regularizers.bonus={bonus}"])
    actual = message(lambda: loaded.check(group_size=8, demonstrations=0, provided=CONFIGURED))
    assert "algo.regularizers.bonus.source: demonstrations" in actual


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("gae_ppo", ["algo.terms.rl.estimator.advantage", "GAE", "['values']", "critic"]),
        ("kl_shaped", ["algo.terms.rl.estimator.advantage", "KLShaped", "['reference_logprobs']"]),
        ("regularised_k3", ["algo.regularizers.kl", "KLPenalty", "['reference_logprobs']"]),
        ("dpo", ["algo.terms.pairs.estimator.advantage", "preference", "reference_logprobs"]),
    ],
)
def test_columns_that_nobody_provides_are_refused(name, fragments):
    algorithm = compositions.load(name)
    actual = message(lambda: algorithm.check(group_size=8, provided=CONFIGURED))
    assert all(fragment in actual for fragment in fragments), actual
    everything = (*CONFIGURED, "values", "reference_logprobs", "preference")
    assert algorithm.check(group_size=8, demonstrations=8, provided=everything) is None


def test_an_estimate_without_a_needed_column_names_it():
    batch = trajectories([[0.5]], rewards=[1.0])
    with pytest.raises(ValueError, match="values: GAE reads it"):
        compositions.load("gae_ppo").estimate(batch)
    with pytest.raises(ValueError, match="preference_pairs needs the column `preference`"):
        compositions.load("dpo").estimate(batch)


def test_an_algorithm_has_at_least_one_term():
    assert "terms is empty" in message(lambda: upge.Algorithm("nothing", {}))


def test_everything_as_a_source_needs_rollouts_and_demonstrations():
    loaded = algorithms.load("reinforce", ["terms.rl.source=all"])
    assert loaded.needs.rollouts and loaded.needs.demonstrations
    actual = message(lambda: loaded.check(group_size=2, demonstrations=0, provided=CONFIGURED))
    assert "algo.terms.rl.source: all" in actual and "has none" in actual
    assert loaded.check(group_size=2, demonstrations=4, provided=CONFIGURED) is None


def test_preference_pairs_as_a_source_need_their_column():
    """Even where no part reads it: the source itself does."""
    loaded = algorithms.load("sft", ["terms.sft.source=preference_pairs"])
    assert "preference" in loaded.needs.columns and not loaded.needs.demonstrations
    actual = message(lambda: loaded.check(group_size=1, provided=CONFIGURED))
    assert "algo.terms.sft.source: preference_pairs" in actual and "`preference`" in actual
    assert loaded.check(group_size=1, provided=(*CONFIGURED, "preference")) is None


def test_the_behaviour_column_may_be_absent():
    assert algorithms.load("grpo").check(group_size=8) is None


def test_the_sign_of_a_negative_coefficient_is_printed_once():
    for penalty, text, latex in (
        (
            upge.EntropyBonus(-0.1, upge.TokenMean()),
            "− Σ_{τ~π_old} 0.1 · 1/Σ|τ| · Σ_t ∇H",
            r"-\sum_{\tau\sim\pi_{old}} 0.1\,",
        ),
        (
            upge.KLPenalty(-0.1, upge.TokenMean()),
            "+ Σ_{τ~π_old} 0.1 · 1/Σ|τ| · Σ_t ∇k3",
            r"+\sum_{\tau\sim\pi_{old}} 0.1\,",
        ),
    ):
        assert penalty.formula().text.startswith(text) and penalty.formula().latex.startswith(latex)
