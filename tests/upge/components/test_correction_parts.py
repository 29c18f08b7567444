"""The parts behind the corrections on literal arrays, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

import upge
from tests.literal import trajectories

ONES = torch.ones(2, 2, dtype=torch.float64)


def two() -> upge.Trajectories:
    """π_old/π_sampler is 2, 2 in the first response and 0.5 in the second, of one token."""
    return trajectories([[0.4, 0.4], [0.2]], p_old=[[0.4, 0.8], [0.2]], p_sampler=[[0.2, 0.4], [0.4]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cap": None}, [[0.2, 0.4], [0.4, 1.0]]),  # untruncated, the denominator is the sampler's probability
        ({"cap": 1.5}, [[0.4 / 1.5, 0.8 / 1.5], [0.4, 1.0]]),
        ({"cap": None, "level": "sequence"}, [[0.1, 0.2], [0.4, 0.5 / 0.5]]),
        ({"cap": 3.0, "level": "sequence"}, [[0.4 / 3, 0.8 / 3], [0.4, 1.0]]),
    ],
)
def test_sampler_corrected_divides_by_the_weight(settings, expected):
    actual = upge.SamplerCorrected(upge.BehaviorPolicy(), **settings)(two())
    counts = two().response_mask
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(actual.exp()[counts], wanted[counts], rtol=1e-12)


@pytest.mark.parametrize(
    ("band", "expected"),
    [
        (upge.SequenceSamplerBand(0.0, 3.9), [0.0, 1.0]),
        (upge.SequenceSamplerBand(0.0, 4.1), [1.0, 1.0]),
        (upge.SequenceSamplerBand(0.6, 4.1), [1.0, 0.0]),
        (upge.SequenceSamplerBand(0.4, 2.1, "geometric"), [1.0, 1.0]),
        (upge.SequenceSamplerBand(0.4, 1.9, "geometric"), [0.0, 1.0]),
        (upge.SequenceSamplerBand(0.6, 2.1, "geometric"), [1.0, 0.0]),
    ],
)
def test_the_band_decides_once_per_response(band, expected):
    actual = band(two(), ONES)
    assert actual.shape == (2, 2) and actual[:, 0].tolist() == expected
    assert torch.equal(actual, band(two(), -ONES)), "whatever the advantage's sign"
    assert actual[0, 0] == actual[0, 1]


def test_only_as_far_as_the_level():
    assert upge.SamplerCorrected(upge.BehaviorPolicy()).live_reach == "token"
    assert upge.SamplerCorrected(upge.BehaviorPolicy(), level="sequence").live_reach == "trajectory"


def lengths(*values: int, demonstrations=(), **columns) -> upge.Trajectories:
    return trajectories(lengths=values, demonstrations=demonstrations, p=[[0.5] * max(values)] * len(values), **columns)


def test_overlong_rewards_fall_over_the_buffer():
    """limit 10, the last 4 tokens: 6 is free, 7 costs a quarter, 10 and beyond all; a demonstration costs nothing."""
    batch = lengths(3, 6, 7, 9, 10, 12, 12, demonstrations=[6], rewards=[1.0] * 7)
    actual = upge.OverlongShaped(upge.GAE(), limit=10, buffer=0.4, penalty=2.0).shaped(batch).rewards
    assert torch.allclose(actual, torch.tensor([1, 1, 0.5, -0.5, -1, -1, 1], dtype=torch.float64), atol=1e-12)


def test_overlong_advantages_are_those_of_the_shaped_rewards():
    """Rewards 1, 1 become 1, 0 beyond the limit: where both succeeded, there is something to learn now."""
    batch = lengths(2, 10, rewards=[1.0, 1.0], group=[0, 0])
    part = upge.OverlongShaped(upge.GroupRelative(normalize_std=False), limit=10, penalty=1.0)
    assert part(batch)[:, 0].tolist() == [0.5, -0.5]
    assert upge.GroupRelative(normalize_std=False)(batch).abs().max() == 0


def test_what_overlong_wraps_is_computed_beforehand_on_the_shaped_rewards():
    """Also where the whole is live and only the inner part is known before the forward pass."""
    batch = lengths(2, 10, rewards=[1.0, 1.0], group=[0, 0], p_reference=[[0.25] * 10] * 2)
    part = upge.OverlongShaped(upge.KLShaped(upge.GroupRelative(normalize_std=False), 1.0), 10, penalty=1.0)
    assert part.is_live
    piece = batch.select(torch.tensor([1]), batch.logprobs[1:])
    precomputed = part.precomputed(batch)
    actual = precomputed(precomputed.view(piece))
    assert torch.allclose(actual, torch.full((1, 10), -0.5 - torch.log(torch.tensor(2.0)).item(), dtype=torch.float64))


def test_a_right_answer_at_the_limit_lies_halfway_between_right_and_wrong():
    """As with the rewards ±1 and the penalty 1 of arXiv 2503.14476, up to the scale."""
    batch = lengths(10, 2, 2, rewards=[1.0, 0.0, 1.0], group=[0, 0, 0])
    actual = upge.OverlongShaped(upge.GroupRelative(normalize_std=False), limit=10)(batch)[:, 0]
    theirs = torch.tensor([1.0 - 1.0, -1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(actual, (theirs - theirs.mean()) / 2, atol=1e-12)


@pytest.mark.parametrize("inner", [upge.SignedReward(), upge.Tempered(upge.SignedReward())])
def test_overlong_refuses_what_only_asks_for_success(inner):
    with pytest.raises(upge.ConfigError, match=r"OverlongShaped\.advantage.*SignedReward.*GroupRelative"):
        upge.OverlongShaped(inner, limit=10)
    assert not upge.SignedReward.graded and upge.GroupRelative.graded


@pytest.mark.parametrize(
    "make",
    [
        lambda: upge.SamplerCorrected(upge.BehaviorPolicy(), cap=float("inf")),
        lambda: upge.OverlongShaped(upge.GAE(), 9, penalty=float("inf")),
    ],
)
def test_infinity_is_no_setting(make):
    with pytest.raises(upge.ConfigError, match="inf.*finite"):
        make()


def test_gates_see_the_verifiers_reward():
    batch = lengths(10, 10, rewards=[1.0, 0.0], group=[0, 0])
    shaped = upge.OverlongShaped(upge.GroupRelative(), limit=10, penalty=1.0).shaped(batch)
    assert shaped.pass_rate.tolist() == [0.0, 0.0] and batch.pass_rate.tolist() == [0.5, 0.5]
    assert upge.PassRateAbove(0.25)(batch).tolist() == [1.0, 1.0]


def test_the_bounds_are_printed():
    assert "Π" not in upge.SequenceSamplerBand().formula().text
    assert upge.SequenceSamplerBand(0.5, 2.0).formula().text == "1[0.5 ≤ π_old(τ)/π_sampler(τ) ≤ 2]"
    assert "^(1/|τ|) ≤ 1.001]" in upge.SequenceSamplerBand(0.999, 1.001, "geometric").formula().text
    text = upge.OverlongShaped(upge.GroupRelative(normalize_std=False), 100, 0.2, 0.5).formula().text
    assert text == "[(R − mean R), R ← R − 0.5·clip((|τ| − 80)/20, 0, 1)]"
