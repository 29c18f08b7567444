"""Run by torchrun from test_lora.py: LoRA under ZeRO-3; saved by rank 0.

usage: lora_ranks.py MODEL OUTPUT SCRATCH; with an empty SCRATCH only the variants.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.engine_ranks import accumulate, weights_of
from tests.models import trajectories
from upge.train.adapter import Weight
from upge.train.config import LoraConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import DeepspeedConfig
from upge.train.distributed import World, connect, leave
from upge.train.engine import BasePolicy, Engine, _gathered

LORA = LoraConfig(rank=3, alpha=5.0)
DROPOUT = LoraConfig(rank=3, alpha=5.0, dropout=0.4, target_modules=["q_proj", "down_proj"])
PAIRS = [(t.prompt_ids, t.response_ids) for t in trajectories()[:4]]


#: Name → settings of the model, and what is offloaded. All of them train as the plain engine does. The selective ones
#: come first: DeepSpeed's linear function, which they cannot use, is set for the whole process by the others.
VARIANTS = {
    "selective": ({"gradient_checkpointing": "selective"}, "none"),
    "bfloat16": ({"dtype": "bfloat16", "gradient_checkpointing": "selective"}, "none"),
    "optimizer offloaded": ({}, "optimizer"),
    "all offloaded": ({"gradient_checkpointing": "full"}, "all"),
}


def engine_of(model: str, world: World, lora: LoraConfig, offload: str = "none", **settings: object) -> Engine:
    optimizer = OptimizerConfig(max_grad_norm=0.0, weight_decay=0.1)
    model_config = ModelConfig(path=model, lora=lora, **settings)
    return Engine(model_config, optimizer, world, seed=3, deepspeed=DeepspeedConfig(offload))


def matrices(engine: Engine) -> dict[str, Tensor]:
    """A and B of every layer."""
    parts = [Weight(name, parameter) for name, parameter in engine.adapter.parameters()]
    return {part.name: part.merged().clone() for part in _gathered(parts)}


def gradients(engine: Engine, variant: int) -> dict[str, Tensor]:
    """The gradient of A and B; no update follows."""
    from deepspeed.utils import safe_get_full_grad

    accumulate(engine, variant)
    gradient = {name: safe_get_full_grad(p).clone() for name, p in engine.adapter.parameters()}
    engine.take_gradient()
    return gradient


def update(engine: Engine, variant: int) -> None:
    accumulate(engine, variant)
    assert engine.step(1e-1).applied


def resume(engine: Engine, fresh: Engine, scratch: Path, name: str, results: dict) -> None:
    """Saves, goes on, and does the same again from the checkpoint in another engine with a history of its own."""
    update(fresh, 2)
    engine.save(scratch, name, {"step": 5})
    engine.world.barrier()
    results[name, "state"] = fresh.load(scratch, name)
    for key, each in (("went on", engine), ("resumed", fresh)):
        update(each, 3)
        update(each, 4)
        results[name, key] = weights_of(each)
    results[name, "bytes"] = sum(file.stat().st_size for file in (scratch / name).iterdir())


def variants(model: str, world: World) -> dict:
    """The first gradient of each variant, and the weights after two updates."""
    results = {}
    for name, (settings, offload) in VARIANTS.items():
        engine = engine_of(model, world, LORA, offload, **settings)
        gradient = gradients(engine, 0)
        update(engine, 0)
        update(engine, 1)
        results[name] = gradient, weights_of(engine)
    return results


def main(model: str, output: str, scratch: str) -> None:
    world = connect()
    results: dict = {}
    if not scratch:
        results = variants(model, world)
        if world.is_main:
            torch.save(results, output)
        leave(world, 0)
        return
    engine = engine_of(model, world, LORA)
    results["first"] = weights_of(engine), matrices(engine)
    results["first gradient"] = gradients(engine, 0)
    update(engine, 0)
    update(engine, 1)
    results["weights"], results["matrices"] = weights_of(engine), matrices(engine)
    results["gradients"] = [gradients(engine, variant) for variant in (0, 1)]
    reference = BasePolicy(engine)
    results["reference"], results["policy"] = reference.forward(PAIRS), engine.forward(PAIRS).detach()
    results["after the reference"] = gradients(engine, 0)
    results["trained"] = sum(p.ds_numel for group in engine._engine.optimizer.fp16_groups for p in group)
    engine.export(Path(scratch) / "final")
    resume(engine, engine_of(model, world, LORA, gradient_checkpointing="full"), Path(scratch), "plain", results)
    noisy = engine_of(model, world, DROPOUT)
    update(noisy, 0)
    results["noisy gradients"] = [gradients(noisy, 1) for _ in range(2)]
    results["noisy log-probs"] = [noisy.forward(PAIRS).detach()]
    with torch.no_grad():
        results["noisy log-probs"] += [noisy.forward(PAIRS) for _ in range(2)]
    resume(noisy, engine_of(model, world, DROPOUT), Path(scratch), "noisy", results)
    if world.is_main:
        torch.save(results, output)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
