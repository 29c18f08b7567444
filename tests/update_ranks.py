"""Run by torchrun from test_update.py: the gradients of some algorithms under ZeRO-3, saved by rank 0.

usage: update_ranks.py MODEL OUTPUT TOKEN_BUDGET NAME...
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from tests.compositions import load
from tests.models import trajectories
from upge.train.collect import assemble
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine
from upge.train.tally import Tally
from upge.train.update import Batch, Rates, Updater


def main(model: str, output: str, budget: str, *names: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=0.0, max_grad_norm=0.0, micro_batch_tokens=int(budget))
    engine = Engine(ModelConfig(path=model), config, world)
    from deepspeed.utils import safe_get_full_grad

    found, batch = {}, trajectories()
    for name in names:
        updater = Updater(engine, load(name), config)
        columns = assemble(batch, step=7)
        updater.accumulate(Batch(columns, batch), updater.algorithm.plan(columns), Tally(), on_policy=True)
        gradients = {n: safe_get_full_grad(p) for n, p in engine.network.named_parameters()}
        found[name] = {n: g.clone() for n, g in gradients.items()}
        found[name]["norm"] = torch.tensor(engine.step(lr=0.0).grad_norm)
    # At a learning rate of 0 the policy stays where it sampled, so both updates must have the on-policy gradient.
    twice = Updater(engine, load("grpo"), dataclasses.replace(config, mini_batches=2))
    found["two updates"] = torch.tensor(twice.update(batch, 7, Rates(0.0)).grad_norms)
    if world.is_main:
        torch.save(found, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
