"""Several rewards: what their parts compute, worked out by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import algorithms
import upge
from upge import ConfigError, Trajectories
from upge.testing import random_batch
from upge.views import UndeclaredColumn

PLAIN = upge.GroupRelative(normalize_std=False)


def batch(**columns) -> Trajectories:
    """Two groups of two: the first differs in both rewards, whose sum is equal; the second in 'format' alone."""
    correct, style = torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), torch.tensor([0.0, 2.0, 2.0, 0.0]).double()
    given = {"rewards": correct + 0.5 * style, "named_rewards": {"correct": correct, "format": style}}
    given |= {"reward_weights": {"correct": 1.0, "format": 0.5}} | columns
    logprobs = torch.full((4, 3), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 3, [True, True, False], [True, False, False], [True] * 3])
    return Trajectories(logprobs, mask, group=torch.tensor([0, 0, 1, 1]), **given)


def first(part, given: Trajectories) -> list[float]:
    """The advantage of each response's first token."""
    return part(part.view(given))[:, 0].tolist()


def test_an_advantage_of_one_reward_by_its_name():
    assert first(PLAIN, batch()) == [0.0, 0.0, 0.5, -0.5], "the sum of the first group's rewards is equal"
    assert first(upge.OfReward("format", PLAIN), batch()) == [-1.0, 1.0, 1.0, -1.0]
    assert first(upge.OfReward("correct", PLAIN), batch()) == [0.5, -0.5, 0.0, 0.0]
    signs = upge.OfReward("format", upge.SignedReward())
    succeeded = torch.tensor([True, False, False, False])
    assert first(signs, batch(succeeded=succeeded)) == [-1.0, 1.0, 1.0, -1.0], "a success is what this reward says"
    assert first(upge.SignedReward(), batch(succeeded=succeeded)) == [1.0, -1.0, -1.0, -1.0]


def test_rewards_by_themselves_and_then_added_up():
    assert first(upge.RewardDecoupled(PLAIN), batch()) == [0.0, 0.0, 0.5, -0.5], "what is linear does not notice"
    std = upge.GroupRelative(epsilon=0.0)
    half = 0.5**0.5
    assert first(upge.RewardDecoupled(std), batch()) == pytest.approx([half / 2, -half / 2, half / 2, -half / 2])
    assert first(std, batch()) == pytest.approx([0.0, 0.0, half, -half]), "GRPO maps the first group's two to one"
    alone = batch(named_rewards={}, reward_weights={})
    assert first(upge.RewardDecoupled(std), alone) == first(std, alone), "without names there is one reward"
    unweighted = batch(reward_weights={})
    assert first(upge.RewardDecoupled(std), unweighted) == pytest.approx([0.0, 0.0, half, -half])


def test_sums_of_advantages():
    parts = (PLAIN, upge.OfReward("format", PLAIN))
    assert first(upge.Summed(parts), batch()) == [-1.0, 1.0, 1.5, -1.5]
    assert first(upge.Summed(parts, (2.0, -0.5)), batch()) == [0.5, -0.5, 0.5, -0.5]
    assert upge.Summed(parts, (2.0, -0.5)).formula().text == ("[2·(R − mean R) + -0.5·[(R − mean R), R ← R_format]]")
    for weights in ((1.0,), (1.0, float("inf"))):
        with pytest.raises(ConfigError, match="Summed.weights: found .* for 2 advantages"):
            upge.Summed(parts, weights)
    with pytest.raises(ConfigError, match="Summed.advantages: empty"):
        upge.Summed(())


def test_whitened_over_rollouts_counts_each_response_once():
    """Â of 1, -1, 1 and -1 has variance 4/3, whatever the lengths; over tokens the mean is not 0."""
    advantage = upge.OfReward("format", PLAIN)
    over = upge.Whitened(advantage, 1e-30, "rollouts")
    assert first(over, batch()) == pytest.approx([-(0.75**0.5), 0.75**0.5, 0.75**0.5, -(0.75**0.5)], abs=1e-12)
    assert over(batch())[1].tolist()[2] == 0, "padding has no advantage"
    assert first(upge.Whitened(advantage, 1e-30), batch()) != pytest.approx(first(over, batch()), abs=1e-2)
    with pytest.raises(ConfigError, match="Whitened.over: 'batch' is not one of"):
        upge.Whitened(advantage, over="batch")


def test_a_group_without_signal_gets_none_from_the_batch():
    """Thirds are not exact, so the sums of the others' advantages are 0 only up to rounding."""
    given = random_batch(3, groups=6)
    same = given.group == given.group[0]
    named = {name: torch.where(same, 0.1, column / 3) for name, column in given.named_rewards.items()}
    given = replace(given, named_rewards=named)
    advantage = algorithms.load("gdpo").terms["rl"].estimator.advantage
    values = advantage(advantage.view(given))
    rollouts = ~given.is_demonstration
    assert bool((values[same & rollouts] == 0).all()) and bool((values[~same & rollouts] != 0).any())
    assert not bool(algorithms.load("gdpo").plan(given).contributing[same].any())


@pytest.mark.parametrize("inner", [upge.KLShaped(upge.LeaveOneOut()), upge.GroupClassification()])
def test_what_is_live_reads_its_own_reward_in_every_micro_batch(inner):
    given = random_batch(1)
    for part in (upge.RewardDecoupled(inner), upge.OfReward("format", inner)):
        whole, ready = part(part.view(given)), part.precomputed(given)
        for group in given.group.unique():
            rows = (given.group == group).nonzero()[:, 0]
            some = given.select(rows, given.logprobs[rows])
            actual, width = ready(ready.view(some)), some.response_mask.shape[1]
            assert torch.allclose(actual * some.response_mask, (whole[rows][:, :width]) * some.response_mask)


def test_a_reward_that_is_missing_is_refused_with_the_known_ones():
    part = upge.OfReward("style", PLAIN)
    with pytest.raises(ValueError, match="named_rewards: found no 'style' in this batch, which has correct, format"):
        part(part.view(batch()))
    named = "{_target_: upge.OfReward, reward: style, advantage: {_target_: upge.LeaveOneOut}}"
    algorithm = algorithms.load("grpo", [f"terms.rl.estimator.advantage={named}"])
    assert algorithm.needs.rewards == {"style"} and "named_rewards" in algorithm.needs.columns
    with pytest.raises(ConfigError, match="grpo.terms.rl.estimator.advantage: .*'style', but .* correct, format"):
        algorithm.plan(batch())
    with pytest.raises(ConfigError, match="algo.terms.rl.estimator.advantage: .*the rewards here are without names"):
        algorithm.check(group_size=2, rewards=[])
    algorithm.check(group_size=2)
    algorithm.check(group_size=2, rewards=["correct", "style"])


def test_parts_that_would_ignore_each_other_are_refused():
    named = upge.OfReward("format", PLAIN)
    for make in (
        lambda: upge.OfReward("correct", named),
        lambda: upge.RewardDecoupled(upge.Tempered(named)),
        lambda: upge.OverlongShaped(upge.RewardDecoupled(PLAIN), limit=9),
    ):
        with pytest.raises(ConfigError, match="reads rewards by name, so it would ignore those that"):
            make()
    with pytest.raises(ConfigError, match="'overlong' .* gdpo: .*give the penalty as a reward of its own"):
        algorithms.load("gdpo", corrections=["overlong"])


def test_the_columns_of_named_rewards_are_checked_and_follow_their_trajectories():
    for columns, said in (
        ({"named_rewards": {"correct": torch.ones(3)}, "reward_weights": {}}, r"named_rewards\['correct'\]: expected"),
        ({"named_rewards": {"correct": torch.ones(4).long()}, "reward_weights": {}}, "found torch.int64"),
        ({"named_rewards": {"correct": [1.0] * 4}, "reward_weights": {}}, "found list"),
        ({"reward_weights": {"corect": 1.0}}, "reward_weights: found 'corect'; did you mean 'correct'"),
        ({"succeeded": torch.ones(4)}, "succeeded: expected a tensor of bools"),
    ):
        with pytest.raises(ValueError, match=said):
            batch(**columns)
    given = batch(succeeded=torch.tensor([True, False, True, False]))
    some = given.select(torch.tensor([3, 0]))
    assert some.named_rewards["format"].tolist() == [0.0, 0.0] and some.named_rewards["correct"].tolist() == [1.0, 1.0]
    assert some.success.tolist() == [False, True] and some.reward_weights == given.reward_weights
    assert given.pass_rate.tolist() == [0.5] * 4 and given.with_rewards(given.rewards).pass_rate.tolist() == [
        1,
        1,
        1,
        1,
    ]
    view = given.restricted(frozenset({"rewards"}), "Mine")
    with pytest.raises(UndeclaredColumn, match="Mine reads the column 'named_rewards'"):
        _ = view.named_rewards
    with pytest.raises(UndeclaredColumn, match="'rewards'"):
        _ = given.restricted(frozenset({"group"}), "Mine").success
