"""Run by torchrun from test_elementwise.py: gradients under ZeRO-3 with and without compiled parts, saved by rank 0.

usage: elementwise_ranks.py MODEL OUTPUT
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch._dynamo.utils import counters

from tests.models import trajectories
from upge.train import elementwise
from upge.train.config import LoraConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import DeepspeedConfig
from upge.train.distributed import World, connect, leave
from upge.train.engine import Engine

PAIRS = [(t.prompt_ids, t.response_ids) for t in trajectories(group_size=2)[:9]]
#: Otherwise ZeRO-3 would keep parameters this small gathered from the forward to the backward.
RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def engine_of(model: str, world: World, mode: str) -> Engine:
    lora = LoraConfig(rank=2) if mode == "lora" else LoraConfig()
    config = ModelConfig(path=model, gradient_checkpointing="selective" if mode == "lora" else mode, lora=lora)
    return Engine(config, OptimizerConfig(), world, deepspeed=DeepspeedConfig(config={"zero_optimization": RELEASING}))


def gradients(engine: Engine, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """The gradient of several micro-batches, of which one may be empty."""
    for number, size in enumerate(sizes):
        loss = engine.forward(PAIRS[:size]).sum()
        engine.backward(loss, last=number == len(sizes) - 1)
    named = [(name, p) for name, p in engine.network.named_parameters() if p.requires_grad]
    results = {name: safe_get_full_grad(p).clone() for name, p in named}
    engine.take_gradient()
    return results


def case(model: str, world: World, mode: str) -> dict[str, object]:
    torch._dynamo.reset()
    counters.clear()
    elementwise.DEVICES = frozenset()
    plain = gradients(engine_of(model, world, mode), (9, 5, 0))
    assert not counters["stats"]
    elementwise.DEVICES = frozenset({"cpu"})
    engine = engine_of(model, world, mode)
    norm = engine.network.model.layers[0].input_layernorm.weight
    compiled = gradients(engine, (9, 5, 0))
    with torch.no_grad():
        engine.forward(PAIRS[:4])
    graphs = counters["stats"]["unique_graphs"]
    gradients(engine, (7, 3))
    with torch.no_grad():
        engine.forward(PAIRS[:2])
    return {
        "plain": plain,
        "compiled": compiled,
        "graphs": graphs,
        "graphs after other lengths": counters["stats"]["unique_graphs"],
        "released": norm.numel() == 0,
    }


@cache
def traced(function):
    """Traced and differentiated as in a compilation, and then run operation by operation, which needs no compiler."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", recompile_limit=elementwise._KINDS)


def main(model: str, output: str) -> None:
    world = connect()
    elementwise._compiled = traced
    # Those with selective checkpointing come first, because the others let DeepSpeed replace torch's linear function.
    results = {mode: case(model, world, mode) for mode in ("selective", "lora", "none", "full")}
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
