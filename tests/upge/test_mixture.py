"""Demonstrations and rollouts together: their parts, and the weights of each file on a batch worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from upge import ConfigError


def shape(likely: float, unlikely: float, *p: float) -> list[float]:
    return upge.PowerLikelihood(likely, unlikely)(trajectories([p])).exp()[0].tolist()


def mixed(share: float, *p_old: float) -> list[float]:
    batch = trajectories([[0.5] * len(p_old)], p_old=[p_old])
    return upge.MixedBehaviorPolicy(share)(batch).exp()[0].tolist()


# The shape π^likely (1 - π)^unlikely.


def test_powers_of_the_likelihood():
    assert shape(1.0, 1.0, 0.25, 0.5, 0.8) == pytest.approx([0.1875, 0.25, 0.16])
    assert shape(0.0, 0.5, 0.19, 0.36, 0.75) == pytest.approx([0.9, 0.8, 0.5])
    assert shape(2.0, 0.0, 0.5, 0.1) == pytest.approx([0.25, 0.01])
    assert shape(0.0, 0.0, 0.5, 1.0) == [1.0, 1.0]


def test_powers_in_front_of_the_score_function():
    """Over the current policy the shape is the whole weight; over 1 it is multiplied by π once more."""
    batch = trajectories([[0.5, 0.9]])
    for denominator, expected in ((upge.CurrentPolicy(), [0.25, 0.09]), (upge.UnitDenominator(), [0.125, 0.081])):
        gradient = upge.UnifiedGradient(
            upge.NoMask(), denominator, upge.ConstantAdvantage(), upge.PowerLikelihood(1.0, 1.0)
        )
        assert gradient.weight(batch)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_certain_token_weighs_nothing_and_is_finite(dtype):
    """Also where rounding makes its log-prob a little more than 0."""
    batch = trajectories([[1.0, 1.0, 1.0]])
    logprobs = torch.tensor([[0.0, 1e-3, -1e-30]], dtype=dtype)
    actual = upge.PowerLikelihood(1.0, 0.5)(dataclasses.replace(batch, logprobs=logprobs))
    assert bool(actual.isfinite().all()) and bool((actual.double().exp() < 1e-14).all())


def test_a_token_close_to_certain_keeps_its_digits():
    """1 - e^-1e-12 = 1e-12; as a difference of probabilities it would have four correct digits."""
    batch = dataclasses.replace(trajectories([[1.0]]), logprobs=torch.tensor([[-1e-12]], dtype=torch.float64))
    assert upge.PowerLikelihood(0.0, 1.0)(batch).item() == pytest.approx(math.log(1e-12), abs=1e-9)


def test_an_impossible_token():
    batch = dataclasses.replace(
        trajectories([[0.5, 0.5]]), logprobs=torch.tensor([[-40.0, -math.inf]], dtype=torch.float64)
    )
    assert upge.PowerLikelihood(1.0, 1.0)(batch)[0].tolist() == [-40.0, -math.inf]
    assert upge.PowerLikelihood(0.0, 0.5)(batch)[0].tolist() == [0.0, 0.0]


def test_powers_in_print():
    printed = [upge.PowerLikelihood(*p).formula() for p in ((1.0, 1.0), (0.0, 0.5), (0.0, 0.0))]
    assert [f.text for f in printed] == ["π_θ · (1−π_θ) · ∇π_θ", "(1−π_θ)^0.5 · ∇π_θ", "∇π_θ"]
    assert printed[1].latex == r"(1-\pi_\theta)^{0.5}\,\nabla\pi_\theta"


# The denominator share·π_old + 1 - share.


def test_mixture_of_policies():
    assert mixed(0.75, 0.2, 0.6, 1.0) == pytest.approx([0.4, 0.7, 1.0])
    assert mixed(0.0, 0.2, 0.6) == pytest.approx([1.0, 1.0])
    assert mixed(1.0, 0.2, 0.6) == pytest.approx([0.2, 0.6])


def test_mixture_as_its_paper_writes_the_ratio():
    """2π/(π_old + ω) with ω = (π_old + 1)/2, at π = 0.3 and π_old = 0.1: 0.6/0.65."""
    batch = trajectories([[0.3]], p_old=[[0.1]])
    gradient = upge.UnifiedGradient(upge.NoMask(), upge.MixedBehaviorPolicy(), upge.ConstantAdvantage())
    assert gradient.weight(batch).item() == pytest.approx(0.6 / 0.65)


def test_mixture_where_the_old_policy_underflows():
    """e^-800 is 0 in float64: the mixture is ¼ all the same, and with share 1 the logarithm is kept."""
    batch = dataclasses.replace(trajectories([[0.5]]), behavior_logprobs=torch.tensor([[-800.0]], dtype=torch.float64))
    assert upge.MixedBehaviorPolicy(0.75)(batch).exp().item() == pytest.approx(0.25)
    assert upge.MixedBehaviorPolicy(1.0)(batch).item() == -800.0


def test_mixture_strictly_on_policy():
    assert upge.MixedBehaviorPolicy()(trajectories([[0.2]])).exp().item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: upge.PowerLikelihood(-1.0, 0.0), ["PowerLikelihood", "likely=-1.0", "denominator"]),
        (lambda: upge.PowerLikelihood(0.0, -0.5), ["PowerLikelihood", "unlikely=-0.5", "negative"]),
        (lambda: upge.MixedBehaviorPolicy(1.5), ["MixedBehaviorPolicy.share", "1.5", "between 0"]),
        (lambda: upge.MixedBehaviorPolicy(-0.1), ["MixedBehaviorPolicy.share", "-0.1"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, fragments):
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


# The files. Rows of a question: its rollouts, then its demonstration.


def weights(name: str, batch: upge.Trajectories, *overrides: str) -> list[list[float]]:
    """The number in front of every token's ∇log π_θ."""
    actual = algorithms.load(name, overrides).estimate(batch).weights
    return [row[:n].tolist() for row, n in zip(actual, batch.lengths.tolist(), strict=True)]


def assert_weights(name: str, batch: upge.Trajectories, expected: list[list[float]], *overrides: str) -> None:
    actual = weights(name, batch, *overrides)
    for row, numbers in zip(actual, expected, strict=True):
        assert row == pytest.approx(numbers, rel=1e-5, abs=1e-12), (actual, expected)


def union(p_demonstration: float, *, solved: bool = False) -> upge.Trajectories:
    """Rewards 1, 0 and 1 for the demonstration: Â = 1/3, -2/3, 1/3; ratios 1.25 and 1. `solved` adds a question without
    a signal."""
    p, old = [[0.5], [0.25], [p_demonstration]], [[0.4], [0.25], [0.2]]
    rewards, group = [1.0, 0.0, 1.0], [0, 0, 0]
    if solved:
        p, old, rewards, group = p + [[0.5]] * 3, old + [[0.5]] * 3, rewards + [1.0] * 3, group + [1] * 3
    return trajectories(p, p_old=old, rewards=rewards, group=group, demonstrations=[2, 5][: len(group) // 3])


SHORT = ("terms.rl.reduction.length=10", "terms.offline.reduction.length=10")


def test_luffy():
    """The demonstration's token at p = γ has the shape's largest weight, ¼; N·length = 30."""
    assert_weights("luffy", union(0.1), [[1.25 / 90], [-2 / 90], [0.25 / 90]], *SHORT)


def test_rl_plus():
    """0.36/(0.75·0.2 + 0.25)·√0.64 = 0.9·0.8."""
    assert_weights("rl_plus", union(0.36), [[1.25 / 90], [-2 / 90], [0.72 / 90]], *SHORT)


@pytest.mark.parametrize(("name", "last"), [("luffy", 0.25), ("rl_plus", 0.72)])
def test_trajectories_without_a_signal_count_in_the_shared_divisor(name, last):
    batch = union(0.1 if name == "luffy" else 0.36, solved=True)
    assert_weights(name, batch, [[1.25 / 180], [-2 / 180], [last / 180], [0.0], [0.0], [0.0]], *SHORT)
    plan = algorithms.load(name).plan(batch)
    assert plan.active.all() and plan.contributing.tolist() == [True] * 3 + [False] * 3


def test_srft():
    """Entropies ln 3 in the rollouts, ln 2 in the demonstration, whose p is 0.2; std of (1, 0, 1) is 1/√3, so Â = 1/√3.

    Positive: 0.1·3/2. Negative: -1/2. Demonstration: 0.5/2 imitated, 0.2/√3 reinforced.
    """
    ln2, ln3 = math.log(2), math.log(3)
    batch = trajectories(
        [[0.5], [0.25], [0.2]], entropies=[[ln3], [ln3], [ln2]], rewards=[1.0, 0.0, 1.0], group=[4] * 3,
        demonstrations=[2],
    )  # fmt: skip
    assert_weights("srft", batch, [[0.15], [-0.5], [0.25 + 0.2 / math.sqrt(3)]])


def test_srft_has_no_gradient_through_its_entropies():
    batch = union(0.2)
    entropies = torch.full((3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    batch = dataclasses.replace(batch, entropies=entropies, logprobs=batch.logprobs.requires_grad_())
    assert not algorithms.load("srft").estimate(batch).terms["sft"].gate.requires_grad
    algorithms.load("srft").estimate(batch).loss.backward()
    assert entropies.grad is None


@pytest.mark.parametrize(
    ("successes", "alpha", "beta"),
    [(0, 0.0, 1.0), (1, 0.125, 0.5), (2, 0.25, 0.25), (3, 0.5, 0.125), (4, 1.0, 0.0), (6, 1.0, 0.0), (7, 1.0, 0.0)],
)
def test_hpt_soft(successes, alpha, beta):
    """One question of seven rollouts and a demonstration of two tokens: α·Â/(7·10), and β/2 for each of its tokens."""
    batch = trajectories(
        [[0.5]] * 7 + [[0.5, 0.5]], p_old=[[0.5]] * 7 + [[0.5, 0.5]],
        rewards=[1.0] * successes + [0.0] * (7 - successes) + [1.0], group=[0] * 8, demonstrations=[7],
    )  # fmt: skip
    won, lost = alpha * (1 - successes / 7) / 70, -alpha * successes / 7 / 70
    expected = [[won]] * successes + [[lost]] * (7 - successes) + [[beta / 2] * 2]
    assert_weights("hpt_soft", batch, expected, "terms.rl.reduction.length=10")


def test_hpt_soft_averages_over_all_questions():
    """Question 0 fails, question 1 has one of two: P = ½ lies midway between 3 and 4 of 7, so α = ¾ and β = 1/16."""
    expected = [[0.0], [0.0], [0.25, 0.25], [0.75 / 80], [-0.75 / 80], [1 / 64, 1 / 64]]
    assert_weights("hpt_soft", failing_and_half(), expected, "terms.rl.reduction.length=10")


def failing_and_half() -> upge.Trajectories:
    """Question 0 fails, question 1 has a success among two; its demonstration has two tokens at 0.1."""
    p = [[0.5], [0.5], [0.1, 0.1], [0.5], [0.5], [0.5, 0.5]]
    return trajectories(
        p, p_old=p, rewards=[0.0, 0.0, 1.0, 1.0, 0.0, 1.0], group=[0] * 3 + [1] * 3, demonstrations=[2, 5]
    )


def test_hpt_offpolicy():
    """Two questions: ¼/(2·10) for each token of the demonstration, ±½/(2·2·10) for the rollouts."""
    expected = [[0.0], [0.0], [0.0125, 0.0125], [0.0125], [-0.0125], [0.0, 0.0]]
    assert_weights("hpt_offpolicy", failing_and_half(), expected, *SHORT)


def test_superrl():
    """Two questions: 1/(2·2) for each token of the demonstration, ±(1/√2)/(2·2) for the rollouts."""
    won = math.sqrt(0.5) / 4
    expected = [[0.0], [0.0], [0.25, 0.25], [won], [-won], [0.0, 0.0]]
    assert_weights("superrl", failing_and_half(), expected)
    clipped = dataclasses.replace(failing_and_half(), behavior_logprobs=failing_and_half().logprobs - math.log(1.21))
    assert_weights("superrl", clipped, [[0.0], [0.0], [0.25, 0.25], [0.0], [-won * 1.21], [0.0, 0.0]])


@pytest.mark.parametrize(("step", "mu"), [(0, 0.9), (100, 0.475), (200, 0.05), (900, 0.05)])
def test_chord_mu(step, mu):
    """Four rollout tokens, four of demonstrations."""
    won, batch = math.sqrt(0.5) / 4, dataclasses.replace(failing_and_half(), step=step)
    expected = [[0.0], [0.0], [mu / 4] * 2, [(1 - mu) * won], [-(1 - mu) * won], [mu / 4] * 2]
    assert_weights("chord_mu", batch, expected)


def test_chord_phi():
    """φ = 0.09 at 0.1 and 0.25 at 0.5, times μ = 0.1 over four tokens."""
    won = 0.9 * math.sqrt(0.5) / 4
    expected = [[0.0], [0.0], [0.00225] * 2, [won], [-won], [0.00625] * 2]
    assert_weights("chord_phi", failing_and_half(), expected)


@pytest.mark.parametrize(
    ("name", "override", "share"),
    [
        ("chord_mu", "terms.sft.gate.peak=0.5", 0.5),
        ("chord_mu", "terms.sft.gate={_target_: upge.ConstantGate, coefficient: 0.3}", 0.3),
        ("chord_phi", "terms.sft.gate.coefficient=0.2", 0.2),
        ("amft", "terms.sft.gate.start=0.6", 0.6),
        ("gac", "terms.sft.gate.start=0.6", 0.6),
    ],
)
def test_one_override_moves_both_ends_of_a_balance(name, override, share):
    loaded, batch = algorithms.load(name, [override]), failing_and_half()
    assert loaded.terms["sft"].gate(batch).tolist() == pytest.approx([share] * 6)
    assert loaded.terms["rl"].gate(batch).tolist() == pytest.approx([1 - share] * 6)


def test_amft_follows_its_state():
    """GAE without values is the reward: 0, 0, 1, 0, whitened: mean ¼, variance (9/16 + 3/16)/3 = ¼, so ¾/½ and -¼/½."""
    batch = dataclasses.replace(failing_and_half(), values=torch.zeros(6, 2, dtype=torch.float64), state={"mu": 0.2})
    expected = [[-0.1], [-0.1], [0.05] * 2, [0.3], [-0.1], [0.05] * 2]
    assert_weights("amft", batch, expected)
    loaded = algorithms.load("amft")
    assert loaded.needs.critic and loaded.needs.demonstrations and not loaded.needs.reference
    assert loaded.critic.returns == loaded.terms["rl"].estimator.advantage.advantage
    assert loaded.validation.terms == algorithms.load("sft").terms


def test_relift():
    """The failing question's rollouts count among the four, and its demonstration waits for the interleaved_update."""
    expected = [[0.0], [0.0], [0.0, 0.0], [0.5 / 40], [-0.5 / 40], [0.0, 0.0]]
    assert_weights("relift", failing_and_half(), expected, "terms.rl.reduction.length=10")
    interleaved_update = algorithms.load("relift").interleaved_update
    assert interleaved_update.gate(failing_and_half()).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert (interleaved_update.size, interleaved_update.own_optimizer, interleaved_update.lr_factor) == (128, True, 1.0)
    assert interleaved_update.algorithm.terms == algorithms.load("sft").terms
    bonus = "_target_: upge.EntropyBonus, coefficient: 0.001, source: demonstrations"
    entropy = f"interleaved_update.algorithm.regularizers.entropy={{{bonus}, reduction: {{_target_: upge.TokenMean}}}}"
    loaded = algorithms.load("relift", [entropy])
    assert (
        loaded.interleaved_update.algorithm.regularizers["entropy"].source == "demonstrations"
        and not loaded.regularizers
    )


def test_sft_then_grpo():
    pipeline = algorithms.load("sft_then_grpo")
    assert list(pipeline.stages) == ["demonstrate", "reinforce"]
    for stage, name in zip(pipeline.stages.values(), ("sft", "grpo"), strict=True):
        assert stage.algorithm.terms == algorithms.load(name).terms and (stage.share, stage.lr_factor) == (0.5, 1.0)
    assert [(span.first, span.end) for span in pipeline.spans(10)] == [(0, 5), (5, 10)]
    changed = algorithms.load("sft_then_grpo", ["stages.reinforce.algorithm=dr_grpo", "stages.demonstrate.share=0.25"])
    assert changed.stages["reinforce"].algorithm.terms == algorithms.load("dr_grpo").terms
    assert [(span.first, span.end) for span in changed.spans(9)] == [(0, 3), (3, 9)]
