"""Run by torchrun from test_off_policy_ranks.py: how far off-policy an update of grpo is, saved by rank 0.

usage: off_policy_ranks.py MODEL OUTPUT TOKEN_BUDGET
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from tests.compositions import load
from tests.models import trajectories
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine
from upge.train.metrics import MetricSums
from upge.train.sample import assemble
from upge.train.step_batch import StepBatch
from upge.train.update import Update, Updater


def batch() -> StepBatch:
    """Rollouts of a sampler whose log-probs are made up, and of a behavior policy whose log-probs are near them."""
    members = trajectories()
    columns = assemble(members, 0)
    assert columns.sampler_logprobs is not None
    noise = torch.randn(columns.response_mask.shape, generator=torch.Generator().manual_seed(3))
    behavior = (columns.sampler_logprobs - 1 + 0.3 * noise).clamp(max=0.0)
    return StepBatch(dataclasses.replace(columns, behavior_logprobs=behavior), members)


def main(model: str, output: str, budget: str) -> None:
    world = connect()
    config = OptimizerConfig(lr=0.0, micro_batch_tokens=int(budget))
    algorithm, given = load("grpo"), batch()
    updater = Updater(Engine(ModelConfig(path=model), config, world), algorithm, config)
    update = Update(given, algorithm.plan(given.columns), torch.arange(len(given.trajectories)))
    passes = updater.run_micro_batches(update)
    sums = [one for of_rank in world.gather(passes.sums) for one in of_rank]
    if world.is_main:
        parts = sum(one.off_policy.sampler.responses[0] > 0 for one in sums)
        Path(output).write_text(json.dumps(MetricSums.total(sums).metrics() | {"micro_batches": int(parts)}))
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
