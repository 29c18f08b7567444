"""Run by torchrun from test_learner.py: held-out slopes, interleaved updates and a critic's goals; saved by rank 0.

usage: learner_ranks.py MODEL OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import torch

import algorithms
import upge
from tests.models import trajectories
from upge.train.collect import Collection
from upge.train.config import CriticConfig, ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import CriticEngine, Engine, ReferencePolicy
from upge.train.learner import Learner, Models
from upge.train.lr_schedule import LearningRates
from upge.train.metrics import step_metrics

LR, SIZE, BONUS = 0.3, 3, 0.5
#: Measures in every other step, and averages two measurements.
NOISY = ["terms.sft.gate.every=2", "terms.sft.gate.smoothing=0.5"]
TOKENS = {"_target_": "upge.TokenMean"}
MU = {"_target_": "upge.MetaGradient", "start": 0.6, "rate": 2.0, "entropy_rate": 0.25, "every": 1, "low": 0.01}


def mixed() -> upge.Algorithm:
    """Dr. GRPO and maximum likelihood in shares 1 - μ and μ, and an entropy bonus that has no part in μ."""
    node = algorithms.read("dr_grpo")
    node.terms.sft = algorithms.read("sft").terms.sft
    node.terms.sft.gate = MU
    node.terms.rl.gate = {"_target_": "upge.Complement", "gate": MU}
    node.validation = algorithms.read("sft")
    node.regularizers = {"entropy": {"_target_": "upge.EntropyBonus", "coefficient": BONUS, "reduction": TOKENS}}
    return algorithms.compose(node, "mixed")


class Given:
    """A collector of trajectories that are there already: held-out ones have another seed."""

    def collect(self, step: int, stream: str = "train", step_in_stage: int | None = None, prompts=None, replay=None):
        return Collection(trajectories(seed=step if stream == "train" else 50 + step), {"time/rollout": 0.0})

    def demonstrations(self, indices, step):
        made = {t.example: t for t in trajectories() if t.is_demonstration}
        return [made[i] for i in indices]


def main(model: str, output: str, budget: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=LR, max_grad_norm=0.0, micro_batch_tokens=int(budget))
    settings = ModelConfig(path=model)
    models = Models(
        Engine(settings, config, world),
        CriticEngine(settings, CriticConfig(lr=1e-3), config, world),
        ReferencePolicy(settings, world),
    )
    examples = [SimpleNamespace(demonstrations=() if i == 2 else ((1,),)) for i in range(5)]

    def learner(algorithm: upge.Algorithm) -> Learner:
        return Learner(algorithm, models, config, examples, lambda algorithm, reserve: Given())

    results = {}
    meta = learner(mixed())
    memory = meta.memory()
    collected = meta.collect(0, 0, memory)
    # The slope is that of the rate at hand; the update then leaves the policy where it is for what follows.
    results["slope"] = meta._slope(meta._slope_gates(0)[0], collected, 0, LearningRates(LR), memory)
    report, figures = meta.update(collected, 0, LearningRates(0.0), memory)
    results["norm"], results["state"] = report.grad_norms[0], figures["state/mu"]
    meta.remember({"state/mu_utility_slope": 0.05, "entropy": 0.3}, 0, memory)
    results["mu"] = memory.variables["mu"]

    noisy = learner(algorithms.load("gac", NOISY))
    memory = noisy.memory()
    results["noise"] = []
    for step in range(3):
        # They carry the log-probs of a policy that is not the present one.
        older = [
            dataclasses.replace(t, behavior_logprobs=(-0.5,) * len(t.response_ids)) for t in trajectories(seed=step)
        ]
        given = dataclasses.replace(collected, trajectories=older)
        _, figures = noisy.update(given, step, LearningRates(0.0), memory)
        noisy.remember(figures, step, memory)
        results["noise"].append((figures, dict(memory.variables)))

    critic = learner(algorithms.load("ppo", ["critic.clip=null"]))
    report, _ = critic.update(critic.collect(0, 0, critic.memory()), 0, LearningRates(0.0, 1e-3), critic.memory())
    sums = world.gather(report.sums)
    results["critic"] = [step_metrics(report, sums)]
    report, _ = critic.update(critic.collect(0, 0, critic.memory()), 0, LearningRates(None, 1e-3), critic.memory())
    sums = world.gather(report.sums)
    results["critic"].append(step_metrics(report, sums))
    results["policy updates"] = len(report.grad_norms)

    aside = learner(algorithms.load("relift", [f"interleaved_update.size={SIZE}"]))
    memory = aside.memory()
    results["interleaved_updates"] = []
    for step in range(4):
        _, figures = aside.update(aside.collect(0, 0, memory), step, LearningRates(1e-3), memory)
        results["interleaved_updates"].append((figures["interleaved_update/updates"], list(memory.remembered)))
    results["optimizer"] = models.policy._moments.in_use
    for updater in (aside.updater, aside.interleaved):
        updater.config = dataclasses.replace(updater.config, skip_grad_norm=1e-9)
    before = {name: weight.clone() for name, weight in models.policy.named_weights()}
    memory.remembered = [0, 1, 3]
    report, figures = aside.update(aside.collect(0, 0, memory), 4, LearningRates(1e-3), memory)
    results["above limit"] = (
        report.above_limit,
        figures["interleaved_update/updates"],
        figures["interleaved_update/updates_above_limit"],
    )
    after = {name: weight.clone() for name, weight in models.policy.named_weights()}
    results["unmoved"] = all(torch.equal(after[name], weight) for name, weight in before.items())
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
