"""What a batch refuses and fills in, and its statistics of groups."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from upge.testing.batches import random_batch, select_rows
from upge.train.sample import Trajectory, assemble


def test_a_batch_without_demonstrations_need_not_say_so():
    ones = torch.ones(2, 3, dtype=torch.bool)
    batch = upge.Trajectories(-torch.ones(2, 3), ones, rewards=torch.ones(2), group=torch.tensor([0, 0]))
    assert batch.is_demonstration.tolist() == [False, False] and batch.finished is None


@pytest.mark.parametrize("column", ["logprobs", "behavior_logprobs", "sampler_logprobs", "reference_logprobs"])
def test_log_probs_above_0_are_refused(column):
    batch = trajectories([[0.5, 0.5], [0.5]], p_old=[[0.5, 0.5], [0.5]])
    ones = torch.zeros(2, 2, dtype=torch.float64)
    for value in (0.01, torch.inf):
        ones[0, 1] = value
        with pytest.raises(ValueError, match=rf"^{column}: found {value:g}, but the logarithm.*give log-probs"):
            dataclasses.replace(batch, **{column: ones})
    ones[0, 1], ones[1, 1] = 1e-4, 7.0  # a rounding error, and padding
    assert dataclasses.replace(batch, **{column: ones})


@pytest.mark.parametrize("name", ["grpo", "kl_cov"])
def test_a_batch_that_was_selected_is_planned_as_a_batch_of_its_own(name):
    """Its rows name those of the other batch, where a plan would look up other trajectories' numbers."""
    whole, algorithm = random_batch(pairs=False), algorithms.load(name)
    for rows in (torch.arange(10, 20), torch.randperm(20, generator=torch.Generator().manual_seed(0))):
        chosen = select_rows(whole, rows)
        own = dataclasses.replace(chosen, row=None)
        assert torch.equal(algorithm.estimate(chosen).weights, algorithm.estimate(own).weights)
        with pytest.raises(
            ValueError, match=r"^row: .* selected from another .*`dataclasses\.replace\(batch, row=None\)`"
        ):
            algorithm.plan(chosen)
        assert torch.equal(algorithm.plan(own).estimate(own).weights, algorithm.estimate(own).weights)


def test_group_statistics_are_over_rollouts():
    batch = trajectories([[0.5]] * 5, rewards=[1.0, 0.0, 0.25, 1.0, 1.0], group=[4, 4, 2, 4, 3], demonstrations=[3, 4])
    assert batch.group_sum(batch.rewards).tolist() == [1, 1, 0.25, 1, 0]
    assert batch.group_mean(batch.rewards).tolist() == [0.5, 0.5, 0.25, 0.5, 0], "the last group has no rollout"
    assert batch.group_sum(batch.rewards > 0.5, over="group").tolist() == [2, 2, 0, 2, 1]
    assert batch.group_mean(batch.rewards, over="group").tolist() == [2 / 3, 2 / 3, 0.25, 2 / 3, 1]
    with pytest.raises(ValueError, match="over: found 'all'"):
        batch.group_sum(batch.rewards, over="all")


def test_the_mean_of_equal_values_is_their_value():
    """The sum of three times 0.1, divided by 3, is not."""
    batch = trajectories([[0.5]] * 3, rewards=[0.1] * 3, group=[0] * 3)
    assert sum([0.1] * 3) / 3 != 0.1 and batch.group_mean(batch.rewards).tolist() == [0.1] * 3


def test_group_statistics_need_their_columns():
    view = trajectories([[0.5]]).restricted(frozenset({"rewards", "group"}), "Part")
    with pytest.raises(TypeError, match="Part reads the column 'is_demonstration' without declaring it"):
        view.group_mean(view.rewards)
    assert view.group_mean(view.rewards, over="group").tolist() == [0.0]


def test_the_trainers_batch_says_which_responses_were_cut():
    same = {"example": 0, "group": 0, "prompt_ids": (1,), "response_ids": (2, 3), "is_demonstration": False}
    members = [Trajectory(reward=1.0, finished=finished, **same) for finished in (True, False)]
    batch = assemble(members, 0)
    assert batch.finished.tolist() == [True, False]
    batch = dataclasses.replace(batch, logprobs=torch.full((2, 2), -1.0))
    plan = algorithms.load("reinforce", corrections=["overlong_filter"]).plan(batch)
    assert plan.active.tolist() == plan.contributing.tolist() == [True, False]
    assert plan.terms["rl"].weights.sum(dim=1).tolist() == [2 / 1024, 0], "the divisor counts one response"


def test_a_filter_of_cut_responses_needs_to_know_them():
    algorithm = algorithms.load("grpo", corrections=["overlong_filter"])
    with pytest.raises(upge.ConfigError, match=r"terms.rl.gate.*reads \['finished'\], which is not provided"):
        algorithm.check(group_size=4, provided=("behavior_logprobs",))
    assert algorithm.check(group_size=4, provided=("behavior_logprobs", "finished")) is None
