"""Parts that rank the tokens of an update: small arrays worked out by hand, draws, ties."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import upge
from upge.components.ranking import covariance, largest, share_of, token_keys
from upge.errors import ConfigError

LOGPROBS = [[-1.0, -2.0, -3.0], [-4.0, -6.0, 0.0]]


def batch(**columns) -> upge.Trajectories:
    given = {
        "logprobs": torch.tensor(LOGPROBS, dtype=torch.float64),
        "response_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "rewards": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "group": torch.tensor([4, 4]),
        "entropies": torch.tensor([[0.3, 0.1, 0.5], [0.2, 0.4, 9.0]], dtype=torch.float64),
        "step": 7,
    }
    return upge.Trajectories(**{**given, **columns})


ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)


def test_covariance_by_hand():
    """mean log π = -16/5, mean A = 1/5."""
    expected = [[2.2 * 0.8, 1.2 * 0.8, 0.2 * 0.8], [-0.8 * -1.2, -2.8 * -1.2, 0.0]]
    torch.testing.assert_close(covariance(batch(), ADVANTAGES), torch.tensor(expected, dtype=torch.float64))


def test_the_largest_of_equal_values_are_those_of_smaller_keys():
    values = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 9.0]])
    keys = torch.tensor([[0, 5, 3], [4, 1, -9]])
    among = batch().response_mask
    assert largest(values, among, 2, keys).nonzero().tolist() == [[0, 2], [1, 0]]
    assert largest(values, among, 4, keys).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert largest(values, among, 99, keys).equal(among)
    assert not largest(values, among & False, 1, keys).any()


def test_a_share_is_rounded_down_but_is_at_least_one_token():
    assert [share_of(s, torch.ones(10, dtype=torch.bool)) for s in (2e-4, 0.19, 0.2, 1.0)] == [1, 1, 2, 10]
    shares, hundred = [n / 100 for n in range(1, 101)], torch.ones(100, dtype=torch.bool)
    assert [share_of(share, hundred) for share in shares] == [*range(1, 101)], "0.29·100 is 28.99… in floating point"


def test_keys_follow_the_token_and_nothing_else():
    """Not the order, not the split, not the padding or holes; but seed, step, trajectory and position."""
    whole = token_keys(batch())
    inside = batch().response_mask
    assert len(set(whole[inside].tolist())) == 5
    order = torch.tensor([1, 0])
    columns = {n: getattr(batch(), n)[order] for n in ("logprobs", "response_mask", "rewards", "group", "entropies")}
    assert torch.equal(token_keys(batch(**columns, index=order))[inside[order]], whole[order][inside[order]])
    alone = batch().select(torch.tensor([1]))
    assert token_keys(alone).tolist() == [whole[1, :2].tolist()]
    holed = SimpleNamespace(
        step=7, index=torch.arange(1), response_mask=torch.tensor([[False, True, False, True, True]])
    )
    assert token_keys(holed)[holed.response_mask].tolist() == whole[0].tolist()
    for other in (
        token_keys(batch(), seed=1),
        token_keys(batch(step=8)),
        token_keys(batch(index=torch.tensor([2, 3]))),
    ):
        assert not (other == whole).any()


def test_keys_are_uniform():
    """A half, a quarter, ... of 2^16 keys has each of the highest bits, and neighbours are independent."""
    mask = torch.ones(256, 256, dtype=torch.bool)
    keys = token_keys(SimpleNamespace(step=0, index=torch.arange(256), response_mask=mask))
    assert len(keys.unique()) == 2**16
    for bit in range(0, 64, 7):
        ones = ((keys >> bit) & 1).double()
        assert abs(float(ones.mean()) - 0.5) < 0.01, bit
        for moved in (ones.roll(1, 0), ones.roll(1, 1)):
            assert abs(float((ones == moved).double().mean()) - 0.5) < 0.01, bit


def test_clip_cov_stops_as_many_as_its_share_among_the_eligible():
    """cov is 1.76, 0.96, 0.16 and 0.96, 3.36; the inner mask stops the first token already."""
    view, everything = batch(), upge.NoMask()
    stopped = lambda part: (part(part.view(view), ADVANTAGES)[view.response_mask] == 0).nonzero()[:, 0].tolist()  # noqa: E731
    assert stopped(upge.CovarianceClip(everything, share=1.0, low=0.9, high=3.0)) == [0, 1, 3]
    assert stopped(upge.CovarianceClip(everything, share=1.0, low=0.97, high=5.0)) == [0, 4]
    assert stopped(upge.CovarianceClip(everything, share=1.0, low=5.0, high=6.0)) == []
    keys = token_keys(view, seed=3)[view.response_mask]
    order = [i for i in keys.argsort().tolist() if i in (0, 1, 3)]
    for count, share in ((1, 0.1), (2, 0.4)):
        part = upge.CovarianceClip(everything, share=share, low=0.9, high=3.0, seed=3)
        assert stopped(part) == sorted(order[:count])
    ratio = dataclasses.replace(view, behavior_logprobs=torch.tensor([[-3.0, -2.0, -3.0], [-4.0, -6.0, 0.0]]).double())
    part = upge.CovarianceClip(upge.PPOClip(), share=0.1, low=1.5, high=3.0)
    mask = part(part.view(ratio), ADVANTAGES)[ratio.response_mask]
    assert mask.tolist() == [0, 1, 1, 1, 1], "stopped by the clip, so that no token was left to draw"


def test_every_token_is_drawn_equally_often():
    view, counts = batch(), torch.zeros(3)
    for seed in range(600):
        part = upge.CovarianceClip(upge.NoMask(), share=0.1, low=0.9, high=3.0, seed=seed)
        counts += part(part.view(view), ADVANTAGES)[view.response_mask][[0, 1, 3]] == 0
    assert counts.sum() == 600 and float((counts - 200).abs().max()) < 40


def test_top_covariance_and_top_entropy_by_hand():
    view = batch()
    top = upge.TopCovariance(upge.SignedReward(), share=0.4)
    assert top(top.view(view), ADVANTAGES).tolist() == [[1, 0, 0], [0, 1, 0]]
    top = upge.TopEntropy(share=0.4)
    assert top(top.view(view), ADVANTAGES).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_ratio_sign_is_the_gradient_of_the_distance():
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([[-1.5, -1.0, -3.0], [-4.5, -7.0, 0.0]], dtype=torch.float64)
    view, part = batch(logprobs=logprobs, behavior_logprobs=behavior), upge.RatioSign()
    (expected,) = torch.autograd.grad(-(logprobs - behavior).abs().sum(), logprobs)
    assert torch.equal(part(part.view(view)), expected)
    on_policy = batch()
    assert not part(part.view(on_policy)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: upge.CovarianceClip(share=0.0), r"CovarianceClip\.share: 0\.0 must be in \(0, 1\]"),
        (lambda: upge.TopEntropy(share=1.1), r"TopEntropy\.share: 1\.1 must be in \(0, 1\]"),
        (lambda: upge.TopCovariance(upge.GroupRelative(), share=-1.0), r"TopCovariance\.share: -1\.0 must be in"),
        (lambda: upge.CovarianceClip(low=5.0, high=1.0), r"CovarianceClip: low=5\.0, high=1\.0; need low < high"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "part", [upge.CovarianceClip(share=0.2, low=0.1), upge.TopCovariance(upge.GroupRelative(), 0.2), upge.TopEntropy()]
)
def test_the_parts_conform(part):
    upge.testing.check_component(part)
