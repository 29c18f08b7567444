"""Run by torchrun from test_term_gradients.py: the diagnostics of a step's first update; saved by rank 0.

usage: pulls_ranks.py MODEL OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import sys

import torch

import algorithms
import upge
from tests.models import trajectories
from upge.train.config import LearningRates, ModelConfig, OptimizerConfig
from upge.train.diagnostics import NO_DIAGNOSTICS, Diagnostics, merged, term_gradients
from upge.train.distributed import connect, leave
from upge.train.engine import Engine
from upge.train.metrics import step_metrics
from upge.train.update import Updater

LR = 1e-2


def mixed() -> upge.Algorithm:
    """HPT with an entropy bonus: two terms that exclude each other and a regularizer over all rollouts."""
    node = algorithms.read("hpt")
    bonus = {"_target_": "upge.EntropyBonus", "coefficient": 0.1, "reduction": {"_target_": "upge.TokenMean"}}
    node.regularizers = {"entropy": bonus}
    return algorithms.compose(node, "mixed")


def main(model: str, output: str, budget: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=LR, max_grad_norm=0.0, mini_batches=1, micro_batch_tokens=int(budget))
    results = {}
    asked = {"diagnosed": Diagnostics(top_tokens=True, term_gradients=True), "plain": NO_DIAGNOSTICS}
    for name, diagnostics in asked.items():
        engine = Engine(ModelConfig(path=model), config, world)
        updater = Updater(engine, mixed(), config)
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
