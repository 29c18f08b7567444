"""Which objective an estimator climbs: the objectives' gradients by brute force, and estimators that are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import upge
from experiments import theory as docs
from tests.upge.theory.test_theory_enumerate import EXACT, RAGGED, algorithm, reward
from upge.theory.draws import PROBES, Evaluator, Setting, all_groups
from upge.theory.enumerate import SoftmaxPolicy, expectation
from upge.theory.objectives import compared, comparison, objectives

PROMPTS = [docs.prompt(rate, seed) for seed, rate in enumerate((0.2, 0.6, 0.9))]


@dataclass(frozen=True)
class Successes(upge.AdvantageEstimator):
    """R over the group's mean reward, 0 where no rollout earns anything: (1/K) Σ over K successes, no baseline."""

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "is_demonstration"})

    def __call__(self, batch):
        mean = batch.group_mean(batch.rewards)
        return torch.where(mean > 0, batch.rewards / mean, 0.0)[:, None] * batch.response_mask


@pytest.mark.parametrize("n", [2, 3])
def test_the_gradients_of_the_objectives_of_success_equal_autograd(n: int) -> None:
    """Pass@n by enumerating all groups; the terms of the logarithm as they are written."""
    rewards, logits = reward(RAGGED), RAGGED.logits.clone().requires_grad_()
    probabilities = SoftmaxPolicy(logits, RAGGED.horizon).probabilities
    rate = (probabilities * rewards).sum()
    groups = itertools.product(range(len(rewards)), repeat=n)
    solved = torch.stack([probabilities[list(g)].prod() for g in groups if float(rewards[list(g)].max()) == 1])
    values = {
        "E[R]": rate,
        "log p": rate.log(),
        "log p, n−1 terms": -sum((1 - rate) ** k / k for k in range(1, n)),
        "log p, n terms": -sum((1 - rate) ** k / k for k in range(1, n + 1)),
        "pass@n": solved.sum(),
    }
    actual = objectives(Setting(RAGGED, rewards), n)
    assert list(actual) == list(values)
    for name, value in values.items():
        (expected,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert torch.allclose(actual[name], expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("n", [2, 4])
def test_what_dividing_by_the_mean_reward_climbs(n: int) -> None:
    """Without a baseline the first n terms of log p (arXiv 2602.02710). The mean as a baseline costs the last one,

    because a group without a success, where the baseline is not subtracted, is what that term is about.
    """
    climbed = {part: comparison(algorithm(part()), PROMPTS, group_size=n) for part in (upge.MeanNormalized, Successes)}
    for part, terms in ((upge.MeanNormalized, "log p, n−1 terms"), (Successes, "log p, n terms")):
        assert climbed[part][terms].bias < EXACT and climbed[part][terms].scale == pytest.approx(1)
        others = [one.bias for name, one in climbed[part].items() if name not in (terms, "E[R]" * (n == 2))]
        assert min(others) > 0.01


def test_a_single_prompt_does_not_tell_objectives_apart() -> None:
    """Every objective of p has the direction of ∇p, so cosines are 1, and only lengths differ."""
    one = comparison(algorithm(upge.MeanNormalized()), PROMPTS[:1], group_size=4)
    names = ["E[R]", "log p", "log p, n terms", "pass@n"]
    assert all(one[name].bias < 1e-7 and one[name].cosine == pytest.approx(1) for name in names)
    rate = 0.2
    lengths = {name: one[name].scale for name in names}
    assert lengths["E[R]"] == pytest.approx(sum((1 - rate) ** k for k in range(3)))
    assert lengths["pass@n"] == pytest.approx(lengths["E[R]"] / (4 * (1 - rate) ** 3))


@pytest.mark.parametrize(
    ("name", "objective"),
    [("rloo", "E[R]"), ("opd", "−KL(π‖ν)"), ("sft", "−KL(π_β‖π)")],
)
def test_algorithms_that_are_known(name: str, objective: str) -> None:
    report = comparison(docs.load(name, length=1), PROMPTS, group_size=2)
    assert report[objective].bias < EXACT and report[objective].scale == pytest.approx(1)
    assert min(one.bias for other, one in report.items() if other not in (objective, "log p, n−1 terms")) > 0.01


def test_prompts_that_are_redrawn_count_by_their_chance_to_be_kept() -> None:
    """Groups without a difference have no gradient under leave-one-out, so leaving them out changes no objective."""
    plain = algorithm(upge.LeaveOneOut())
    chosen = upge.Algorithm("made here", plain.terms, sampling=upge.DynamicSampling(upge.PassRateBetween()))
    assert expectation(chosen, PROMPTS[0], group_size=3).accepted < 0.9
    report = comparison(chosen, PROMPTS, group_size=3)["E[R]"]
    assert report.bias < EXACT and report.scale == pytest.approx(1)


def test_the_bias_is_that_of_the_best_scale() -> None:
    mean, target = torch.tensor([3.0, 1.0, 0.5]).double(), torch.tensor([1.0, 2.0, -1.0]).double()
    actual = compared(mean, target)
    scales = torch.linspace(0, 2, 20001, dtype=torch.float64)[:, None]
    distances = (scales * mean - target).norm(dim=1) / target.norm()
    assert actual.bias == pytest.approx(float(distances.min()), abs=1e-6)
    assert 1 / actual.scale == pytest.approx(float(scales[distances.argmin()]), abs=1e-3)
    assert actual.bias == pytest.approx(math.sqrt(1 - actual.cosine**2))
    away = compared(-mean, target)
    assert (away.bias, away.scale) == (1, 0) and away.cosine == pytest.approx(-actual.cosine)
    assert compared(torch.zeros(3).double(), target).bias == 1


def test_objectives_need_successes_and_failures() -> None:
    for rewards in (torch.ones(7), torch.zeros(7), torch.linspace(0, 1, 7)):
        with pytest.raises(upge.ConfigError, match="rewards must be 0 or 1, and both must occur"):
            objectives(Setting(RAGGED, rewards), 2)


# Groups that are evaluated together.


@pytest.mark.parametrize("off_policy", [False, True])
def test_groups_that_are_evaluated_together_have_the_gradients_of_separate_batches(off_policy: bool) -> None:
    setting = docs.setting(off_policy)
    for one in docs.shipped():
        if off_policy and one.needs.demonstrations:
            continue
        groups = [rows for rows, _ in all_groups(one, setting, 3, 1)[0]]
        evaluator = Evaluator(one, setting)
        some = groups[:: max(1, len(groups) // 5)]
        alone = torch.stack([evaluator.gradient([rows]) for rows in some])
        assert torch.allclose(evaluator.gradients(some), alone, rtol=1e-10, atol=1e-13), one.name


def test_an_algorithm_whose_groups_depend_on_each_other_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whitening takes mean and variance over the whole batch, which no divisor shows."""
    one, setting = docs.load("reinforce_plus_plus"), docs.setting()
    groups = [rows for rows, _ in all_groups(one, setting, 3, 1)[0]][::9]
    evaluator = Evaluator(one, setting)
    alone = torch.stack([evaluator.gradient([rows]) for rows in groups])
    assert len(groups) > PROBES and torch.equal(evaluator.gradients(groups), alone)
    assert not torch.allclose(evaluator._of_each(groups), alone, atol=1e-3)
    monkeypatch.setattr(Evaluator, "gradient", lambda self, groups: torch.zeros(3, 3).double())
    assert not Evaluator(docs.load("grpo"), setting).gradients(groups).any(), (
        "a group that differs alone was not noticed"
    )
