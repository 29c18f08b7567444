"""Run by torchrun from test_deepspeed_settings.py: an engine with a secondary partition; saved by rank 0.

usage: secondary_ranks.py MODEL OUTPUT SIZE
"""

from __future__ import annotations

import sys

import torch

from tests.engine_ranks import accumulate, update, weights_of, whole
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import DeepspeedConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine


def main(model: str, output: str, size: str) -> None:
    world = connect()
    deepspeed = DeepspeedConfig(config={"zero_optimization": {"zero_hpz_partition_size": int(size)}})
    engine = Engine(ModelConfig(path=model), OptimizerConfig(weight_decay=0.1), world, deepspeed=deepspeed)
    accumulate(engine, 0)
    gradient = whole(engine, engine.take_gradient())
    for variant in (0, 1):
        assert update(engine, variant).applied
    weights = weights_of(engine)
    secondary = sum(p.ds_secondary_tensor is not None for p in engine.network.parameters())
    if world.is_main:
        torch.save({"gradient": gradient, "weights": weights, "secondary": secondary}, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
