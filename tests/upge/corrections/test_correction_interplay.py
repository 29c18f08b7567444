"""Corrections on algorithms of every shape: they conform, each changes something, and where a correction meets what
only another algorithm has (a critic, a group with its demonstration, several terms), the gradient is the written one.
Two corrections are accepted or refused, and have the same gradient, in either order.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import algorithms
import upge
from tests import textbook_corrections
from tests.conforming import parts_checked_once
from tests.policy import CASES, sample, with_distributions
from tests.upge.corrections.test_corrections import ALL, DRAWS, UNFIT, correction, gradient
from upge import ConfigError

#: Clips and none, live and static advantages, several terms, a critic, sequences, stages.
SHAPES = ["grpo", "ppo", "gspo", "gmpo", "luffy", "srft", "hpt", "amft", "sft_then_grpo", "reinforce_plus_plus", "gdpo"]
#: Settings under which a correction bites at the lengths, ratios and mismatches of these tests.
BITING = {
    "overlong": {"limit": 6, "buffer": 0.5, "penalty": 0.75},
    "dual_clip": {"dual": 1.25},
    "kl_reward": {"coefficient": 0.1},
    "mis_geometric": {"low": 0.9, "high": 1.1},
    "sequence_mask": {"threshold": 0.05},
}
REFUSED = {
    "dual_clip": {"gspo", "gmpo", "luffy", "srft", "hpt"},
    "dynamic_sampling": {"luffy", "srft", "hpt", "amft"},
    "overlong": {"srft", "gdpo"},
    "kl_reward": {"ppo", "reinforce_plus_plus"},
    "iw_opd": set(SHAPES),
    "optimal_baseline": {"ppo", "srft", "amft", "reinforce_plus_plus"},
}


@pytest.fixture(scope="module", autouse=True)
def each_part_once():
    with parts_checked_once():
        yield


#: GSPO's clip already stops every response that the mask drops: those whose ratio has fallen and whose Â is negative.
IMPLIED = {("sequence_mask", "gspo")}


def biting(correction: str) -> list[str]:
    """Overrides that give the correction these settings."""
    return [f"correction.{correction}.{key}={value}" for key, value in BITING.get(correction, {}).items()]


def inside(algorithm: upge.Algorithm | upge.Pipeline) -> list[upge.Algorithm]:
    return [stage.algorithm for stage in upge.Pipeline.of(algorithm).stages.values()]


@pytest.mark.parametrize("algorithm", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_a_corrected_algorithm_conforms_and_differs(name, algorithm):
    """Or is refused with the reason."""
    if algorithm in REFUSED.get(name, ()):
        with pytest.raises(ConfigError, match=f"'{name}' {UNFIT} to {algorithm}"):
            algorithms.load(algorithm, corrections=[name])
        return
    actual, plain = algorithms.load(algorithm, biting(name), [name]), algorithms.load(algorithm)
    if name in DRAWS:
        assert actual.formula() == plain.formula() and actual != plain
        return
    assert actual.formula() != plain.formula() and actual.formula("latex") != plain.formula("latex")
    differing = 0
    for one, other in zip(inside(actual), inside(plain), strict=True):
        if one == other:
            continue
        upge.testing.check_algorithm(one)
        s = with_distributions(sample(0), 0)
        before, after = (gradient(a.estimate(s.batch).loss, s) for a in (other, one))
        if (name, algorithm) in IMPLIED:
            assert torch.equal(before, after)
            return
        assert (after - before).abs().max() > 1e-5 * before.abs().max() > 0
        differing += 1
    assert differing == 1


def in_turn(algorithm: upge.Algorithm, names: tuple[str, ...]) -> upge.Algorithm | None:
    """The algorithm with corrections, or None if one does not apply."""
    try:
        for name in names:
            algorithm = correction(name, **BITING.get(name, {}))(algorithm)
    except upge.corrections.NotApplicable:
        return None
    return algorithm


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "gmpo", "luffy", "srft"])
def test_the_order_of_corrections_does_not_matter(algorithm):
    s, plain = with_distributions(sample(0), 0), algorithms.load(algorithm)
    alone = {name for name in ALL if in_turn(plain, (name,))}
    for pair in itertools.combinations(ALL, 2):
        one, other = in_turn(plain, pair), in_turn(plain, pair[::-1])
        assert (one is None) == (other is None), pair
        assert one is None or alone.issuperset(pair), "no correction makes another one applicable"
        if one is None or one == other:
            continue
        first, second = (gradient(each.estimate(s.batch).loss, s) for each in (one, other))
        assert (first - second).abs().max() <= 1e-12 * max(1.0, float(first.abs().max())), pair
        assert one.needs == other.needs, pair


def test_ratios_beyond_the_dual_clip_are_met():
    """With the file's own 3, on a batch whose ratios exceed it."""
    s = CASES["far"](0, False)
    for name in ("grpo", "ppo", "amft"):
        before, after = (gradient(algorithms.load(name, [], c).estimate(s.batch).loss, s) for c in ([], ["dual_clip"]))
        assert (after - before).abs().max() > 1e-3 * before.abs().max()


INTERPLAY = {
    # The whole advantage is wrapped, its whitening too; the critic's returns are not whitened.
    "ppo_overlong": ("ppo", biting("overlong"), "overlong"),
    "luffy_overlong": ("luffy", biting("overlong"), "overlong"),
    "srft_tis": ("srft", ["correction.tis.cap=1.1"], "tis"),
    "chord_mu_tis": ("chord_mu", ["correction.tis.cap=1.1"], "tis"),
}


def corrected(name: str) -> upge.Algorithm:
    algorithm, overrides, correction = INTERPLAY[name]
    return algorithms.load(algorithm, overrides, [correction])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", INTERPLAY)
def test_gradient_equals_the_written_one_where_two_meet(name, case):
    for seed in (0, 1):
        s = CASES[case](seed, False)
        actual = gradient(corrected(name).estimate(s.batch).loss, s)
        expected = gradient(getattr(textbook_corrections, name)(s), s)
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", INTERPLAY)
def test_the_interplay_can_fail(name):
    s = sample(0)
    plain = gradient(algorithms.load(INTERPLAY[name][0]).estimate(s.batch).loss, s)
    assert (gradient(corrected(name).estimate(s.batch).loss, s) - plain).abs().max() > 1e-3 * plain.abs().max()


def test_the_critic_is_to_say_the_returns_of_the_punished_rewards():
    for seed in (0, 1):
        s = sample(seed)
        targets, plain = (a.critic.targets(s.batch) for a in (corrected("ppo_overlong"), algorithms.load("ppo")))
        for i, row in enumerate(textbook_corrections.ppo_overlong_returns(s)):
            expected = torch.tensor(row, dtype=torch.float64)
            assert torch.allclose(targets[i, : len(row)], expected, rtol=0, atol=1e-12)
        assert (targets - plain).abs().max() > 0.1
        demonstrations = s.batch.is_demonstration
        assert torch.equal(targets[demonstrations], plain[demonstrations]), "nobody punishes a demonstration"
