"""Settings that no part accepts and columns that a batch lacks: each error names which."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from upge import ConfigError


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: upge.PPOClip(low=-0.1), ["PPOClip", "low=-0.1"]),
        (lambda: upge.PPOClip(low=1.1), ["PPOClip", "low=1.1", "[0, 1]"]),
        (lambda: upge.PPOClip(high=-0.1), ["PPOClip", "high=-0.1"]),
        (lambda: upge.PPOClip(dual=1.2), ["PPOClip.dual", "1.2", "exceed"]),
        (lambda: upge.PPOClip(low="0.2"), ["PPOClip.low", "'0.2'", "float"]),
        (lambda: upge.PPOClip(high=math.nan), ["PPOClip.high", "nan"]),
        (lambda: upge.PPOClip(high=True), ["PPOClip.high", "True"]),
        (lambda: upge.SequenceClip(high=-1.0), ["SequenceClip", "high=-1.0"]),
        (lambda: upge.ImportanceBand(2.0, 1.0), ["ImportanceBand", "low=2.0", "high=1.0"]),
        (lambda: upge.ImportanceBand(0.0, 0.0), ["ImportanceBand", "high=0.0"]),
        (lambda: upge.ImportanceBand(of="smpler"), ["ImportanceBand.of", "'smpler'", "did you mean 'sampler'"]),
        (lambda: upge.AllOf([upge.NoMask()]), ["AllOf.masks", "list", "tuple"]),
        (lambda: upge.AllOf((upge.UnitDenominator(),)), ["AllOf.masks", "StabilizationMask"]),
        (lambda: upge.ClippedBehaviorPolicy(high=0.0), ["ClippedBehaviorPolicy", "high=0.0"]),
        (lambda: upge.ClippedBehaviorPolicy(low=-1.0), ["ClippedBehaviorPolicy", "low=-1.0"]),
        (lambda: upge.ClippedBehaviorPolicy(high=1.0, low=1.5), ["ClippedBehaviorPolicy", "low=1.5", "high=1.0"]),
        (lambda: upge.SamplerCorrected(upge.BehaviorPolicy(), cap=0.0), ["SamplerCorrected.cap", "0.0"]),
        (lambda: upge.ClippedBehaviorPolicy(high=0.28), ["ClippedBehaviorPolicy", "high=0.28", "ratio itself", "1.28"]),
        (lambda: upge.ClippedBehaviorPolicy(high=None, low=1.1), ["ClippedBehaviorPolicy", "low=1.1", "low <= 1"]),
        (lambda: upge.SamplerCorrected(upge.BehaviorPolicy(), cap=0.1), ["SamplerCorrected.cap", "0.1", "1 or more"]),
        (lambda: upge.SamplerCorrected(upge.NoMask()), ["SamplerCorrected.denominator", "ReferenceDenominator"]),
        (lambda: upge.SamplerCorrected(upge.BehaviorPolicy(), level="group"), ["SamplerCorrected.level", "'group'"]),
        (lambda: upge.SequenceSamplerBand(high=0.001), ["SequenceSamplerBand", "high=0.001", "low <= 1 <= high"]),
        (lambda: upge.SequenceSamplerBand(low=1.1), ["SequenceSamplerBand", "low=1.1"]),
        (lambda: upge.SequenceSamplerBand(mean="arithmetic"), ["SequenceSamplerBand.mean", "'arithmetic'"]),
        (lambda: upge.OverlongShaped(upge.GAE(), limit=0), ["OverlongShaped", "limit=0"]),
        (lambda: upge.OverlongShaped(upge.GAE(), 9, buffer=0.0), ["OverlongShaped", "buffer=0.0", "(0, 1]"]),
        (lambda: upge.OverlongShaped(upge.GAE(), 9, penalty=-1.0), ["OverlongShaped", "penalty=-1.0"]),
        (lambda: upge.ShapedLikelihood(gamma=0.0), ["ShapedLikelihood.gamma", "0.0", "positive"]),
        (lambda: upge.ShapedRatio(beta=0.0), ["ShapedRatio.beta", "0.0", "positive"]),
        (lambda: upge.GroupRelative(epsilon=-1e-6), ["GroupRelative.epsilon", "-1e-06"]),
        (lambda: upge.GroupRelative(baseline="all"), ["GroupRelative.baseline", "'all'", "rollouts"]),
        (lambda: upge.GroupRelative(normalize_std=1), ["GroupRelative.normalize_std", "bool"]),
        (lambda: upge.GAE(discount=1.5), ["GAE", "discount=1.5"]),
        (lambda: upge.GAE(lam=-0.1), ["GAE", "lam=-0.1"]),
        (lambda: upge.PairwisePreference(beta=0.0), ["PairwisePreference.beta", "0.0"]),
        (lambda: upge.KLShaped(upge.NoMask()), ["KLShaped.advantage", "AdvantageEstimator"]),
        (lambda: upge.KLPenalty(0.1, upge.TokenMean(), kind="k4"), ["KLPenalty.kind", "'k4'"]),
        (lambda: upge.UnifiedGradient(upge.NoMask(), upge.NoMask(), upge.GAE()), ["UnifiedGradient.denominator"]),
        (lambda: upge.PassRateAbove(1.5), ["PassRateAbove.threshold", "1.5", "between 0 and 1"]),
        (lambda: upge.PassRateAtMost(-0.1), ["PassRateAtMost.threshold", "-0.1"]),
        (lambda: upge.PassRateAtMost(math.nan), ["PassRateAtMost.threshold", "nan"]),
        (lambda: upge.PassRateTable((0.0, 0.5), (1.0,)), ["PassRateTable", "rates=[0.0, 0.5]", "coefficients=[1.0]"]),
        (lambda: upge.PassRateTable((0.5, 0.5), (1.0, 2.0)), ["PassRateTable", "increasing order"]),
        (lambda: upge.PassRateTable((), ()), ["PassRateTable", "rates=[]"]),
        (lambda: upge.PassRateTable((0.0, "1"), (1.0, 2.0)), ["PassRateTable.rates", "'1'"]),
        (lambda: upge.EntropyWeight(sign=0), ["EntropyWeight.sign", "0", "-1, 1"]),
        (lambda: upge.Schedule(warmup=-1), ["Schedule", "warmup=-1"]),
        (lambda: upge.Schedule(decay=-1), ["Schedule", "decay=-1"]),
        (lambda: upge.Schedule(warmup=1.5), ["Schedule.warmup", "1.5", "int"]),
        (lambda: upge.ProductOf((upge.NoMask(),)), ["ProductOf.gates", "Gate"]),
        (lambda: upge.FixedLength(0), ["FixedLength.length", "0", "at least 1"]),
        (lambda: upge.QuestionMean(tokens="fixed"), ["QuestionMean", "length=None", "needs `length`"]),
        (lambda: upge.QuestionMean(length=5), ["QuestionMean", "tokens='mean'", "length=5"]),
        (lambda: upge.TokenMean(over="all"), ["TokenMean.over", "'all'", "'term', 'batch'"]),
        (lambda: upge.SequenceMean(tokens="fixed"), ["SequenceMean.tokens", "'fixed'"]),
    ],
)
def test_bad_settings_are_refused_by_name(make, fragments):
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("part", "column"),
    [
        (upge.GAE(), "values"),
        (upge.SamplerCorrected(upge.BehaviorPolicy()), "sampler_logprobs"),
        (upge.KLShaped(upge.ConstantAdvantage()), "reference_logprobs"),
        (upge.PairwisePreference(), "preference"),
        (upge.EntropyWeight(), "entropies"),
    ],
)
def test_a_column_that_the_batch_lacks_is_named(part, column):
    batch = trajectories([[0.5]])
    with pytest.raises(ValueError, match=f"{column}: {type(part).__name__} reads it.*pass `{column}="):
        part(part.view(batch))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("preference", torch.tensor([2]), r"preference: found 2; use \+1 for chosen, -1 for rejected, 0 for neither"),
        ("preference", torch.tensor([1.0]), "preference: expected a tensor of integers, found torch.float32"),
        ("logprobs", torch.tensor([[1]]), "logprobs: expected a tensor of floats, found torch.int64"),
        ("rewards", [1.0], r"rewards: expected a tensor, found a list; use torch.tensor\(...\)"),
        ("response_mask", [[True]], "response_mask: expected a tensor, found a list"),
        ("group", None, "group: expected a tensor, found a NoneType"),
    ],
)
def test_a_column_of_the_wrong_kind_is_named(column, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trajectories([[0.5]]), **{column: value})


def test_entropies_go_with_the_log_probs():
    batch = trajectories([[0.5]], entropies=[[1.0]])
    rows = torch.tensor([0])
    assert batch.select(rows).entropies is None
    assert batch.select(rows, batch.logprobs).entropies.tolist() == [[1.0]]


def test_given_columns_may_be_wider_than_the_selection():
    batch = trajectories([[0.5, 0.5, 0.5], [0.25]])
    wide = torch.tensor([[-1.0, float("nan"), -3.0, -4.0]])
    given = upge.Distributions(torch.zeros(1, 4, dtype=torch.long), wide[..., None])
    one = batch.select(torch.tensor([1]), wide, behavior_logprobs=2 * wide, distributions=given)
    assert one.logprobs.tolist() == [[-1.0]] and one.behavior_logprobs.tolist() == [[-2.0]]
    assert one.distributions.policy.shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[1, 3\], found \[1, 2\]"):
        batch.select(torch.tensor([0]), wide[:, :2])


def test_an_estimate_without_log_probs_says_so():
    batch = dataclasses.replace(trajectories([[0.5]]), logprobs=None)
    with pytest.raises(ValueError, match="logprobs: an estimate needs them.*pass `logprobs="):
        algorithms.load("reinforce").estimate(batch)
