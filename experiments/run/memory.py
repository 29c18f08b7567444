"""Memory of one rank: DeepSpeed's estimate of the models' states, and what trainer and sampler add."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch

from experiments.run.memory_items import Item, Memory, Shapes
from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, Machine, pluralize
from upge.algorithm import Algorithm
from upge.logprobs import buffer_bytes, default_chunk_size
from upge.models.loading import SMALL_MODEL
from upge.pipeline import Pipeline
from upge.rollout.transformers_engine import TOKEN_BUDGET
from upge.rollout.vllm_engine import CPU_SEQUENCES
from upge.train.config import RunConfig
from upge.train.deepspeed_settings import zero_settings

#: A GPU's context, the collectives' buffers, and gaps between tensors.
RESERVE = int(1.5 * GIB)
#: Bytes per parameter of the tensors that torch's AdamW allocates in a step: the root of the second moments on a GPU;
#: on a CPU also its quotient.
ADAMW_BYTES = {"cuda": 4, "cpu": 8}
#: Bytes of a token of a kept rollout: Python's objects for its id and two log-probs, and their places in tuples.
REPLAY_BYTES = 100
#: The batch sizes for which vLLM records CUDA graphs, up to twice the number of sequences.
GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))


def estimate(
    config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, machine: Machine, micro_batch: int
) -> Memory:
    """Memory of a rank in a run whose largest micro-batch has `micro_batch` tokens."""
    rollouts = algorithm.needs.rollouts
    return Memory(
        machine,
        states(config, algorithm, shapes, machine),
        tuple(_engine(config, shapes.policy, machine)) if rollouts else (),
        tuple(_update(config, shapes.policy, machine, micro_batch)),
        tuple(_offloaded(config, shapes, machine)),
        tuple(_host(shapes, machine)) if machine.has_gpus else (),
        tuple(_remembered(config, algorithm, shapes, machine)) if machine.has_gpus else (),
    )


def states(config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, machine: Machine) -> tuple[Item, ...]:
    """The models' weights, gradients and optimizer states on a rank, and what AdamW takes in its step."""
    offload = offloaded(config, machine)
    items = [*_trained("policy", shapes.policy, machine, config)]
    if shapes.critic is not None:
        items += _trained("critic", shapes.critic, machine, config)
    if offload != "all":
        items += [Item(f"{name}: weights", shape.weights // machine.ranks) for name, shape in shapes.frozen.items()]
    if offload == "none":
        if second_moments(algorithm):
            moments = 8 * shapes.policy.trained // machine.ranks
            items.append(Item("policy: the interleaved update's own moments, 8 bytes per parameter", moments))
        items.append(_step(config, shapes, machine))
    if not machine.has_gpus:
        items += _remembered(config, algorithm, shapes, machine)
    if machine.has_gpus:
        items.append(Item("reserve: context, collectives, gaps", RESERVE, is_certain=False))
    return tuple(items)


def second_moments(algorithm: Algorithm | Pipeline) -> bool:
    """Whether an interleaved update has its own set of AdamW's moments."""
    stages = [stage.algorithm.interleaved_update for stage in Pipeline.of(algorithm).stages.values()]
    return any(update is not None and update.own_optimizer for update in stages)


def offloaded(config: RunConfig, machine: Machine) -> str:
    """`deepspeed.offload` where it saves the memory of a rank: on a machine with GPUs."""
    return config.deepspeed.offload if machine.has_gpus else "none"


def zero3_states(shape: ModelShape, ranks: int, offload: str = "none") -> int:
    """DeepSpeed's estimate of a rank's states under ZeRO-3, in bytes.

    Without offloading it is 18 bytes per trained parameter, divided by the ranks, and 4 bytes per parameter of the
    largest layer. With adapters the model's own weights come on top.
    """
    _quiet_deepspeed()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, per_gpu, _ = estimate_zero3_model_states_mem_needs(
        shape.trained,
        shape.largest_layer,
        num_gpus_per_node=ranks,
        cpu_offload=offload != "none",
        cpu_offload_params=offload == "all",
    )
    return per_gpu + (shape.weights // ranks if shape.adapter and offload != "all" else 0)


def longest(config: RunConfig) -> int:
    """Tokens of the longest allowed prompt and response together."""
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def engine_room(config: RunConfig, shape: ModelShape, machine: Machine) -> tuple[int, int]:
    """(bytes that vLLM may take, bytes that it needs at least: one sequence's cache and, on a GPU, the weights).

    Both are per rank.
    """
    shape = shape.of_engine(config.rollout.tensor_parallel)
    least = longest(config) * shape.cache_per_token
    # On a GPU the share covers weights and cache, elsewhere the cache alone.
    return int(config.rollout.memory_fraction * machine.memory), least + (shape.weights if machine.has_gpus else 0)


def _quiet_deepspeed() -> None:
    """Stop DeepSpeed from warning that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _trained(name: str, shape: ModelShape, machine: Machine, config: RunConfig) -> Iterator[Item]:
    _quiet_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    count, ranks, offload = shape.trained, machine.ranks, offloaded(config, machine)
    zero = DeepSpeedZeroConfig(**zero_settings(config.deepspeed))
    what = f"weights, gradient, AdamW of {shape.size} parameters over {pluralize(ranks, 'rank')}, DeepSpeed's estimate"
    if shape.adapter:
        what = f"weights of {shape.size} parameters over {pluralize(ranks, 'rank')}; {count:,} of adapters are trained"
    if offload != "none":
        what += f", without what deepspeed.offload={offload} keeps in the machine's memory"
    yield Item(f"{name}: {what}", zero3_states(shape, ranks, offload))
    if shape.itemsize > 2 and offload != "all":
        more = (shape.itemsize - 2) * count // ranks
        yield Item(f"{name}: {shape.itemsize} bytes per weight where that estimate has 2", more)
    # On a GPU the whole bucket is allocated, in ordinary memory only the part that is written.
    bucket = int(zero.reduce_bucket_size) if machine.has_gpus else min(int(zero.reduce_bucket_size), count)
    if (copies := config.deepspeed.secondary_partition) > 1:
        yield Item(f"{name}: a second copy of the weights over {pluralize(copies, 'rank')}", shape.weights // copies)
    # In float32 like the sum over the ranks (communication_data_type).
    yield Item(f"{name}: ZeRO-3's bucket of gradients, float32", 4 * bucket)
    # It is copied in the order of the ranks. A larger tensor does not go through the bucket.
    ordered = 4 * min(max(bucket, shape.largest_layer), count)
    yield Item(f"{name}: the bucket in the order of the ranks", ordered, "training", is_certain=False)
    gathered = min(shape.parameters, int(zero.max_live_parameters)) * shape.itemsize
    yield Item(f"{name}: weights that ZeRO-3 keeps gathered, at most", gathered, "training", is_certain=False)


def _step(config: RunConfig, shapes: Shapes, machine: Machine) -> Item:
    """What AdamW's step takes: a copy of the gradient and its temporary tensors, for one sub-group of parameters."""
    _quiet_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    largest = max(shape.trained for shape in (shapes.policy, shapes.critic) if shape)
    zero = DeepSpeedZeroConfig(**zero_settings(config.deepspeed))
    count = min(math.ceil(largest / machine.ranks), int(zero.sub_group_size))
    each = 4 + ADAMW_BYTES["cuda" if machine.has_gpus else "cpu"]
    return Item(
        f"optimizer step: {each} bytes for each of {count / 1e6:,.1f} M parameters at a time", each * count, "step"
    )


def _remembered(config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, machine: Machine) -> Iterator[Item]:
    """What stale and replayed rollouts take in main memory: of a machine with GPUs, else of a rank."""
    ranks = machine.ranks_here if machine.has_gpus else 1
    share = min(ranks / machine.ranks, 1)
    lag, trained = config.rollout.lag, shapes.policy.trained * shapes.policy.itemsize
    if lag and algorithm.needs.rollouts:
        what = f"policy: trained weights before the last {lag + 1} steps (rollout.lag={lag})"
        yield Item(what, int(share * (lag + 1) * trained))
    replays = [stage.algorithm.replay for stage in Pipeline.of(algorithm).stages.values()]
    size = max((replay.size for replay in replays if replay is not None), default=0)
    if size:
        tokens = size * (config.rollout.max_prompt_tokens + config.rollout.max_response_tokens)
        what = f"replay: {size:,} rollouts of the greatest length, {REPLAY_BYTES} bytes per token"
        yield Item(what, ranks * REPLAY_BYTES * tokens, is_certain=False)


def _offloaded(config: RunConfig, shapes: Shapes, machine: Machine) -> Iterator[Item]:
    """What deepspeed.offload keeps in the main memory of one machine, by DeepSpeed's estimate with its buffers."""
    offload = offloaded(config, machine)
    if offload == "none":
        return
    _quiet_deepspeed()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    here = min(machine.ranks_here / machine.ranks, 1)
    for name, shape in (("policy", shapes.policy), ("critic", shapes.critic)):
        if shape is not None:
            whole, _, _ = estimate_zero3_model_states_mem_needs(
                shape.trained, shape.largest_layer, cpu_offload=True, cpu_offload_params=offload == "all"
            )
            whole += shape.weights if shape.adapter and offload == "all" else 0
            yield Item(f"{name}: what deepspeed.offload={offload} keeps, DeepSpeed's estimate", int(here * whole))
    if offload == "all":
        yield from (Item(f"{name}: weights", int(here * shape.weights)) for name, shape in shapes.frozen.items())


def _host(shapes: Shapes, machine: Machine) -> Iterator[Item]:
    """Main memory of one machine. Loading is not in it: all ranks map the same files, and share the page cache."""
    share = min(machine.ranks_here / machine.ranks, 1)
    trained = [shape for shape in (shapes.policy, shapes.critic) if shape]
    saved = int(share * checkpoint_bytes(sum(shape.trained for shape in trained)))
    yield Item(f"resuming: each of {pluralize(machine.ranks_here, 'rank')} reads its part of a checkpoint", saved)
    yield Item("writing final/ or best/: a copy of the weights in the main rank", shapes.policy.weights)


def checkpoint_bytes(parameters: int, moments: int = 1) -> int:
    """Bytes of a checkpoint: float32 weights and AdamW's moments of each trained parameter; no weights in bfloat16."""
    return (4 + 8 * moments) * parameters


def graph_bytes(max_sequences: int) -> int:
    """Bytes of vLLM's CUDA graphs, part of its share of the memory, which sleep does not free.

    1 GiB is assumed for all 51 sizes, about 100 graphs. vLLM logged 0.2 GiB for 35 graphs of a model of 1 B
    parameters, and 1 GiB for a model of 55 GiB.
    """
    recorded = [size for size in GRAPH_SIZES if not max_sequences or size <= 2 * max_sequences]
    return GIB * len(recorded) // len(GRAPH_SIZES)


def takes_transformers(config: RunConfig, shape: ModelShape, machine: Machine) -> bool:
    """Whether the run samples with transformers: as `rollout.engine` says, or auto for a small model on a CPU."""
    by_auto = config.rollout.engine == "auto" and not machine.has_gpus and shape.parameters < SMALL_MODEL
    return config.rollout.engine == "transformers" or by_auto


def _engine(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[Item]:
    """The inference engine's items. Only vLLM on a GPU frees its memory during updates."""
    merging = f", and {shape.merging / GIB:.2f} GiB to merge an adapter" if shape.merging else ""
    taken = shape.gathered + shape.merging
    gathered = Item(f"refresh: a bucket of the trainer's weights, gathered{merging}", taken, "refresh")
    if takes_transformers(config, shape, machine):
        yield Item("rollouts: a copy of the weights", shape.weights)
        yield gathered
        tokens = max(TOKEN_BUDGET["cuda" if machine.has_gpus else "cpu"], longest(config))
        yield Item(f"rollouts: cache of {tokens:,} tokens", tokens * shape.cache_per_token, "sampling", False)
        return
    room, _ = engine_room(config, shape, machine)
    split = config.rollout.tensor_parallel
    part = shape.of_engine(split)
    one = longest(config) * part.cache_per_token
    # A whole layer of the trainer's weights, and this rank's part of it.
    layer = "twice" if split == 1 else f"and 1/{split} of it"
    copied = shape.engine_layer + shape.engine_layer // split
    copies = Item(f"refresh: vLLM's largest layer, {layer}", copied, "refresh", False)
    if machine.has_gpus:
        graphs = graph_bytes(config.rollout.max_sequences)
        count = max(room - part.weights - graphs, 0) // one
        share = f"rollout.memory_fraction={config.rollout.memory_fraction:g} of the GPU"
        weights = "weights" if split == 1 else f"1/{split} of the weights"
        what = f"{share}, {weights} and a cache of {count} sequences of {longest(config):,} tokens"
        yield Item(f"rollouts: {what}", room - graphs, "sampling")
        yield Item("rollouts: CUDA graphs, in that share, not freed in sleep; assumed", graphs, is_certain=False)
        yield Item("refresh: vLLM's weights, awake before its cache", part.weights, "refresh")
        yield from (gathered, copies)
        return
    yield Item(f"rollouts: {'a copy' if split == 1 else f'1/{split}'} of the weights", part.weights)
    yield from (gathered, copies)
    yield Item("rollouts: cache, at most", min(room, CPU_SEQUENCES * one), is_certain=False)


def _update(config: RunConfig, shape: ModelShape, machine: Machine, tokens: int) -> Iterator[Item]:
    """Memory of the forward and backward pass of a micro-batch."""
    layers = shape.layers
    if config.model.gradient_checkpointing == "selective":
        kept, certain = layers * shape.products_per_token * tokens, not shape.adapter
        yield Item(f"update: products of {layers} layers for {tokens:,} tokens", kept, "training", certain)
        again = (shape.kept_per_token - shape.products_per_token) * tokens
        yield Item("update: other activations of one layer, computed again", again, "training", is_certain=False)
    elif config.model.gradient_checkpointing == "full":
        kept = layers * shape.hidden * shape.itemsize * tokens
        yield Item(f"update: the inputs of {layers} layers for {tokens:,} tokens", kept, "training")
        again = shape.kept_per_token * tokens
        yield Item("update: activations of one layer, computed again", again, "training", is_certain=False)
    else:
        kept = layers * shape.kept_per_token * tokens
        # A layer without an adapter does not keep its input.
        certain = not shape.adapter
        yield Item(f"update: activations of {layers} layers for {tokens:,} tokens", kept, "training", certain)
    passing = shape.gradients_per_token * tokens
    yield Item("update: gradients inside a layer", passing, "training", is_certain=False)
    device, dtype = "cuda" if machine.has_gpus else "cpu", getattr(torch, config.model.dtype)
    chunk = min(default_chunk_size(shape.vocabulary, device, dtype), tokens)
    logits = buffer_bytes(shape.vocabulary, device, dtype, tokens)
    yield Item(f"update: logits of {chunk:,} tokens, and blocks of them in float32", logits, "training", False)
    if shape.adapter:
        return
    # In half precision a chunk's product is held in addition to the sum.
    wide = 4 if dtype == torch.float32 else 6
    head = wide * shape.vocabulary * shape.hidden
    yield Item("update: gradient of the output embedding", head, "training", is_certain=False)
