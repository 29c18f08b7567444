"""Parts that see the advantage, a probability, a whole response or a whole group, with numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import upge
from tests.literal import trajectories
from tests.upge.components.test_components import close, ratios
from upge import ConfigError
from upge.components.returns import discounted_sum

POSITIVE, NEGATIVE = torch.ones(1, 2), -torch.ones(1, 2)


# Shapes that see the advantage.


@dataclass(frozen=True)
class Signed(upge.LikelihoodGradient):
    """f′ = e where Â > 0, else 1."""

    reads = frozenset()
    sees_advantages = True

    def __call__(self, batch, advantages):
        return (advantages > 0).double()


@dataclass(frozen=True)
class Unaware(upge.LikelihoodGradient):
    reads = frozenset()

    def __call__(self, batch):
        return torch.zeros(batch.response_mask.shape)


@dataclass(frozen=True)
class Undeclared(upge.LikelihoodGradient):
    reads = frozenset()

    def __call__(self, batch, advantages):
        return advantages


@dataclass(frozen=True)
class Overdeclared(Unaware):
    sees_advantages = True


def estimator(likelihood, **parts):
    parts = {"mask": upge.NoMask(), "denominator": upge.CurrentPolicy(), "advantage": upge.SignedReward()} | parts
    return upge.UnifiedGradient(**parts, likelihood=likelihood)


def term(likelihood, **parts):
    return upge.Term("rollouts", upge.ConstantGate(), estimator(likelihood, **parts), upge.TokenMean())


def test_a_shape_that_sees_the_advantage_gets_it_after_the_forward_pass():
    """Two tokens, Â = 1 and -1, weights e/2 and -1/2; nothing of the shape is computed before."""
    batch = trajectories([[0.5], [0.5]], rewards=[1.0, 0.0])
    weights = upge.Algorithm("made here", {"rl": term(Signed())}).estimate(batch).weights
    assert close(weights, [[math.e / 2], [-0.5]])
    assert not Signed().is_precomputed() and not Signed().is_live and Unaware().is_precomputed()
    assert isinstance(estimator(Signed()).precompute_parts(batch).likelihood, Signed)
    assert upge.testing.check_component(Signed()) is None


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"likelihood": Undeclared()}, r"estimator.likelihood: Undeclared is called with \(batch\).*sees_advantages"),
        ({"likelihood": Overdeclared()}, r"estimator.likelihood: Overdeclared is called with \(batch, advantages\)"),
    ],
)
def test_a_part_with_another_signature_is_refused(parts, said):
    with pytest.raises(ConfigError, match=said):
        estimator(**parts)
    assert estimator(Unaware()).likelihood == Unaware(), "one with the old signature works"


def test_gamma_shape():
    """W = 2·0.25 = ½: W²·e^{3·½} = 1.12042226 where Â ≥ 0, W³·e^{2·½} = 0.33978523 where Â < 0; 1 on-policy."""
    batch, shape = ratios(2.0, 0.25), upge.GammaLikelihood()
    assert close(shape(batch, POSITIVE).exp(), [[1.12042227, 1.12042227]])
    assert close(shape(batch, torch.tensor([[0.0, -1.0]])).exp(), [[1.12042227, 0.33978523]])
    assert shape(ratios(1.0, 1.0), NEGATIVE).tolist() == [[0.0, 0.0]]
    assert shape(ratios(1e300, 1e300), POSITIVE).exp().tolist() == [[0.0, 0.0]]


# Masks.


@pytest.mark.parametrize(
    ("old", "now", "advantage", "moves"),
    [
        (0.30, 0.449, 1, 1),
        (0.30, 0.451, 1, 0),
        (0.30, 0.451, -1, 1),
        (0.60, 0.4501, -1, 1),
        (0.60, 0.4499, -1, 0),
        (0.001, 0.1, 1, 1),  # a ratio of 100
    ],
)
def test_total_variation_bounds_the_probability(old, now, advantage, moves):
    batch = trajectories([[now]], p_old=[[old]])
    assert upge.DivergenceClip(0.15, 0.15)(batch, torch.tensor([[float(advantage)]])).tolist() == [[moves]]


def test_binary_kl():
    """KL = 0.5·ln(0.5/0.8) + 0.5·ln(0.5/0.2) = 0.22314355, and the step back is allowed."""
    batch = trajectories([[0.8]], p_old=[[0.5]])
    for bound, moves in ((0.2232, 1), (0.2231, 0)):
        mask = upge.DivergenceClip(bound, bound, "kl")
        assert mask(batch, torch.ones(1, 1)).tolist() == [[moves]] and mask(batch, -torch.ones(1, 1)).tolist() == [[1]]
        fallen = trajectories([[0.2]], p_old=[[0.5]])
        assert mask(fallen, -torch.ones(1, 1)).tolist() == [[moves]] and mask(fallen, torch.ones(1, 1)).tolist() == [
            [1]
        ]


def test_off_policy_sequences():
    """mean log(π_old/π_θ) = (ln 4 + ln 1)/2 = 0.693; relative to the sampler (ln 2 + 0)/2 = 0.347."""
    batch = trajectories([[0.2, 0.5]], p_old=[[0.8, 0.5]], p_sampler=[[0.4, 0.5]])
    for part, moves in (
        (upge.OffPolicySequenceMask(0.69), [0, 0]),
        (upge.OffPolicySequenceMask(0.70), [1, 1]),
        (upge.OffPolicySequenceMask(0.34, "sampler"), [0, 0]),
        (upge.OffPolicySequenceMask(0.35, "sampler"), [1, 1]),
    ):
        assert part(batch, NEGATIVE).tolist() == [moves] and part(batch, POSITIVE).tolist() == [[1, 1]]
        assert part(batch, torch.zeros(1, 2)).tolist() == [[1, 1]]
    assert upge.OffPolicySequenceMask().columns == {"logprobs", "behavior_logprobs"}
    assert upge.OffPolicySequenceMask(of="sampler").columns == {"logprobs", "sampler_logprobs"}


# Advantages.


def test_mean_normalized():
    """Mean ¼: 3 and -1; a group that earns nothing or less is left alone; demonstrations do not count in the mean."""
    batch = trajectories(
        [[0.5]] * 8,
        rewards=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0],
        group=[0, 0, 0, 0, 0, 1, 1, 1],
        demonstrations=[4],
    )
    assert upge.MeanNormalized()(batch)[:, 0].tolist() == [3, -1, -1, -1, 3, 0, 0, 0]


def test_optimal_token_baseline():
    """W = 1, 3 and 3 at the first token and 2, 4 at the second, where one response has ended; a hole before a token.

    Baselines (1·1 + 3·0 + 3·1)/7 = 4/7 and (2·1 + 4·0)/6 = ⅓; at the third token there is one rollout alone.
    """
    nan = float("nan")
    batch = trajectories(
        [[0.5] * 4] * 4,
        rewards=[1.0, 0.0, 1.0, 1.0],
        mask=[[1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]],
        group=[0] * 4,
        demonstrations=[3],
        score_norms=[[1.0, 1.0, nan, nan], [3.0, nan, 1.0, 1.0], [3.0, nan, nan, nan], [1.0] * 4],
    )
    mask = batch.response_mask
    first, second = 4 / 7, 1 / 3
    for alone, beyond in (("reward", 1.0), ("zero", 0.0)):
        expected = [1 - first, 1 - second, -first, -second, 0.0, 1 - first, 1 - first, 1 - second, 1.0, beyond]
        assert close(upge.OptimalTokenBaseline(alone)(batch)[mask], expected)
    right = batch.with_rewards(1 - batch.rewards)
    assert upge.OptimalTokenBaseline("reward")(right)[1, 3] == 1 and upge.OptimalTokenBaseline("zero")(right)[1, 3] == 0
    equal = batch.with_rewards(torch.full_like(batch.rewards, 0.1))
    assert (upge.OptimalTokenBaseline("zero")(equal)[:3][mask[:3]] == 0).all()


def test_group_classification():
    """s/τ = ln 4, 0 right and ln 2 wrong (τ = 1, the first of two tokens): ¼/(1 + ¼ + 1), 1/(2.25) and 2/(1 + 2)."""
    batch = trajectories(
        logprobs=[[math.log(16.0), 0.0], [0.0, 0.0], [math.log(2.0), math.log(2.0)], [0.0, 0.0], [0.0, 0.0]],
        behavior_logprobs=[[0.0, 0.0]] * 5,
        rewards=[1.0, 1.0, 0.0, 1.0, 1.0],
        group=[0, 0, 0, 0, 7],
        demonstrations=[3],
    )
    expected = [0.25 / 2.25, 1 / 2.25, -2 / 3, 0.0, 0.0]
    assert close(upge.GroupClassification(1.0)(batch), [[x, x] for x in expected])


def test_a_discounted_sum_skips_tokens_that_do_not_count():
    """1 + ½·(2 + ½·4) = 3, 2 + ½·4 = 4 and 4, with a hole in between."""
    values = torch.tensor([[1.0, 9.0, 2.0, 4.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False]])
    assert discounted_sum(values, mask, 0.5)[mask].tolist() == [3, 4, 4]
    long = torch.rand(3, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loop = [sum(0.9 ** (k - t) * long[:, k] for k in range(t, 77)) for t in range(77)]
    whole = discounted_sum(long, torch.ones(3, 77, dtype=torch.bool), 0.9)
    assert torch.allclose(whole, torch.stack(loop, dim=1), rtol=0, atol=1e-13)


def test_future_kl():
    """γ = ½, log r = ln 1.1, ln 1.21, 0: the sums are ln 1.21, ln 1.21 and 0, within the bound of ln 1.2 and ln 1.3."""
    batch = ratios(1.1, 1.21, 1.0)
    for high, factors in ((1.2, [1.2, 1.2, 1.0]), (1.3, [1.21, 1.21, 1.0])):
        part = upge.FutureKLShaped(upge.ConstantAdvantage(2.0), half_life=1.0, high=high)
        assert close(part(batch), [[2 * f for f in factors]])


def test_future_kl_leaves_out_outliers_and_protects_what_is_bad_and_likely():
    """r = 11 does not count; r = 5 with Â < 0 keeps a factor of 1, and one of 0.5 where the bounds allow it."""
    batch = ratios(1.1, 11.0)
    assert close(upge.FutureKLShaped(upge.ConstantAdvantage(1.0), 1.0)(batch), [[1.1, 1.0]])
    batch, bad = ratios(1.0, 5.0, 0.25), upge.ConstantAdvantage(-1.0)
    assert close(upge.FutureKLShaped(bad, math.inf, 0.5, 2.0)(batch), [[-1.25, -1.0, -0.5]])
    assert close(upge.FutureKLShaped(bad, math.inf, 0.5, 2.0, safe=None)(batch), [[-1.25, -1.25, -0.5]])


def test_a_penalty_towards_the_behavior_policy():
    batch = trajectories([[0.8]], p_old=[[0.4]])
    part = upge.KLShaped(upge.ConstantAdvantage(1.0), 0.5, towards="behavior")
    assert close(part(batch), [[1 - 0.5 * math.log(2)]]) and part.columns == {"logprobs", "behavior_logprobs"}
    assert upge.KLShaped(upge.ConstantAdvantage()).columns == {"logprobs", "reference_logprobs"}


# What is not a part of the product, gates and reductions.


def test_the_gradient_of_the_ratio_times_k3_is_that_of_the_reverse_kl():
    """r·log(π_θ/π_0) = 2·ln 4, and on-policy ln 4."""
    for old, ratio in (([[0.4]], 2.0), (None, 1.0)):
        columns = {} if old is None else {"p_old": old}
        batch = trajectories([[0.8]], p_reference=[[0.2]], **columns)
        batch.logprobs.requires_grad_()
        upge.KLPenalty(1.0, upge.TokenMean(), importance=True)(batch).sum().backward()
        assert close(batch.logprobs.grad, [[ratio * math.log(4)]])


def test_questions_may_add_up():
    batch = trajectories([[0.5, 0.5], [0.5], [0.5]], group=[0, 0, 1])
    weights = upge.QuestionMean(within="none")(batch, torch.ones(3, dtype=torch.bool))
    assert weights.tolist() == [[0.25, 0.25], [0.5, 0], [0.5, 0]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: upge.DivergenceClip(-0.1), "DivergenceClip: low=-0.1"),
        (lambda: upge.OffPolicySequenceMask(-1.0), "OffPolicySequenceMask.threshold: -1.0"),
        (lambda: upge.GammaLikelihood((1.0, 0.0)), r"GammaLikelihood: positive=\[1.0, 0.0\]"),
        (lambda: upge.GroupClassification(0.0), "GroupClassification.temperature: 0.0"),
        (lambda: upge.FutureKLShaped(upge.GroupRelative(), 0.0), "FutureKLShaped: half_life=0.0"),
        (lambda: upge.FutureKLShaped(upge.GroupRelative(), low=1.1), "low=1.1"),
        (lambda: upge.FutureKLShaped(upge.GroupRelative(), outlier=1.0), "FutureKLShaped.outlier: 1.0"),
    ],
)
def test_impossible_settings_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
