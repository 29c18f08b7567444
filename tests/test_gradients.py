"""Every algorithm's gradient against the textbook objective, in float64, and its invariances."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import upge
from tests import textbook
from tests.compositions import ALL, load
from tests.policy import sample

OBJECTIVES = {name: getattr(textbook, name) for name in ALL if hasattr(textbook, name)}
OBJECTIVES |= {f"regularised_{kind}": partial(textbook.regularised, kind=kind) for kind in ("k1", "k2", "k3")}


def gradients(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    s = sample(seed, pairs=name == "dpo")
    (found,) = torch.autograd.grad(load(name).estimate(s.batch).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(OBJECTIVES[name](s), s.logits)
    return found, expected


def test_every_algorithm_has_a_textbook_objective():
    assert set(OBJECTIVES) == set(ALL)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_the_textbooks(name, seed):
    found, expected = gradients(name, seed)
    assert expected.abs().max() > 1e-6, "the objective must have a gradient, else the comparison says nothing"
    assert (found - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ALL)
def test_algorithm_conforms(name):
    """Factors multiply to weights; no dependence on split, padding or order; dropped trajectories carry nothing."""
    upge.testing.check_algorithm(load(name))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75])
def test_gate_threshold_is_inclusive_for_demonstrations(threshold):
    """A pass rate equal to the threshold learns from the demonstration."""
    algo = load("hpt")
    terms = dict(algo.terms)
    for name, gate in (("rl", upge.PassRateAbove), ("sft", upge.PassRateAtMost)):
        terms[name] = dataclasses.replace(terms[name], gate=gate(threshold))
    s = sample(1, groups=8)
    (found,) = torch.autograd.grad(upge.Algorithm("x", terms).estimate(s.batch).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(textbook.hpt(s, threshold), s.logits)
    assert (found - expected).abs().max() <= 1e-10


def test_masks_bite_in_the_comparison():
    """The clip examples would pass with NoMask too if no ratio left its interval; they do leave it."""
    for name in ("grpo", "gspo", "dual_clip", "banded"):
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
    (found,) = torch.autograd.grad(load("dr_grpo").estimate(batch).loss, s.logits, retain_graph=True)
    rows = [(r, a) for q in s.questions for r, a in textbook.centred(q)]
    (expected,) = torch.autograd.grad(-sum(a * r["logp"].sum() / 1024 for r, a in rows) / len(rows), s.logits)
    assert (found - expected).abs().max() <= 1e-12


def test_dropped_trajectories_do_not_change_the_gradient():
    """hpt spares the model rollouts of failing questions, demonstrations of the others and groups without signal."""
    s = sample(3)
    plan = load("hpt").plan(s.batch)
    rows = plan.keep.nonzero()[:, 0]
    assert 0 < len(rows) < len(s.batch)
    rate = s.batch.pass_rate
    rl = ~s.batch.is_demonstration & (rate > 0) & (rate < 1)
    sft = s.batch.is_demonstration & (rate == 0)
    assert torch.equal(plan.keep, rl | sft)
    width = int(s.batch.lengths[rows].max())
    piece = s.batch.select(rows, s.batch.logprobs[rows, :width])
    (found,) = torch.autograd.grad(plan.estimate(piece).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(textbook.hpt(s), s.logits)
    assert (found - expected).abs().max() <= 1e-10


def test_a_runaway_ratio_under_the_mask_is_zero_not_nan():
    s = sample(0)
    behavior = s.batch.behavior_logprobs.clone()
    behavior[:, 0] = -2000.0
    batch = s.batch.select(torch.arange(len(s.batch)), s.batch.logprobs, behavior_logprobs=behavior)
    weights = load("grpo").estimate(batch).weights
    positive = s.batch.rewards[:, None].expand_as(weights) > 0.5
    assert torch.isfinite(weights[positive]).all()
    assert (weights[:, 0][positive[:, 0] & ~s.batch.is_demonstration] == 0).all()
