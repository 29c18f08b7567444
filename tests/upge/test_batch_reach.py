"""Parts of reach 'batch': evaluated once on all tokens of an update, and then the same in any micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import algorithms
import upge
from upge.errors import ConfigError
from upge.testing import ConformanceError, check_algorithm, check_component, random_batch
from upge.testing.batches import select_rows
from upge.views import masked_mean


def mean_of(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens of the update."""
    return values[mask].sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class LikelyHalf(upge.StabilizationMask):
    """1 up to the median of the current log-probs, 0 above."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    reach: ClassVar[str] = "batch"

    def __call__(self, batch: upge.Trajectories, advantages: torch.Tensor) -> torch.Tensor:
        logprobs = batch.logprobs.detach()
        return (logprobs <= logprobs[batch.response_mask].median()).to(logprobs.dtype)


@dataclass(frozen=True)
class Centred(upge.AdvantageEstimator):
    """log π_θ minus its mean over the update's tokens."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    reach: ClassVar[str] = "batch"

    def __call__(self, batch: upge.Trajectories) -> torch.Tensor:
        logprobs, mask = batch.logprobs.detach(), batch.response_mask
        return (logprobs - mean_of(logprobs, mask)) * mask


@dataclass(frozen=True)
class Uncertain(upge.Gate):
    """1 for the responses whose mean entropy exceeds that of the update's tokens."""

    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    reach: ClassVar[str] = "batch"

    def __call__(self, batch: upge.Trajectories) -> torch.Tensor:
        entropies, mask = batch.entropies.detach(), batch.response_mask
        return (masked_mean(entropies, mask)[:, 0] > mean_of(entropies, mask)).to(entropies.dtype)


def grpo(gate: upge.Gate | None = None, **slots: upge.Component) -> upge.Algorithm:
    algorithm = algorithms.load("grpo")
    term = algorithm.terms["rl"]
    estimator = dataclasses.replace(term.estimator, **slots)
    term = dataclasses.replace(term, estimator=estimator, gate=gate or term.gate)
    return dataclasses.replace(algorithm, terms={"rl": term})


ALGORITHMS = {
    "mask": grpo(mask=LikelyHalf()),
    "wrapped": grpo(mask=upge.AllOf((upge.PPOClip(), LikelyHalf()))),
    "advantage": grpo(advantage=Centred()),
    "all": grpo(gate=Uncertain(), mask=LikelyHalf(), advantage=upge.Tempered(Centred())),
}


@pytest.mark.parametrize("name", ["wrapped", "all"])
def test_the_parts_conform_in_every_slot(name):
    """For any split, padding and order, and for a plan that is made before the forward pass."""
    algorithm = ALGORITHMS[name]
    assert check_algorithm(algorithm) is None
    assert algorithm.reach == "token" and algorithm.takes_chunks


@pytest.mark.parametrize("part", [LikelyHalf(), Centred(), Uncertain()])
def test_without_the_reach_the_split_matters(part):
    narrow = type(part.__class__.__name__, (type(part),), {"reach": "trajectory"})
    with pytest.raises(ConformanceError, match="declares reach 'trajectory' but depends on more"):
        check_component(narrow())


def test_a_plan_without_log_probs_says_what_it_needs():
    algorithm, batch = ALGORITHMS["mask"], random_batch()
    plan = algorithm.plan(dataclasses.replace(batch, logprobs=None, entropies=None))
    assert list(plan.pending) == ["terms.rl.estimator.mask"]
    message = (
        r"^terms\.rl\.estimator\.mask: LikelyHalf has reach 'batch', so before the first estimate it needs the current "
        r"log-probs of the whole batch; give them to `algorithm\.plan\(batch\)`, or call .*with_current\(batch\)"
    )
    with pytest.raises(ValueError, match=message):
        plan.estimate(batch)
    with pytest.raises(ValueError, match="with_current: found 3 trajectories, but the plan is of 20; give the whole"):
        plan.with_current(select_rows(batch, torch.arange(3)))
    with pytest.raises(ValueError, match="logprobs: LikelyHalf reads it, but this batch does not have it"):
        plan.with_current(dataclasses.replace(batch, logprobs=None))
    ready = plan.with_current(batch)
    assert not ready.pending and ready.with_current(batch) is ready
    assert torch.equal(ready.estimate(batch).weights, algorithm.estimate(batch).weights)


def test_a_plan_waits_for_the_planned_batch_in_its_order():
    """A part's values are kept by place in the batch, so those of another order would go to other tokens."""
    batch = random_batch()
    plan = ALGORITHMS["mask"].plan(dataclasses.replace(batch, logprobs=None, entropies=None))
    with pytest.raises(ValueError, match=r"with_current: .* in another order than in the planned batch; give .* order"):
        plan.with_current(select_rows(batch, torch.arange(len(batch)).flip(0)))


def test_a_gate_on_a_support_waits_without_the_advantage():
    """On a support the advantage reads distributions, which a pass before the update does not have."""
    algorithm, batch = algorithms.load("gkd"), random_batch()
    term = dataclasses.replace(algorithm.terms["distill"], gate=Uncertain())
    plan = dataclasses.replace(algorithm, terms={"distill": term}).plan(
        dataclasses.replace(batch, logprobs=None, entropies=None)
    )
    assert list(plan.pending) == ["terms.distill.gate"]
    current = dataclasses.replace(batch, teacher_logprobs=None)
    assert not plan.with_current(current).pending


def test_the_metrics_say_on_which_side_the_mask_stops_tokens():
    """Also once the mask is a table of numbers."""
    batch = random_batch()
    metrics = grpo(mask=upge.AllOf((upge.PPOClip(), LikelyHalf()))).estimate(batch).metrics
    assert metrics["rl/masked_above"] > 0
    assert metrics["rl/masked_above"] + metrics["rl/masked_below"] == pytest.approx(metrics["rl/masked_share"], abs=0.1)
    assert "rl/masked_above" not in grpo(mask=LikelyHalf()).estimate(batch).metrics


def test_other_algorithms_wait_for_nothing():
    batch = random_batch()
    plan = algorithms.load("grpo").plan(dataclasses.replace(batch, logprobs=None))
    assert not plan.pending and plan.with_current(batch) is plan


def test_the_pass_is_over_all_tokens_of_the_term_and_what_follows_over_fewer():
    """Groups that fail or succeed altogether have no advantage, but their tokens count in the median."""
    algorithm, batch = ALGORITHMS["mask"], random_batch()
    plan = algorithm.plan(dataclasses.replace(batch, logprobs=None, entropies=None))
    assert torch.equal(plan.contributing, ~batch.is_demonstration)
    ready = plan.with_current(batch)
    likely = batch.logprobs.detach()[batch.response_mask & ~batch.is_demonstration[:, None]].median()
    expected = (batch.logprobs.detach() <= likely) & batch.response_mask & ~batch.is_demonstration[:, None]
    factors = ready.estimate(batch).terms["rl"]
    own = batch.response_mask & ~batch.is_demonstration[:, None]
    assert torch.equal(factors.mask[own] == 1, expected[own])
    signal = (expected & (factors.advantages != 0)).any(dim=1)
    assert torch.equal(ready.contributing, signal) and 0 < int(signal.sum()) < int(plan.contributing.sum())


def test_the_result_is_of_the_policy_at_that_time():
    """The original plan can be evaluated again after an optimizer step; the batch of a plan is not remembered."""
    algorithm, batch = ALGORITHMS["advantage"], random_batch()
    plan = algorithm.plan(dataclasses.replace(batch, logprobs=None, entropies=None))
    moved = dataclasses.replace(batch, logprobs=2 * batch.logprobs.detach())
    first, second = (plan.with_current(b).estimate(b).terms["rl"].advantages for b in (batch, moved))
    assert torch.allclose(2 * first, second) and bool(first.any())


def test_updates_rank_their_own_tokens():
    algorithm, batch = ALGORITHMS["mask"], random_batch()
    halves = [torch.arange(10), torch.arange(10, 20)]
    plans = algorithm.plans(dataclasses.replace(batch, logprobs=None, entropies=None), halves)
    for rows, plan in zip(halves, plans, strict=True):
        half = dataclasses.replace(select_rows(batch, rows), row=None)
        own = half.response_mask & ~half.is_demonstration[:, None]
        mask = plan.with_current(half).estimate(half).terms["rl"].mask
        logprobs = half.logprobs.detach()
        assert torch.equal(mask[own] == 1, (logprobs <= logprobs[own].median())[own])


@dataclass(frozen=True)
class Masked(upge.Regularizer):
    coefficient: float
    reduction: upge.Reduction
    mask: upge.StabilizationMask
    source: upge.trajectories.Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: upge.Trajectories) -> torch.Tensor:
        return batch.logprobs


def test_a_regularizer_cannot_wait():
    with pytest.raises(ConfigError, match="Masked has reach 'batch' or wraps a part that has it.*write the penalty as"):
        Masked(0.1, upge.TokenMean(), LikelyHalf())
    assert Masked(0.1, upge.TokenMean(), upge.NoMask())


def test_a_support_takes_no_such_part():
    term = ALGORITHMS["mask"].terms["rl"]
    estimator = dataclasses.replace(term.estimator, denominator=upge.UnitDenominator(), advantage=upge.Surprisal())
    with pytest.raises(ConfigError, match="LikelyHalf looks beyond a token in the forward pass"):
        dataclasses.replace(term, estimator=estimator, support=upge.FullVocabulary())
