"""One point of the bench `growth`: a model and a batch of given size, updated in a process (or several) of its own.

Started by `python -m experiments.bench.growth_probe JSON`, alone or by torchrun; rank 0 prints a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from experiments.bench.batches import Shape, made
from experiments.bench.memory import peak


@dataclass(frozen=True)
class Point:
    """What is measured.

    Fields:
        groups, size: prompts of the step, and responses to each.
        vocabulary: V of the model.
        width, layers: of the model, a Qwen2 with random weights.
        scale: what the lengths (prompt 96, response 235 in the mean) are multiplied by.
        micro_batch_tokens: most tokens of one forward pass.
        updates: timed ones, after one that is not.
        ranks: processes, of one thread each.
    """

    groups: int = 8
    size: int = 8
    vocabulary: int = 8192
    width: int = 256
    layers: int = 4
    scale: float = 0.5
    micro_batch_tokens: int = 4096
    updates: int = 3
    ranks: int = 1


def measured(point: Point) -> dict[str, float]:
    """Seconds of an update, its tokens, and bytes of memory that the first one took beyond weights and engine."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import algorithms
    from upge.train.config import ModelConfig, OptimizerConfig
    from upge.train.distributed import connect, leave
    from upge.train.engine import Engine
    from upge.train.rates import Rates
    from upge.train.update import Updater

    world, config = connect(), OptimizerConfig(micro_batch_tokens=point.micro_batch_tokens)
    model = Qwen2Config(
        vocab_size=point.vocabulary, hidden_size=point.width, intermediate_size=4 * point.width,
        num_hidden_layers=point.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        # transformers writes on the main rank alone.
        folder = world.share(own)
        torch.manual_seed(0)
        Qwen2ForCausalLM(model).save_pretrained(folder)
        world.barrier()
        engine = Engine(ModelConfig(path=folder), config, world)
        world.barrier()
    updater = Updater(engine, algorithms.load("grpo"), config)
    rollouts = made(Shape(point.groups, point.size).scaled(point.scale), point.vocabulary)
    computed = 0

    def update(step: int) -> None:
        nonlocal computed
        computed = updater.update(rollouts, step, Rates(1e-6)).tally.computed

    memory, seconds = peak(lambda: update(0)), []
    for step in range(point.updates):
        began = time.perf_counter()
        update(1 + step)
        seconds.append(time.perf_counter() - began)
    found = {"seconds": statistics.median(seconds), "memory": float(memory), "computed": float(computed)}
    found |= {"tokens": float(sum(len(t.response_ids) for t in rollouts)), "parameters": float(engine.parameters)}
    every = world.gather(found)
    if world.is_main:
        found["computed"] = sum(one["computed"] for one in every)
        found["memory"] = max(one["memory"] for one in every)
        print(json.dumps(found), flush=True)
    leave(world, 0)
    return found


if __name__ == "__main__":
    measured(Point(**json.loads(sys.argv[1])))
