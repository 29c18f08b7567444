"""Every component on literal arrays, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import upge
from tests.literal import trajectories


def close(actual: torch.Tensor, expected: list, tolerance: float = 1e-7) -> bool:
    """Equal up to `tolerance`, shapes included."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    return actual.shape == wanted.shape and torch.allclose(actual.double(), wanted, rtol=0, atol=tolerance)


def ratios(*values: float) -> upge.Trajectories:
    """One trajectory whose importance ratios are exactly `values`: the log of each is stored without rounding."""
    logs = [[math.log(v) for v in values]]
    return trajectories(logprobs=logs, behavior_logprobs=[[0.0] * len(values)])


# Masks.


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.1999999, 1.0, 1.0),
        (1.2000001, 1.0, 0.0),
        (1.2000001, -1.0, 1.0),  # back towards the interval
        (0.8000001, -1.0, 1.0),
        (0.7999999, -1.0, 0.0),
        (0.7999999, 1.0, 1.0),
        (5.0, 0.0, 1.0),  # without an advantage nothing is stopped
        (1.0, -1.0, 1.0),
    ],
)
def test_ppo_clip_at_its_borders(ratio, advantage, moves):
    assert upge.PPOClip(0.2, 0.2)(ratios(ratio), torch.tensor([[advantage]])).tolist() == [[moves]]


def test_the_borders_belong_to_the_interval():
    borders = trajectories(logprobs=[[math.log1p(0.2), math.log1p(-0.2)]], behavior_logprobs=[[0.0, 0.0]])
    assert upge.PPOClip(0.2, 0.2)(borders, torch.tensor([[1.0, -1.0]])).tolist() == [[1, 1]]


def test_ppo_clip_with_unequal_sides():
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert upge.PPOClip(low=0.1, high=0.28)(ratios(1.27, 1.29, 0.91, 0.89), advantages).tolist() == [[1, 0, 1, 0]]


def test_ppo_clip_open_below():
    """low = 1 is the interval [0, 1 + high]: no ratio is too small."""
    assert upge.PPOClip(low=1.0)(ratios(1e-30, 2.0), torch.tensor([[-1.0, 1.0]])).tolist() == [[1, 0]]


def test_dual_clip_stops_large_ratios_of_negative_advantages():
    advantages = torch.tensor([[-1.0, -1.0, 1.0, -1.0, -1.0]])
    batch = ratios(2.9999999, 3.0000001, 3.0000001, 0.7, 1.5)
    assert upge.PPOClip(dual=3.0)(batch, advantages).tolist() == [[1, 0, 0, 0, 1]]
    assert upge.PPOClip(dual=None)(batch, advantages).tolist() == [[1, 1, 0, 0, 1]]


def test_sequence_clip_decides_once_for_a_response():
    """s = √(1.5·0.9) = 1.162 and √(1.5·1.0) = 1.225, whatever stands beyond the response."""
    batch = trajectories(
        logprobs=[[math.log(1.5), math.log(0.9), 7.0], [math.log(1.5), 0.0, 7.0], [math.log(0.5), math.log(0.9), 7.0]],
        behavior_logprobs=[[0.0] * 3] * 3,
        mask=[[1, 1, 0]] * 3,
    )
    mask, positive = upge.SequenceClip(0.2, 0.2), torch.ones(3, 3)
    assert mask(batch, positive).tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert mask(batch, -positive).tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_importance_band_drops_both_sides_whatever_the_sign(sign):
    batch = ratios(0.5, 0.4999, 1.0, 5.0, 5.0001)
    assert upge.ImportanceBand(0.5, 5.0)(batch, torch.full((1, 5), sign)).tolist() == [[1, 0, 1, 1, 0]]


def test_importance_band_of_the_sampler_compares_trainer_and_engine():
    batch = trajectories([[0.9, 0.9, 0.9]], p_old=[[0.4, 0.4, 0.4]], p_sampler=[[0.9, 0.4, 0.05]])
    band = upge.ImportanceBand(0.5, 5.0, of="sampler")  # ratios 0.444, 1, 8
    assert band(batch, torch.ones(1, 3)).tolist() == [[0, 1, 0]]


def test_importance_band_asks_for_the_sampler_only_where_it_is_compared():
    assert "sampler_logprobs" in upge.ImportanceBand(of="sampler").columns
    assert "sampler_logprobs" not in upge.ImportanceBand(of="importance").columns


def test_all_of_is_the_product():
    mask = upge.AllOf((upge.NoMask(), upge.PPOClip(), upge.ImportanceBand()))
    assert mask(ratios(1.0, 1.3, 0.4, 6.0), torch.tensor([[1.0, 1.0, 1.0, -1.0]])).tolist() == [[1, 0, 0, 0]]
    assert upge.AllOf(())(ratios(9.0), torch.ones(1, 1)).tolist() == [[1]]


# Denominators; expected are probabilities.


def denominators() -> upge.Trajectories:
    """Ratios 2 and 1 in the first response, 0.25 in the second."""
    return trajectories(
        [[0.5, 0.2], [0.1]], p_old=[[0.25, 0.2], [0.4]], p_sampler=[[0.1, 0.2], [0.5]], p_reference=[[0.5, 0.1], [0.2]]
    )


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        (upge.CurrentPolicy(), [0.5, 0.2, 0.1]),
        (upge.BehaviorPolicy(), [0.25, 0.2, 0.4]),
        (upge.UnitDenominator(), [1.0, 1.0, 1.0]),
        # s = √(2·1) = 1.41421356 and 0.25
        (upge.SequenceBehaviorPolicy(), [0.35355339, 0.14142136, 0.4]),
        # the weight is π_θ/π_ref: 1.2 instead of 2
        (upge.ClippedBehaviorPolicy(high=1.2), [0.41666667, 0.2, 0.4]),
        (upge.ClippedBehaviorPolicy(high=None, low=0.5), [0.25, 0.2, 0.2]),
        (upge.ClippedBehaviorPolicy(high=None, low=None), [0.25, 0.2, 0.4]),
        # π_old/π_sampler = 2.5, 1, 0.8; the first is capped
        (upge.SamplerCorrected(upge.BehaviorPolicy(), cap=2.0), [0.125, 0.2, 0.5]),
        (upge.SamplerCorrected(upge.BehaviorPolicy(), cap=None), [0.1, 0.2, 0.5]),
        (upge.SamplerCorrected(upge.CurrentPolicy(), cap=2.0), [0.25, 0.2, 0.125]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, upge.Component) else "",
)
def test_denominator(denominator, expected):
    batch = denominators()
    assert close(denominator(batch)[batch.response_mask].exp(), expected)


def test_strictly_on_policy_the_behaviour_policy_is_the_current_one():
    batch = trajectories([[0.5, 0.2]])
    for denominator in (upge.BehaviorPolicy(), upge.SequenceBehaviorPolicy(), upge.ClippedBehaviorPolicy()):
        assert close(denominator(batch).exp(), [[0.5, 0.2]])


# Likelihoods.


def test_plain_likelihood_has_no_shape():
    assert upge.PolicyLikelihood()(trajectories([[0.3, 0.9]])).tolist() == [[0.0, 0.0]]


def test_shaped_likelihood_over_one_is_largest_at_gamma():
    """γp/(p+γ)² at p = 0.05, 0.1, 0.2, 1: 2/9, 1/4, 2/9, 10/121."""
    gradient = upge.UnifiedGradient(
        upge.NoMask(), upge.UnitDenominator(), upge.ConstantAdvantage(1.0), upge.ShapedLikelihood(gamma=0.1)
    )
    weight = gradient.weight(trajectories([[0.05, 0.1, 0.2, 1.0]]))
    assert close(weight, [[0.22222222, 0.25, 0.22222222, 0.08264463]])
    beside = gradient.weight(trajectories([[0.0999, 0.1001]]))
    assert bool((beside < 0.25).all()) and bool((beside > 0.2499).all())


def test_shape_of_a_token_that_the_policy_never_takes_is_one_over_gamma():
    assert close(upge.ShapedLikelihood(gamma=0.1)(trajectories([[1e-30]])).exp(), [[10.0]])


def test_a_shaped_ratio_is_largest_at_beta():
    """βr/(r+β)² at r = 0.05, 0.1, 1, 4: 2/9, 1/4, 10/121, 0.4/16.81; strictly on-policy r is 1."""
    gradient = upge.UnifiedGradient(
        upge.NoMask(), upge.BehaviorPolicy(), upge.ConstantAdvantage(1.0), upge.ShapedRatio(beta=0.1)
    )
    batch = trajectories([[0.01, 0.02, 0.2, 0.8]], p_old=[[0.2, 0.2, 0.2, 0.2]])
    assert close(gradient.weight(batch), [[0.22222222, 0.25, 0.08264463, 0.02379536]])
    assert close(gradient.weight(trajectories([[0.3, 0.9]])), [[0.08264463, 0.08264463]])


# Advantages.

DR_GRPO = {1: (0.875, -0.125), 2: (0.75, -0.25), 4: (0.5, -0.5), 7: (0.125, -0.875)}
GRPO = {1: (2.475, -0.354), 2: (1.620, -0.540), 4: (0.935, -0.935), 7: (0.354, -2.475)}


@pytest.mark.parametrize("correct", [1, 2, 4, 7])
@pytest.mark.parametrize(("normalize", "table", "tolerance"), [(False, DR_GRPO, 1e-12), (True, GRPO, 5e-4)])
def test_group_relative_for_eight_rollouts(correct, normalize, table, tolerance):
    batch = trajectories(lengths=[1] * 8, rewards=[1.0] * correct + [0.0] * (8 - correct), group=[5] * 8)
    actual = upge.GroupRelative(normalize_std=normalize)(batch)
    better, worse = table[correct]
    assert close(actual[:, 0], [better] * correct + [worse] * (8 - correct), tolerance)


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_group_relative_without_a_difference_is_zero(reward, normalize):
    batch = trajectories(lengths=[2] * 8 + [1], rewards=[reward] * 8 + [1.0], group=[0] * 8 + [1])
    assert upge.GroupRelative(normalize_std=normalize)(batch).tolist() == [[0.0, 0.0]] * 9


@pytest.mark.parametrize("unbiased", [False, True])
def test_group_relative_without_epsilon_is_zero_where_nothing_differs(unbiased):
    """Also where the mean of equal rewards is none of them in floating point, and for a demonstration beside them."""
    rewards, group = [0.1] * 3 + [1.0] * 4, [0] * 3 + [1] * 3 + [0]
    batch = trajectories(lengths=[1] * 7, rewards=rewards, group=group, demonstrations=[6])
    actual = upge.GroupRelative(epsilon=0.0, unbiased=unbiased)(batch)
    assert actual[:, 0].tolist() == [0.0] * 7


def test_group_relative_keeps_groups_apart_and_takes_any_numbers():
    batch = trajectories(lengths=[1] * 5, rewards=[1.0, 1.0, 0.0, 0.0, 1.0], group=[9, -4, 9, -4, -4])
    third = 0.3333333333
    assert close(upge.GroupRelative(normalize_std=False)(batch)[:, 0], [0.5, third, -0.5, -2 * third, third])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # rollouts 1, 0, 0 and a demonstration of reward 1: means 1/3 and 1/2; variances 1/3, 2/9 and 1/3, 1/4
        ({"normalize_std": False}, [0.66666667, -0.33333333, -0.33333333, 0.66666667]),
        ({"normalize_std": False, "baseline": "group"}, [0.5, -0.5, -0.5, 0.5]),
        ({"epsilon": 0.0}, [1.15470054, -0.57735027, -0.57735027, 1.15470054]),
        ({"epsilon": 0.0, "unbiased": False}, [1.41421356, -0.70710678, -0.70710678, 1.41421356]),
        ({"epsilon": 0.0, "baseline": "group"}, [0.86602540, -0.86602540, -0.86602540, 0.86602540]),
        ({"epsilon": 0.0, "unbiased": False, "baseline": "group"}, [1.0, -1.0, -1.0, 1.0]),
        ({"epsilon": 0.5, "unbiased": False, "baseline": "group"}, [0.5, -0.5, -0.5, 0.5]),
    ],
)
def test_group_relative_baseline_and_deviation(settings, expected):
    batch = trajectories(lengths=[1] * 4, rewards=[1.0, 0.0, 0.0, 1.0], group=[0] * 4, demonstrations=[3])
    assert close(upge.GroupRelative(**settings)(batch)[:, 0], expected)


def test_leave_one_out():
    """Rollouts 1, 0, 0, 1; a demonstration compares with all four; a lone rollout with none."""
    batch = trajectories(
        lengths=[1] * 6, rewards=[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], group=[0] * 5 + [1], demonstrations=[4]
    )
    actual = upge.LeaveOneOut()(batch)[:, 0]
    assert close(actual, [0.66666667, -0.66666667, -0.66666667, 0.66666667, 0.5, 0.0])


@pytest.mark.parametrize(
    ("discount", "lam", "expected"),
    [
        # δ: last 1 - 0.5; third 0.5·0.5 - 0.25; first 0.5·0.25 - 0.5. Then each plus 0.25 times the following.
        (0.5, 0.5, [-0.34375, 0.0, 0.125, 0.5]),
        (0.5, 0.0, [-0.375, 0.0, 0.0, 0.5]),
        (1.0, 1.0, [0.5, 0.0, 0.75, 0.5]),
        (0.0, 1.0, [-0.5, 0.0, -0.25, 0.5]),
    ],
)
def test_gae_skips_the_hole_and_the_padding(discount, lam, expected):
    """Values 0.5, (hole), 0.25, 0.5 and reward 1; a shorter response beside it with value 0.25 and reward -1."""
    batch = trajectories(
        mask=[[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]],
        values=[[0.5, 99.0, 0.25, 0.5, 99.0], [0.25, 99.0, 99.0, 99.0, 99.0]],
        rewards=[1.0, -1.0],
    )
    actual = upge.GAE(discount=discount, lam=lam)(batch)
    assert close(actual, [[*expected, 0.0], [-1.25, 0.0, 0.0, 0.0, 0.0]])


def test_signed_and_constant_advantage():
    batch = trajectories(lengths=[2, 1, 1, 1], rewards=[1.0, 0.0, 0.5, -1.0])
    assert upge.SignedReward()(batch)[:, 0].tolist() == [1.0, -1.0, -1.0, -1.0]
    assert upge.SignedReward(success=0.5, failure=0.0)(batch).tolist() == [[0.5, 0.5], [0, 0], [0, 0], [0, 0]]
    assert upge.ConstantAdvantage(0.25)(batch).tolist() == [[0.25, 0.25]] * 4


def test_pairwise_preference():
    """log-ratio ln 2 of the chosen and -ln 2 of the rejected, beta 0.5: h = ln 2, σ(-h) = 1/3, Â = ±1/6."""
    batch = trajectories(
        [[0.5, 0.5], [0.25], [0.9], [0.5]],
        p_reference=[[0.25, 0.5], [0.5], [0.1], [0.5]],
        group=[3, 3, 3, 8],
        preference=[1, -1, 0, 0],
    )
    actual = upge.PairwisePreference(beta=0.5)(batch)
    assert close(actual, [[0.16666667] * 2, [-0.16666667] * 2, [0.0] * 2, [0.0] * 2])


@pytest.mark.parametrize("preference", [[1, 1, -1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [1, 1, -1, -1]])
def test_pairwise_preference_names_the_group_that_is_no_pair(preference):
    columns = {"p_reference": [[0.5]] * 6, "group": [2, 2, 8, 8, 8, 8], "preference": [1, -1, *preference]}
    batch = trajectories([[0.5]] * 6, **columns)
    with pytest.raises(ValueError, match="group 8 must hold exactly one chosen"):
        upge.PairwisePreference()(batch)


def test_kl_shaped_subtracts_the_log_ratio():
    """1 - 0.1·ln 2 and 1 + 0.1·ln 2."""
    batch = trajectories([[0.5, 0.25]], p_reference=[[0.25, 0.5]])
    actual = upge.KLShaped(upge.ConstantAdvantage(1.0), coefficient=0.1)(batch)
    assert close(actual, [[0.93068528, 1.06931472]])


# Regularizers and the product.


@pytest.mark.parametrize(("kind", "expected"), [("k1", -0.69314718), ("k2", 0.24022651), ("k3", 0.30685282)])
def test_kl_penalty(kind, expected):
    """d = ln(0.5/0.25) = ln 2: -d, d²/2, 2 - d - 1."""
    penalty = upge.KLPenalty(coefficient=1.0, reduction=upge.TokenMean(), kind=kind)
    assert close(penalty(trajectories([[0.25]], p_reference=[[0.5]])), [[expected]])


def test_entropy_bonus_is_minus_the_entropy():
    bonus = upge.EntropyBonus(coefficient=1.0, reduction=upge.TokenMean())
    assert bonus(trajectories(entropies=[[0.5, 2.0]])).tolist() == [[-0.5, -2.0]]


def test_constants_keep_their_precision():
    batch = trajectories([[0.5]])
    assert upge.ConstantAdvantage(0.1)(batch).item() == 0.1 and upge.UnitDenominator()(batch).dtype == torch.float64


def test_the_product_is_one_number_per_token():
    """p/p_old · Â: 1.2 · 0.5 inside; stopped beyond 1.2; and an advantage of 0 is 0 however far the ratio ran away."""
    batch = trajectories([[0.6, 0.8, 1.0]], p_old=[[0.5, 0.5, 1e-300]])
    clipped = upge.UnifiedGradient(upge.PPOClip(0.2, 0.21), upge.BehaviorPolicy(), upge.ConstantAdvantage(0.5))
    assert close(clipped.weight(batch), [[0.6, 0.0, 0.0]])
    nothing = upge.UnifiedGradient(upge.NoMask(), upge.BehaviorPolicy(), upge.ConstantAdvantage(0.0))
    assert nothing.weight(batch).tolist() == [[0.0, 0.0, 0.0]]
