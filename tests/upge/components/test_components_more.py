"""Rewards, returns, shaped advantages and parts relative to geometric means or a reference policy, on literal arrays,
against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import upge
from tests.literal import trajectories
from tests.upge.components.test_components import close, denominators, ratios
from upge.errors import ConfigError

LN2 = math.log(2)


def kl_batch(**columns) -> upge.Trajectories:
    """Old probabilities ½ and ¼, reference ones ¼ and ½, reward 1: log(π_old/π_0) is ln 2 and -ln 2; then padding."""
    return trajectories(
        mask=[[1, 1, 0]], p_old=[[0.5, 0.25, 0.1]], p_reference=[[0.25, 0.5, 0.9]], rewards=[1.0], **columns
    )


# Rewards.


def test_outcome_reward_is_paid_at_the_last_token_that_counts():
    batch = trajectories(mask=[[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], rewards=[1.0, -2.0, 3.0, 0.5])
    assert upge.OutcomeReward()(batch).tolist() == [[0, 0, 1, 0], [0, 0, 0, -2], [0, 0, 0, 0], [0.5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [-0.06931472, 1.06931472]),  # ±ln 2 of 0.1
        ("k2", [-0.02402265, 0.97597735]),  # (ln 2)²/2 = 0.2402265
        ("k3", [-0.01931472, 0.96931472]),  # ½ + ln 2 - 1 and 2 - ln 2 - 1
    ],
)
def test_kl_penalized_reward(kind, expected):
    reward = upge.KLPenalizedReward(upge.OutcomeReward(), 0.1, kind)
    assert close(reward(kl_batch()), [[*expected, 0.0]])


def test_kl_penalized_reward_says_what_it_lacks():
    batch = trajectories(lengths=[2], p_reference=[[0.5, 0.5]])
    reward = upge.ReturnToGo(reward=upge.KLPenalizedReward(upge.OutcomeReward()))
    with pytest.raises(ValueError, match="behavior_logprobs: ReturnToGo reads it, but this batch does not have it"):
        reward.precomputed(batch)


# Returns.


@pytest.mark.parametrize(("discount", "expected"), [(1.0, [1, 0, 1, 1]), (0.5, [0.25, 0, 0.5, 1]), (0.0, [0, 0, 0, 1])])
def test_return_to_go_skips_the_hole_and_the_padding(discount, expected):
    batch = trajectories(mask=[[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], rewards=[1.0, -1.0])
    assert upge.ReturnToGo(discount)(batch).tolist() == [[*expected, 0], [-1, 0, 0, 0, 0]]


def test_return_to_go_pays_for_all_later_tokens():
    """0.1·ln 2 paid by the first and given back to the second: 1 and 1 + 0.1·ln 2; half of the second's with γ = ½."""
    reward = upge.KLPenalizedReward(upge.OutcomeReward(), 0.1)
    assert close(upge.ReturnToGo(1.0, reward)(kl_batch()), [[1.0, 1.06931472, 0.0]])
    assert close(upge.ReturnToGo(0.5, reward)(kl_batch()), [[0.46534264, 1.06931472, 0.0]])


def test_gae_with_a_reward_per_token():
    """Values ½ and ¼: δ = 1.06931 - 0.25 and -0.06931 + 0.25 - 0.5; the first gets half of the second."""
    gae = upge.GAE(1.0, 0.5, upge.KLPenalizedReward(upge.OutcomeReward(), 0.1))
    assert close(gae(kl_batch(values=[[0.5, 0.25, 9.0]])), [[0.09034264, 0.81931472, 0.0]])
    assert gae.columns == {"rewards", "values", "behavior_logprobs", "reference_logprobs"} and not gae.is_live


# Shaped advantages.


def test_whitened_over_the_rollout_tokens_of_the_batch():
    """1, 1 and -1: mean ⅓, variance 4/3. The demonstration's 1 is measured by them and does not enter."""
    batch = trajectories(lengths=[2, 1, 3], rewards=[1.0, 0.0, 1.0], demonstrations=[2])
    actual = upge.Whitened(upge.SignedReward())(batch)
    a, b = 0.57735027, -1.15470054
    assert close(actual, [[a, a, 0.0], [b, 0.0, 0.0], [a, a, a]])
    assert close(upge.Whitened(upge.SignedReward(), epsilon=2 / 3)(batch)[:2, 0], [0.47140452, -0.94280904])


def test_whitening_nothing_is_zero():
    lone = trajectories(lengths=[1, 2], rewards=[1.0, 0.0], demonstrations=[1])
    assert upge.Whitened(upge.SignedReward())(lone).tolist() == [[0, 0], [0, 0]]
    equal = trajectories(lengths=[2, 1], rewards=[1.0, 1.0])
    assert upge.Whitened(upge.SignedReward())(equal).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("live", [upge.KLShaped(upge.SignedReward()), upge.PairwisePreference()])
def test_whitened_refuses_what_is_not_known_beforehand(live):
    with pytest.raises(ConfigError, match=f"Whitened.advantage: {type(live).__name__} depends on the current policy"):
        upge.Whitened(live)


def test_tempered_and_shifted():
    batch = trajectories(lengths=[1, 2], rewards=[1.0, 0.0], group=[0, 0])
    plain = upge.GroupRelative(normalize_std=False)
    assert close(upge.Tempered(plain, 1.0)(batch), [[0.25, 0.25], [-0.25, -0.25]])
    assert close(upge.Tempered(plain, 0.0)(batch)[:, 0], [0.5, -0.5])
    assert close(upge.Shifted(plain, -0.1)(batch)[:, 0], [0.6, -0.4])
    assert close(upge.Shifted(plain, 0.1)(batch)[:, 0], [0.4, -0.6])


@pytest.mark.parametrize(
    ("kind", "future", "expected"),
    [
        # d = -ln 2, ln 2, 0 and for the short response -ln 2
        ("k1", False, [[0.93068528, 1.06931472, 1.0], [0.93068528, 1.0, 1.0]]),
        ("k1", True, [[1.0, 1.06931472, 1.0], [0.93068528, 1.0, 1.0]]),
        ("k2", False, [[0.97597735, 0.97597735, 1.0], [0.97597735, 1.0, 1.0]]),
        ("k2", True, [[0.95195470, 0.97597735, 1.0], [0.97597735, 1.0, 1.0]]),
        ("k3", False, [[0.98068528, 0.96931472, 1.0], [0.98068528, 1.0, 1.0]]),
        ("k3", True, [[0.95, 0.96931472, 1.0], [0.98068528, 1.0, 1.0]]),
    ],
)
def test_kl_shaped_kinds_and_future(kind, future, expected):
    batch = trajectories([[0.5, 0.25, 0.5], [0.5]], p_reference=[[0.25, 0.5, 0.5], [0.25]])
    shaped = upge.KLShaped(upge.ConstantAdvantage(1.0), 0.1, kind, future)
    assert close(shaped(batch), expected)
    assert shaped.live_reach == ("trajectory" if future else "token")


def test_future_k1_is_the_gradient_of_the_responses_kl():
    """Over all nine responses of two tokens out of three, weighted by their probability, exactly; a token's own k1
    alone leaves out what its choice makes of the second one."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    first, second = make(3).requires_grad_(), make(3, 3).requires_grad_()
    reference_first, reference_second = make(3).log_softmax(0), make(3, 3).log_softmax(1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    gather = lambda a, b: torch.stack([a[pairs[:, 0]], b[pairs[:, 0], pairs[:, 1]]], dim=1)  # noqa: E731
    logp = gather(first.log_softmax(0), second.log_softmax(1))
    reference = gather(reference_first, reference_second)
    probability = logp.sum(dim=1).exp()
    kl = (probability * (logp - reference).sum(dim=1)).sum()
    expected = torch.autograd.grad(-kl, (first, second), retain_graph=True)
    batch = trajectories(lengths=[2] * 9, logprobs=logp.tolist(), reference_logprobs=reference.tolist())
    actual = {}
    for future in (True, False):
        advantage = upge.KLShaped(upge.ConstantAdvantage(0.0), 1.0, "k1", future)(batch)
        objective = (probability.detach()[:, None] * advantage * logp).sum()
        actual[future] = torch.autograd.grad(objective, (first, second), retain_graph=True)
    for index in (0, 1):
        assert torch.allclose(actual[True][index], expected[index], rtol=0, atol=1e-14)
    assert float((actual[False][0] - expected[0]).abs().max()) > 0.01


# Masks.


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.4, 1, 1), (0.4001, 1, 0), (0.4001, -1, 1), (-0.3, -1, 1), (-0.3001, -1, 0), (-9, 1, 1), (9, 0, 1)],
)
def test_log_ratio_clip_at_its_borders(log_ratio, advantage, moves):
    batch = trajectories(logprobs=[[log_ratio]], behavior_logprobs=[[0.0]])
    assert upge.LogRatioClip(low=0.3, high=0.4)(batch, torch.tensor([[float(advantage)]])).tolist() == [[moves]]


def test_sigmoid_gate():
    """u = 0, 1, -½ with τ = 1 and 0, 2, -1 with τ = 2; 4σ(1)σ(-1) = 0.78644773, 4σ(2)σ(-2) = 0.41997434."""
    batch, gate = ratios(1.0, 2.0, 0.5), upge.SigmoidGate(positive=1.0, negative=2.0)
    assert close(gate(batch, torch.ones(1, 3)), [[1.0, 0.78644773, 0.94001485]])
    assert close(gate(batch, -torch.ones(1, 3)), [[1.0, 0.41997434, 0.78644773]])
    assert gate(ratios(1e300), torch.ones(1, 1)).tolist() == [[0.0]]


# Denominators; expected are probabilities.


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        # log r = ln 2, 0 and -ln 4. Above 0.4: ρ = e^0.2 and ¼; below -0.4: ρ = √2 and e^-0.4
        (upge.GeometricMeanBehaviorPolicy(upge.ConstantAdvantage(1.0)), [0.40936538, 0.16374615, 0.4]),
        (upge.GeometricMeanBehaviorPolicy(upge.ConstantAdvantage(-1.0)), [0.35355339, 0.14142136, 0.14918247]),
        (upge.GeometricMeanBehaviorPolicy(upge.ConstantAdvantage(0.0)), [0.35355339, 0.14142136, 0.4]),
        (upge.GeometricMeanBehaviorPolicy(upge.ConstantAdvantage(1.0), high=0.0), [0.5, 0.2, 0.4]),
        # π_θ/π_0 = 1, 2 and ½
        (upge.ClippedReferencePolicy(0.2, 1.8), [0.5, 0.11111111, 0.2]),
        (upge.ClippedReferencePolicy(0.8, 4.0), [0.5, 0.1, 0.125]),
        (upge.ClippedReferencePolicy(0.0, 1.0), [0.5, 0.2, 0.2]),
        # its geometric means are √2 and ½, squared 2 and ¼
        (upge.SequenceReferencePolicy(), [0.25, 0.1, 0.4]),
        (upge.SequenceReferencePolicy(power=1.0), [0.35355339, 0.14142136, 0.2]),
        (upge.SequenceReferencePolicy(low=0.5, high=1.6), [0.3125, 0.125, 0.2]),
    ],
    ids=str,
)
def test_denominator(denominator, expected):
    batch = denominators()
    assert close(denominator(batch)[batch.response_mask].exp(), expected)


# Settings that cannot be meant.


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: upge.KLPenalizedReward(upge.OutcomeReward(), -0.1), "KLPenalizedReward.coefficient: -0.1"),
        (lambda: upge.KLPenalizedReward(upge.OutcomeReward(), 0.1, "k4"), "KLPenalizedReward.kind: 'k4'"),
        (lambda: upge.ReturnToGo(1.1), "ReturnToGo.discount: 1.1"),
        (lambda: upge.GAE(reward=upge.GAE()), "GAE.reward"),
        (lambda: upge.Whitened(upge.GAE(), 0.0), "Whitened.epsilon: 0.0"),
        (lambda: upge.Tempered(upge.GAE(), -1.0), "Tempered.temperature: -1.0"),
        (lambda: upge.LogRatioClip(-0.1), "LogRatioClip: low=-0.1"),
        (lambda: upge.SigmoidGate(negative=0.0), "SigmoidGate: positive=1.0, negative=0.0"),
        (lambda: upge.GeometricMeanBehaviorPolicy(upge.GAE(), high=-1.0), "GeometricMeanBehaviorPolicy: low=0.4"),
        (lambda: upge.ClippedReferencePolicy(1.2, 1.8), "ClippedReferencePolicy: low=1.2"),
        (lambda: upge.SequenceReferencePolicy(high=0.5), "SequenceReferencePolicy: low=0.0, high=0.5"),
        (lambda: upge.KLShaped(upge.GAE(), kind="k0"), "KLShaped.kind: 'k0'"),
    ],
)
def test_impossible_settings_are_refused(make, problem):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(problem), caught.value
