"""The trainer evaluates parts of reach 'batch' by one forward pass before each update."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import algorithms
import upge
from tests.models import save_random_model, trajectories
from tests.upge.test_batch_reach import ALGORITHMS, LikelyHalf, grpo
from tests.upge.train.test_update import padded_logprobs
from tests.upge.train.test_update_columns import PlainEngine
from upge.errors import Interrupted
from upge.train.config import OptimizerConfig
from upge.train.diagnostics import Diagnostics
from upge.train.lr_schedule import LearningRates
from upge.train.sample import assemble
from upge.train.step_batch import update_rows
from upge.train.update import Updater

LR = 0.05


@dataclass(frozen=True)
class Slow(upge.StabilizationMask):
    """1 for the tokens whose ratio is below the mean of the update's tokens, those without an advantage included."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "behavior_logprobs"})
    reach: ClassVar[str] = "batch"

    def __call__(self, batch: upge.Trajectories, advantages: torch.Tensor) -> torch.Tensor:
        log_ratio = batch.log_importance_ratio
        return (log_ratio <= log_ratio[batch.response_mask].mean() + 1e-6).to(log_ratio.dtype)


BOTH = grpo(mask=upge.AllOf((upge.PPOClip(), LikelyHalf(), Slow())))


def plain_updates(folder, algorithm: upge.Algorithm, config: OptimizerConfig) -> list[torch.Tensor]:
    """The gradients of plain torch, whose plans see the log-probs of all tokens of each update at its time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    members = trajectories()
    before = padded_logprobs(model, members)[0].detach()
    whole = dataclasses.replace(assemble(members, 0), behavior_logprobs=before)
    cuts = update_rows(members, config.mini_batches)
    plans, gradients = algorithm.plans(whole, cuts), []
    for _ in range(config.epochs):
        for rows, plan in zip(cuts, plans, strict=True):
            logprobs, entropies = padded_logprobs(model, [members[row] for row in rows.tolist()])
            batch = whole.select(rows, logprobs, entropies=entropies, row=torch.arange(len(rows)))
            loss = plan.with_current(batch).estimate(batch).loss
            gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            if not loss.requires_grad or not any(bool(g.any()) for g in gradient):
                continue
            gradients.append(torch.cat([g.flatten() for g in gradient]))
            with torch.no_grad():
                for parameter, own in zip(model.parameters(), gradient, strict=True):
                    parameter -= LR * own
    return gradients


@pytest.mark.parametrize(("mini_batches", "epochs", "budget"), [(1, 1, 10_000), (1, 1, 40), (2, 1, 60), (2, 2, 60)])
def test_updates_are_those_of_plain_torch(tmp_path, mini_batches, epochs, budget):
    """For one micro-batch or many; later epochs rank the tokens again, under the policy of that time."""
    folder = save_random_model(tmp_path)
    config = OptimizerConfig(lr=LR, mini_batches=mini_batches, epochs=epochs, micro_batch_tokens=budget)
    engine = PlainEngine(folder)
    Updater(engine, BOTH, config).update(trajectories(), 0, LearningRates(LR))
    expected = plain_updates(folder, BOTH, config)
    assert len(engine.gradients) == len(expected) == mini_batches * epochs
    for a, b in zip(engine.gradients, expected, strict=True):
        # Log-probs are kept in float32 between passes.
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_one_pass_is_made_for_each_update_and_none_for_others(tmp_path):
    folder = save_random_model(tmp_path)
    for algorithm, expected in ((BOTH, 1), (ALGORITHMS["all"], 1), (algorithms.load("grpo"), 0)):
        engine, passes = PlainEngine(folder), []
        forward = engine.logprobs
        engine.logprobs = lambda packed, entropy=False, f=forward, p=passes: p.append(entropy) or f(packed, entropy)
        config = OptimizerConfig(lr=LR, micro_batch_tokens=10_000)
        report = Updater(engine, algorithm, config).update(trajectories(), 0, LearningRates(LR))
        assert passes == [algorithm is ALGORITHMS["all"]] * expected, "with entropies only where they are read"
        assert engine.without_gradient == 0 and len(report.grad_norms) == 1


def test_the_report_counts_what_contributed(tmp_path):
    """Groups without an advantage are part of the ranking, but they have no signal."""
    config = OptimizerConfig(lr=LR)
    report = Updater(PlainEngine(save_random_model(tmp_path)), BOTH, config).update(
        trajectories(), 0, LearningRates(LR)
    )
    assert report.active.no_signal_prompts == pytest.approx(2 / 5)


@dataclass(frozen=True)
class Uncertainty(upge.AdvantageEstimator):
    """A live advantage."""

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "entropies"})

    def __call__(self, batch):
        return batch.rewards[:, None] * batch.entropies.detach()


def test_the_advantage_that_a_ranking_sees_has_its_columns(tmp_path):
    """It is evaluated in the same pass, also if it reads entropies and the mask does not."""
    folder = save_random_model(tmp_path)
    algorithm, config = grpo(mask=LikelyHalf(), advantage=Uncertainty()), OptimizerConfig(lr=LR)
    engine = PlainEngine(folder)
    Updater(engine, algorithm, config).update(trajectories(), 0, LearningRates(LR))
    (expected,) = plain_updates(folder, algorithm, config)
    assert float((engine.gradients[0] - expected).norm()) <= 1e-5 * float(expected.norm())


@dataclass(frozen=True)
class Nothing(LikelyHalf):
    """Stops every token."""

    def __call__(self, batch, advantages):
        return torch.zeros_like(advantages)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_update_with_nothing_left_is_left_out(tmp_path, epochs):
    engine = PlainEngine(save_random_model(tmp_path))
    updater = Updater(engine, grpo(mask=Nothing()), OptimizerConfig(lr=LR, mini_batches=2, epochs=epochs))
    report = updater.update(trajectories(), 0, LearningRates(LR))
    assert engine.gradients == [] and list(report.grad_norms) == []
    assert report.sums.gap_tokens > 0, "sampler and trainer are compared in every step"
    assert report.active.no_signal_prompts == 1


def test_gradients_beside_the_update_are_evaluated_too(tmp_path):
    """Those of single terms, for diagnostics, and those of a validation objective."""
    engine = PlainEngine(save_random_model(tmp_path))
    engine.dot = lambda a, b: sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    def take():
        gradients = [p.grad.clone() for p in engine.policy.parameters()]
        engine.policy.zero_grad()
        return gradients

    engine.take_gradient = take
    updater = Updater(engine, BOTH, OptimizerConfig(lr=LR))
    report = updater.update(
        trajectories(), 0, LearningRates(LR), diagnostics=Diagnostics(term_gradients=True, top_tokens=False)
    )
    assert report.metrics["rl/grad_norm"] == pytest.approx(report.grad_norms[0], rel=1e-6)


def test_only_the_first_update_can_be_interrupted(tmp_path):
    """An interruption in the pass of a later update would leave half a step."""
    engine, polls = PlainEngine(save_random_model(tmp_path)), []
    updater = Updater(engine, BOTH, OptimizerConfig(lr=LR, epochs=2), poll=lambda: polls.append(len(engine.gradients)))
    updater.update(trajectories(), 0, LearningRates(LR))
    assert polls and set(polls) == {0}

    def stop():
        raise Interrupted("asked")

    engine.drop_gradient = lambda: None
    updater = Updater(engine, BOTH, OptimizerConfig(lr=LR), poll=stop)
    count = len(engine.gradients)
    with pytest.raises(Interrupted):
        updater.update(trajectories(), 0, LearningRates(LR))
    assert len(engine.gradients) == count
