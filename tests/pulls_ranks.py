"""Run by torchrun from test_pulls.py: what a step's first update looks like to a witness; saved by rank 0.

usage: pulls_ranks.py MODEL OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import sys

import torch

import algorithms
import upge
from tests.models import trajectories
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine
from upge.train.pulls import pulls
from upge.train.rates import Rates
from upge.train.tally import step_metrics
from upge.train.update import Updater
from upge.train.witness import NOTHING, Watch, heaviest

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
    found = {}
    for name, watch in (("watched", Watch(tokens=True, pulls=True)), ("plain", NOTHING)):
        engine = Engine(ModelConfig(path=model), config, world)
        updater = Updater(engine, mixed(), config)
        report = updater.update(trajectories(), 0, Rates(LR), watch=watch)
        if name == "watched":
            tallies = world.gather(report.tally)
            found["figures"] = step_metrics(report, tallies)
            heavy = heaviest(one for tally in tallies for one in tally.heaviest)
            found["heaviest"] = [(one.term, one.row, one.gate, one.weights) for one in heavy]
        updater.update(trajectories(seed=1), 1, Rates(LR), watch=watch)
        found[name] = {key: weight.clone() for key, weight in engine.named_weights()}
    batch = updater.fill(trajectories(), 0)
    plan = updater.algorithm.plan(batch.columns)
    parts = pulls(plan, lambda one: updater.gradient(batch, [one]), world.device)
    whole = updater.gradient(batch, [(1.0, plan)])
    total = [sum(pieces) for pieces in zip(*parts.values(), strict=True)]
    found["rest"] = world.gather(max(float((a - b).abs().max()) for a, b in zip(total, whole, strict=True) if len(a)))
    found["largest"] = world.gather(max(float(b.abs().max()) for b in whole if len(b)))
    if world.is_main:
        torch.save(found, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
