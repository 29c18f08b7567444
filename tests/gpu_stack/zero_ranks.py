"""Run on several ranks by test_zero.py: bfloat16 ZeRO-3 with gradient checkpointing; saved by rank 0.

usage: zero_ranks.py MODEL OUTPUT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.models import trajectories
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import connect, leave
from upge.train.engine import Engine

#: Responses of the batch. With one response all ranks but one are idle.
SIZES = (1, 25)


def accumulate(engine: Engine, size: int, factor: float) -> None:
    """The gradient of Σ log π over the first `size` trajectories, dealt out to the ranks, one each micro-batch."""
    mine = trajectories()[:size][engine.world.rank :: engine.world.size]
    rounds = -(-size // engine.world.size)
    for number in range(rounds):
        some = mine[number : number + 1]
        logprobs = engine.forward([(t.prompt_ids, t.response_ids) for t in some])
        # Only the last rank's loss has the factor.
        scale = factor if engine.world.rank == engine.world.size - 1 else 1.0
        loss = sum((logprobs[0, : len(t.response_ids)].sum() for t in some), logprobs.sum() * 0.0)
        engine.backward(loss / 100 * scale, last=number == rounds - 1)


def gradient_of(engine: Engine, ranks: Sequence[int]) -> Tensor:
    """The gradient, flat, if each of some ranks has one trajectory and the others are idle."""
    from deepspeed.utils import safe_get_full_grad

    rank = engine.world.rank
    some = [trajectories()[rank]] if rank in ranks else []
    logprobs = engine.forward([(t.prompt_ids, t.response_ids) for t in some])
    engine.backward(logprobs.sum(), last=True)
    gradient = torch.cat([safe_get_full_grad(p).flatten().clone() for p in engine.network.parameters()])
    engine.step(0.0)
    return gradient


def main(model: str, output: str) -> None:
    from deepspeed.utils import safe_get_full_grad

    world = connect()
    config = OptimizerConfig(lr=1e-3, max_grad_norm=0.0)
    settings = ModelConfig(path=model, dtype="bfloat16", gradient_checkpointing="full")
    engine = Engine(settings, config, world)
    results: dict[str, Any] = {}
    for size in SIZES:
        accumulate(engine, size, 1.0)
        gradients: dict[str, Tensor] = {n: safe_get_full_grad(p) for n, p in engine.network.named_parameters()}
        results[f"gradients {size}"] = {name: gradient.clone() for name, gradient in gradients.items()}
        engine.step(0.0)
    results["parts"] = sum(gradient_of(engine, [rank]) for rank in range(world.size))
    results["whole"] = gradient_of(engine, range(world.size))
    before = {name: weight.clone() for name, weight in engine.named_weights()}
    accumulate(engine, SIZES[1], float("nan"))
    results["nan"] = engine.step(1e-3)
    results["unchanged"] = all(torch.equal(weight, before[name]) for name, weight in engine.named_weights())
    accumulate(engine, SIZES[1], 1.0)
    results["after"] = engine.step(1e-3)
    results["changed"] = any(not torch.equal(weight, before[name]) for name, weight in engine.named_weights())
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
