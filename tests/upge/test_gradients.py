"""Compositions against their textbook objectives, in float64, and the invariances of every algorithm."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

import upge
from tests import textbook
from tests.compositions import CONFIGS, load
from tests.literal import trajectories
from tests.policy import sample

OBJECTIVES = {name: getattr(textbook, name) for name in CONFIGS if hasattr(textbook, name)}
OBJECTIVES |= {f"regularised_{kind}": partial(textbook.regularised, kind=kind) for kind in ("k1", "k2", "k3")}


def gradients(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    s = sample(seed)
    (actual,) = torch.autograd.grad(load(name).estimate(s.batch).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(OBJECTIVES[name](s), s.logits)
    return actual, expected


def test_every_composition_has_a_textbook_objective():
    assert set(OBJECTIVES) == set(CONFIGS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_equals_the_textbooks(name, seed):
    actual, expected = gradients(name, seed)
    assert expected.abs().max() > 1e-6, "the objective must have a gradient, else the comparison says nothing"
    assert (actual - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75])
def test_gate_threshold_is_inclusive_for_demonstrations(threshold):
    """A pass rate equal to the threshold learns from the demonstration."""
    algo = load("hpt")
    terms = dict(algo.terms)
    for name, gate in (("rl", upge.PassRateAbove), ("sft", upge.PassRateAtMost)):
        terms[name] = dataclasses.replace(terms[name], gate=gate(threshold))
    s = sample(1, groups=8)
    (actual,) = torch.autograd.grad(upge.Algorithm("x", terms).estimate(s.batch).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(textbook.hpt(s, threshold), s.logits)
    assert (actual - expected).abs().max() <= 1e-10


def test_masks_bite_in_the_comparison():
    """The clip examples would pass with NoMask too if no ratio left its interval; they do leave it."""
    for name in ("gae_ppo", "corrected_ppo", "dual_clip", "banded"):
        share = load(name).estimate(sample(0).batch).metrics["rl/masked_share"]
        assert 0.02 < share < 0.98, (name, share)


def test_strictly_on_policy_needs_no_behaviour_column():
    """Without it the ratio is 1 in value, and the gradient is that of the policy gradient."""
    s = sample(2)
    batch = upge.Trajectories(
        logprobs=s.batch.logprobs,
        response_mask=s.batch.response_mask,
        rewards=s.batch.rewards,
        group=s.batch.group,
        is_demonstration=s.batch.is_demonstration,
    )
    (actual,) = torch.autograd.grad(load("dr_grpo").estimate(batch).loss, s.logits, retain_graph=True)
    rows = [(r, a) for q in s.questions for r, a in textbook.centred(q)]
    (expected,) = torch.autograd.grad(-sum(a * r["logp"].sum() / 1024 for r, a in rows) / len(rows), s.logits)
    assert (actual - expected).abs().max() <= 1e-12


def test_dropped_trajectories_do_not_change_the_gradient():
    """hpt spares the model rollouts of failing questions, demonstrations of the others and groups without signal."""
    s = sample(3)
    plan = load("hpt").plan(s.batch)
    rows = plan.contributing.nonzero()[:, 0]
    assert 0 < len(rows) < len(s.batch)
    rate = s.batch.pass_rate
    rl = ~s.batch.is_demonstration & (rate > 0) & (rate < 1)
    sft = s.batch.is_demonstration & (rate == 0)
    assert torch.equal(plan.contributing, rl | sft)
    width = int(s.batch.lengths[rows].max())
    piece = s.batch.select(rows, s.batch.logprobs[rows, :width])
    (actual,) = torch.autograd.grad(plan.estimate(piece).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(textbook.hpt(s), s.logits)
    assert (actual - expected).abs().max() <= 1e-10


def test_a_runaway_ratio_under_the_mask_is_zero_not_nan():
    s = sample(0)
    behavior = s.batch.behavior_logprobs.clone()
    behavior[:, 0] = -2000.0
    batch = s.batch.select(torch.arange(len(s.batch)), s.batch.logprobs, behavior_logprobs=behavior)
    weights = load("grpo").estimate(batch).weights
    positive = s.batch.rewards[:, None].expand_as(weights) > 0.5
    assert torch.isfinite(weights[positive]).all()
    assert (weights[:, 0][positive[:, 0] & ~s.batch.is_demonstration] == 0).all()


# What stays together, and what must not spoil the rest.


@dataclass(frozen=True)
class BesideTheExpert(upge.AdvantageEstimator):
    """How much likelier the group's demonstrations are: reads rows that no term learns from."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "group", "is_demonstration"})
    reach: ClassVar[str] = "group"

    def __call__(self, batch):
        total = (batch.logprobs.detach().sum(dim=1) * batch.is_demonstration)[None]
        same = batch.group[:, None] == batch.group
        return torch.where(same, total, 0.0).sum(dim=1, keepdim=True).expand(batch.response_mask.shape)


def kept(algorithm: upge.Algorithm, batch: upge.Trajectories) -> tuple[torch.Tensor, upge.Trajectories]:
    rows = algorithm.plan(batch).contributing.nonzero()[:, 0]
    return rows, batch.select(rows, batch.logprobs[rows, : max(1, int(batch.lengths[rows].max()))])


def test_a_part_that_reads_its_group_gets_all_of_it():
    batch = trajectories([[0.5], [0.5], [0.125], [0.5], [0.5]], group=[0, 0, 0, 1, 1], rewards=[1, 0, 1, 0, 0],
                         demonstrations=[2])  # fmt: skip
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), BesideTheExpert())
    gate = upge.PassRateAbove(0.0)
    algorithm = upge.Algorithm("x", {"rl": upge.Term("rollouts", gate, estimator, upge.SequenceMean())})
    rows, piece = kept(algorithm, batch)
    assert rows.tolist() == [0, 1, 2]
    actual = algorithm.plan(batch).estimate(piece).weights
    assert actual[:, 0].tolist() == pytest.approx([-1.03972077, -1.03972077, 0.0], abs=1e-8), "ln(1/8) / 2"


def test_a_pair_with_an_empty_response_stays_a_pair():
    batch = trajectories([[], [0.5]], p_reference=[[], [0.25]], group=[0, 0], preference=[1, -1])
    rows, piece = kept(load("dpo"), batch)
    assert rows.tolist() == [0, 1]
    weights = load("dpo").plan(batch).estimate(piece).weights
    assert torch.equal(weights, load("dpo").estimate(batch).weights) and weights[1, 0] < 0


def test_a_part_of_a_group_is_refused_where_groups_stay_together():
    batch = trajectories(
        [[0.5], [0.25], [0.5], [0.25]], p_reference=[[0.5]] * 4, group=[7, 7, 9, 9], preference=[1, -1] * 2
    )
    plan, (first, second) = load("dpo").plan(batch), torch.arange(4).split(2)
    assert all(plan.estimate(batch.select(rows, batch.logprobs[rows])).weights.any() for rows in (first, second))
    torn = torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="row: the algorithm reads whole groups.* 1 of .* of group 9 are not in this"):
        plan.estimate(batch.select(torn, batch.logprobs[torn]))
    load("grpo").plan(batch).estimate(batch.select(torn, batch.logprobs[torn]))


def test_a_penalty_that_overflows_outside_its_source_is_not_nan():
    """In float32, e^119 is infinite; the demonstration is no matter of a penalty on rollouts."""
    batch = trajectories([[0.5], [0.25], [math.exp(-120)]], p_reference=[[0.5], [0.5], [0.5]], rewards=[1, 0, 1],
                         group=[0, 0, 0], demonstrations=[2])  # fmt: skip
    logprobs = batch.logprobs.float().requires_grad_()
    batch = dataclasses.replace(batch, logprobs=logprobs, reference_logprobs=batch.reference_logprobs.float())
    estimate = upge.Algorithm("x", load("grpo").terms, {"kl": upge.KLPenalty(1.0, upge.TokenMean())}).estimate(batch)
    estimate.loss.backward()
    # k3 has the gradient 1 - e^d: 0 and -1, each over two tokens.
    expected = -estimate.weights[:, 0] + torch.tensor([0.0, -0.5, 0.0])
    assert estimate.loss.isfinite() and torch.allclose(logprobs.grad[:, 0], expected)
    assert estimate.penalties["kl"] == pytest.approx((2 - 1 - math.log(2)) / 2)


def test_an_impossible_token_that_does_not_count_is_not_nan():
    """log 0 in a demonstration of which no term learns, and a runaway ratio and gate there."""
    batch = trajectories([[0.5], [0.25], [0.0]], rewards=[1, 0, 1], group=[0, 0, 0], demonstrations=[2])
    assert load("grpo").estimate(batch).loss.isfinite()
    behind = trajectories([[0.5]] * 3, p_old=[[0.5], [0.5], [1e-320]], rewards=[1, 0, 1], group=[0, 0, 0],
                          demonstrations=[2], entropies=[[0.0], [0.0], [1e4]])  # fmt: skip
    term = load("dr_grpo").terms["rl"]
    for gate in (upge.ConstantGate(), upge.EntropyWeight(scale=1.0, sign=1)):
        estimate = upge.Algorithm("x", {"rl": dataclasses.replace(term, gate=gate)}).estimate(behind)
        assert estimate.weights[:, 0].tolist() == pytest.approx([1 / 4096, -1 / 4096, 0.0]) and estimate.loss.isfinite()


def test_weights_have_at_least_single_precision():
    batch = trajectories([[0.5], [0.5], [0.5]], demonstrations=[0, 1, 2])
    logprobs = batch.logprobs.bfloat16().requires_grad_()
    estimate = load("sft").estimate(dataclasses.replace(batch, logprobs=logprobs))
    estimate.loss.backward()
    assert estimate.weights.dtype == estimate.loss.dtype == torch.float32
    assert estimate.weights[0, 0].item() == torch.tensor(1 / 3).item() and logprobs.grad.dtype == torch.bfloat16


def test_figures_of_a_term():
    """Ratios 1.1, 1.6 (stopped) and 1 with advantages ½, ½, -½; two tokens without a signal. Scales 1/8, 1/8, 1/4, …"""
    batch = trajectories([[0.55, 0.8], [0.5], [0.5], [0.5]], p_old=[[0.5, 0.5], [0.5], [0.5], [0.5]],
                         rewards=[1, 0, 1, 1], group=[0, 0, 1, 1])  # fmt: skip
    estimator = upge.UnifiedGradient(upge.PPOClip(), upge.BehaviorPolicy(), upge.GroupRelative(normalize_std=False))
    term = upge.Term("rollouts", upge.ConstantGate(), estimator, upge.SequenceMean())
    actual = upge.Algorithm("x", {"rl": term}).estimate(batch).metrics
    expected = {"tokens": 5, "trajectories": 4, "advantage_mean": 0.1,
                "weight_abs_mean": 0.21, "weight_abs_p50": 0.0, "weight_abs_p99": 0.55,
                "weight_p1": -0.5, "weight_p10": -0.5, "weight_p50": 0.0, "weight_p90": 0.55, "weight_p99": 0.55,
                "effective_tokens": 1.8445297, "effective_share": 1.8445297 / 5, "effective_trajectories": 1.8445297,
                "masked_share": 1 / 3, "masked_above": 1 / 3, "masked_below": 0.0,
                "extreme_ratio_share": 0.0}  # fmt: skip
    assert actual == pytest.approx({f"rl/{name}": value for name, value in expected.items()}, abs=1e-6)


def test_ratios_outside_one_half_and_two_are_extreme():
    batch = trajectories(
        [[0.9, 0.8], [0.2], [0.5]], p_old=[[0.3, 0.5], [0.5], [0.5]], rewards=[1, 0, 1], group=[0, 0, 0]
    )
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.BehaviorPolicy(), upge.GroupRelative())
    term = upge.Term("rollouts", upge.ConstantGate(), estimator, upge.SequenceMean())
    actual = upge.Algorithm("x", {"rl": term}).estimate(batch).metrics
    assert actual["rl/extreme_ratio_share"] == pytest.approx(2 / 4)  # 3 and 0.4 of 3, 1.6, 0.4, 1


def test_a_plan_moves_with_all_that_it_holds():
    """The device 'meta' stands for an accelerator: it is there on every machine."""
    algorithm = upge.Algorithm("x", load("hpt").terms, {"kl": upge.KLPenalty(1.0, upge.TokenMean())})
    plan = algorithm.plan(sample(0).batch).to("meta")
    term = plan.terms["rl"]
    held = [
        plan.contributing,
        plan.active,
        term.weights,
        term.active,
        term.gate.values,
        term.estimator.advantage.values,
    ]
    assert {tensor.device.type for tensor in [*held, plan.penalties["kl"].scale]} == {"meta"}
    assert set(plan.terms) == {"rl", "sft"} and term.coefficient == 1.0
