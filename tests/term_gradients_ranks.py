"""Run by torchrun from test_term_gradients.py: the diagnostics of a step's first update; saved by rank 0.

usage: term_gradients_ranks.py MODEL REFERENCE OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import sys

import torch

import algorithms
import upge
from tests.models import trajectories
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.diagnostics import NO_DIAGNOSTICS, Diagnostics, merged, term_gradients
from upge.train.distributed import connect, leave
from upge.train.engine import Engine, ReferencePolicy
from upge.train.lr_schedule import LearningRates
from upge.train.metrics import step_metrics
from upge.train.update import Updater

LR = 1e-2


def mixed() -> upge.Algorithm:
    """HPT with an entropy bonus and a KL: two terms that exclude each other and regularizers over all rollouts."""
    node = algorithms.read("hpt")
    mean = {"coefficient": 0.1, "reduction": {"_target_": "upge.TokenMean"}}
    reverse = {"_target_": "upge.LogRatio", "target": "reference"}
    node.regularizers = {
        "entropy": {"_target_": "upge.EntropyBonus", **mean},
        "kl": {"_target_": "upge.DivergencePenalty", **mean, "advantage": reverse},
    }
    return algorithms.compose(node, "mixed")


def main(model: str, other: str, output: str, budget: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=LR, max_grad_norm=0.0, mini_batches=1, micro_batch_tokens=int(budget))
    results, reference = {}, ReferencePolicy(ModelConfig(path=other), world)
    asked = {"diagnosed": Diagnostics(top_tokens=True, term_gradients=True), "plain": NO_DIAGNOSTICS}
    for name, diagnostics in asked.items():
        engine = Engine(ModelConfig(path=model), config, world)
        updater = Updater(engine, mixed(), config, reference=reference)
        report = updater.update(trajectories(), 0, LearningRates(LR), diagnostics=diagnostics)
        if name == "diagnosed":
            results["figures"] = step_metrics(report, world.gather(report.sums))
            tops = merged(top for of_rank in world.gather(report.tops) for top in of_rank)
            results["top"] = [(one.term, one.trajectory.index, one.gate, one.weights) for one in tops]
        updater.update(trajectories(seed=1), 1, LearningRates(LR), diagnostics=diagnostics)
        results[name] = {key: weight.clone() for key, weight in engine.named_weights()}
    batch = updater.fill(trajectories(), 0)
    plan = updater.algorithm.plan(batch.columns)
    parts = term_gradients(plan, lambda one: updater.gradient(batch, [one]), world.device)
    whole = updater.gradient(batch, [(1.0, plan)])
    total = [sum(pieces) for pieces in zip(*parts.values(), strict=True)]
    results["rest"] = world.gather(max(float((a - b).abs().max()) for a, b in zip(total, whole, strict=True) if len(a)))
    results["largest"] = world.gather(max(float(b.abs().max()) for b in whole if len(b)))
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
