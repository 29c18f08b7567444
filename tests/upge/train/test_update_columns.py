"""Log-probs of the policy that sampled: none is computed that the first update's forward pass gives, none is missed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import algorithms
import upge
from tests.models import save_random_model, trajectories
from tests.upge.train.test_update import padded_logprobs
from upge.train.config import OptimizerConfig
from upge.train.deepspeed_module import StepResult
from upge.train.lr_schedule import LearningRates
from upge.train.micro_batches import Costs
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack
from upge.train.step_batch import update_rows
from upge.train.update import Update, Updater

LR = 0.05


class PlainEngine:
    """One process, float64, plain gradient steps; remembers the gradient of each and what was run without one."""

    def __init__(self, folder) -> None:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.policy, self.costs = PackedPolicy(network), Costs.of(network)
        self.world = SimpleNamespace(size=1, rank=0, is_main=True, device=torch.device("cpu"))
        self.world.gather, self.world.broadcast = lambda own: [own], lambda own: own
        self.gradients, self.without_gradient = [], 0

    def pack(self, pairs):
        return pack(pairs)

    def forward(self, pairs):
        self.without_gradient += len(pairs)
        packed = pack(pairs)
        return packed.pad(self.policy(packed)[0])

    def logprobs(self, packed, entropy=False):
        return self.policy(packed, entropy=entropy)

    def loss(self, packed, objective):
        return self.policy(packed, objective=objective)

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr, limit=0.0):
        actual = [p.grad for p in self.policy.parameters()]
        self.gradients.append(torch.cat([g.flatten() for g in actual]).clone())
        with torch.no_grad():
            for parameter, gradient in zip(self.policy.parameters(), actual, strict=True):
                parameter -= lr * gradient
        self.policy.zero_grad()
        return StepResult(True, float(self.gradients[-1].norm()))


def expected_updates(engine: PlainEngine, algorithm, config: OptimizerConfig) -> list[torch.Tensor]:
    """The plain way: log-probs of all trajectories before the first update, then one update after the other."""
    updater = Updater(engine, algorithm, config)
    whole = updater.fill(trajectories(), 0)
    pairs = [(t.prompt_ids, t.response_ids) for t in whole.trajectories]
    behavior = engine.forward(pairs).detach().float()
    whole = whole._replace(columns=dataclasses.replace(whole.columns, behavior_logprobs=behavior))
    cuts = update_rows(whole.trajectories, config.mini_batches)
    plans = algorithm.plans(whole.columns, cuts)
    for _ in range(config.epochs):
        for rows, plan in zip(cuts, plans, strict=True):
            if bool(plan.contributing.any()):
                updater.run_micro_batches(Update(whole.select(rows), plan, rows), number=2)
                engine.step(LR)
    return engine.gradients


@pytest.mark.parametrize(("mini_batches", "epochs"), [(1, 1), (2, 1), (5, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", ["grpo", "gspo", "hpt"])
def test_updates_are_those_with_all_columns(tmp_path, name, mini_batches, epochs):
    folder, algorithm = save_random_model(tmp_path), algorithms.load(name)
    config = OptimizerConfig(lr=LR, mini_batches=mini_batches, epochs=epochs, micro_batch_tokens=120)
    ours = PlainEngine(folder)
    report = Updater(ours, algorithm, config).update(trajectories(), 0, LearningRates(LR))
    cuts = update_rows(trajectories(), mini_batches)
    plans = algorithm.plans(Updater(ours, algorithm, config).fill(trajectories(), 0).columns, cuts)
    kept = [int(plan.contributing.sum()) for plan in plans]
    first = next(i for i, count in enumerate(kept) if count)
    read = [int(plan.reading("behavior_logprobs").sum()) for plan in plans]
    assert ours.without_gradient == sum(read) - read[first]
    assert (sum(read) == sum(kept)) == (name != "hpt"), "no part of hpt's demonstrations reads it"
    expected = expected_updates(PlainEngine(folder), algorithm, config)
    assert len(ours.gradients) == len(expected) == len(report.grad_norms) == epochs * sum(map(bool, kept))
    for update, (a, b) in enumerate(zip(ours.gradients, expected, strict=True)):
        # The column is kept in float32, so ratios and with them gradients are right to its rounding.
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()), update
    assert bool(expected[0].any())


@dataclass(frozen=True)
class MeanReward(upge.Gate):
    """The mean reward of all trajectories that it sees."""

    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})

    def __call__(self, batch: upge.Trajectories) -> torch.Tensor:
        return batch.rewards.mean().expand(len(batch))


def test_whitening_and_gates_see_the_whole_step(tmp_path):
    """Two updates at a learning rate of 0, with two prompts each, against the written objective.

    A = (R - mean R)/√(var R + 1e-8) over the tokens of the step, gate = mean R of the step, divisor = the update's own
    tokens. The rewards of the first prompts differ from those of the last, and so would statistics of one update.
    """
    folder, members = save_random_model(tmp_path), [t for t in trajectories(groups=4) if not t.is_demonstration]
    members = [dataclasses.replace(t, reward=1.0) if t.group == 2 else t for t in members]
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), upge.Whitened(upge.ReturnToGo()))
    term = upge.Term("rollouts", MeanReward(), estimator, upge.TokenMean())
    engine = PlainEngine(folder)
    config = OptimizerConfig(mini_batches=2, micro_batch_tokens=120)
    Updater(engine, upge.Algorithm("test", {"rl": term}), config).update(members, 0, LearningRates(0.0))
    rewards = torch.tensor([t.reward for t in members for _ in t.response_ids], dtype=torch.float64)
    gate = sum(t.reward for t in members) / len(members)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert len(engine.gradients) == 2
    for gradient, groups in zip(engine.gradients, ({0, 1}, {2, 3}), strict=True):
        own = [t for t in members if t.group in groups]
        assert sum(t.reward for t in own) / len(own) != gate
        logprobs, _ = padded_logprobs(model, own)
        advantages = [(t.reward - rewards.mean()) / (rewards.var() + 1e-8).sqrt() for t in own]
        sums = [row[: len(t.response_ids)].sum() for row, t in zip(logprobs, own, strict=True)]
        objective = gate * sum(a * s for a, s in zip(advantages, sums, strict=True))
        loss = -objective / sum(len(t.response_ids) for t in own)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm())


def test_what_is_left_out_is_counted(tmp_path):
    """Group 0 fails and group 1 succeeds altogether: GRPO learns nothing from them, nor from demonstrations."""
    report = Updater(PlainEngine(save_random_model(tmp_path)), algorithms.load("grpo"), OptimizerConfig()).update(
        trajectories(), 0, LearningRates(LR)
    )
    tokens = {t: len(t.prompt_ids) + len(t.response_ids) - 1 for t in trajectories()}
    total = sum(tokens.values())
    kept = sum(n for t, n in tokens.items() if t.group > 1 and not t.is_demonstration)
    assert report.active.skipped_tokens == pytest.approx(1 - kept / total)
    prompts = {t.group: len(t.prompt_ids) for t in trajectories() if t.group > 1}
    assert report.sums.computed_tokens == kept - 3 * sum(prompts.values())
    assert report.sums.trajectories == 12
