"""Memory of one rank: the models' sizes, DeepSpeed's estimate of their states, and what this trainer adds."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from experiments.run.workload import GIB, Machine, counted
from upge.algorithm import Algorithm
from upge.errors import ModelError
from upge.logprobs import buffer_bytes, default_chunk_size
from upge.models.loading import SMALL_MODEL, WeightTable, random_state_kept
from upge.pipeline import Pipeline
from upge.rollout.transformers_engine import TOKEN_BUDGET
from upge.rollout.vllm_engine import CPU_SEQUENCES
from upge.train.config import LoraConfig, RunConfig
from upge.train.deepspeed_settings import zero_settings

#: All weights are trained.
NO_LORA = LoraConfig()


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine its memory.

    Attributes:
        parameters: number of parameters of the whole model, tied ones counted once.
        largest_layer: parameters of the largest single module, usually an embedding.
        output: parameters of the output embedding; 0 if it is tied to the input embedding.
        layers, hidden, query, key, inner, vocabulary: the number of layers, and the widths of the residual stream, of
            all query heads, of all key heads (as many for values), of the MLP and of the output.
        itemsize: bytes of a weight, and of an activation.
        adapter: parameters of its LoRA adapters; 0 = all parameters are trained.
    """

    parameters: int
    largest_layer: int
    output: int
    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    vocabulary: int
    itemsize: int
    adapter: int = 0

    @classmethod
    def of(cls, config: Any, dtype: str, lora: LoraConfig = NO_LORA) -> ModelShape:
        """The shape of the causal LM that a Hugging Face configuration describes, in `dtype`.

        Raises:
            ModelError: the trainer cannot run this architecture, or the sizes do not form a model.
            ConfigError: `lora` does not fit the model.
        """
        from transformers import AutoModelForCausalLM

        from upge.train.adapter import adapter_parameters
        from upge.train.packed_attention import check_supported

        try:
            with random_state_kept(), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # sizes that contradict each other fail anywhere in a model's code
            raise ModelError(
                f"model.path: no model can be made of its config.json ({type(error).__name__}: {error}); check its "
                "sizes, and those of model.overrides"
            ) from error
        model.tie_weights()
        check_supported(model)
        table, text = WeightTable.of_model(model), config.get_text_config()
        own: Counter[str] = Counter()
        for name in set(table.source.values()):
            own[name.rpartition(".")[0]] += math.prod(table.shapes[name])
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = text.num_attention_heads
        return cls(
            parameters=table.count(),
            largest_layer=max(own.values()),
            output=own["lm_head"],
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query=heads * size,
            key=(getattr(text, "num_key_value_heads", None) or heads) * size,
            inner=text.intermediate_size,
            vocabulary=text.vocab_size,
            itemsize=getattr(torch, dtype).itemsize,
            adapter=adapter_parameters(model, lora),
        )

    @property
    def size(self) -> str:
        """The number of parameters for people, as in 7.62 B."""
        for unit, letter in ((1e9, "B"), (1e6, "M")):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.3g} {letter}"
        return f"{self.parameters:,}"

    @property
    def trunk(self) -> ModelShape:
        """The same model without its output embedding and adapters, as a critic has it."""
        return replace(self, parameters=self.parameters - self.output, output=0, adapter=0)

    @property
    def trained(self) -> int:
        """The number of parameters that have gradients and optimizer states."""
        return self.adapter or self.parameters

    @property
    def weights(self) -> int:
        """Bytes of the whole model's weights."""
        return self.parameters * self.itemsize

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values that a token takes in an engine's cache."""
        return 2 * self.layers * self.key * self.itemsize

    @property
    def kept_per_token(self) -> int:
        """Bytes per token that one layer stores for the backward pass.

        They are its input, the two norms (in float32 internally), query, key, value and output of the attention, and
        four rows of the MLP, as in Qwen2 and Llama.
        """
        norms = 9 if self.itemsize == 2 else 7
        return (norms * self.hidden + 2 * self.query + 2 * self.key + 4 * self.inner) * self.itemsize

    @property
    def products_per_token(self) -> int:
        """Bytes per token that one layer stores with selective checkpointing.

        They are its input, query, key, value and output of the attention before and after its projection, and two rows
        of the MLP; with adapters also the MLP's output.
        """
        return (
            (3 if self.adapter else 2) * self.hidden + 2 * self.query + 2 * self.key + 2 * self.inner
        ) * self.itemsize

    @property
    def gradients_per_token(self) -> int:
        """Bytes per token of the gradients inside one layer at its widest point: three rows of the MLP."""
        return 3 * self.inner * self.itemsize


When = Literal["always", "sampling", "training"]
#: A GPU's context, the collectives' buffers, and gaps between tensors.
RESERVE = int(1.5 * GIB)


@dataclass(frozen=True)
class Item:
    """One thing that takes memory.

    Attributes:
        what: a description, with the numbers behind it.
        bytes: size on one rank.
        when: the part of a step in which it is allocated.
        is_certain: whether `bytes` is a lower bound, whatever the libraries do.
    """

    what: str
    bytes: int
    when: When = "always"
    is_certain: bool = True


@dataclass(frozen=True)
class Shapes:
    """The models of a run; None for one that the algorithm does not need."""

    policy: ModelShape
    critic: ModelShape | None = None
    reference: ModelShape | None = None


@dataclass(frozen=True)
class Memory:
    """Memory of one rank.

    Attributes:
        machine: the machine of the run.
        states: the models' weights, gradients and optimizer states.
        engine: the inference engine.
        update: the forward and backward pass.
        asleep: bytes that the engines of all ranks keep in the machine's memory, outside the GPUs, during an update.
    """

    machine: Machine
    states: tuple[Item, ...]
    engine: tuple[Item, ...]
    update: tuple[Item, ...]
    asleep: int = 0

    def total(self, when: When, certain: bool = False) -> int:
        """Bytes in use at the same time while sampling or training; with `certain`, a lower bound."""
        items = [*self.states, *self.engine, *self.update]
        return sum(i.bytes for i in items if i.when in ("always", when) and (i.is_certain or not certain))

    def __str__(self) -> str:
        items = [*self.states, *self.engine, *self.update]
        rows = [f"{item.bytes / GIB:8.2f}  {item.when:<8}  {item.what}" for item in items]
        for when in ("sampling", "training"):
            there = self.machine.memory / GIB
            rows.append(f"{self.total(when) / GIB:8.2f}  {'in all':<8}  while {when}, of {there:.2f} GiB")
        if self.asleep:
            rows.append(f"and {self.asleep / GIB:.1f} GiB of the machine's memory for the engines' weights in updates")
        return "\n".join(rows)


def estimate(
    config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, machine: Machine, micro_batch: int
) -> Memory:
    """Memory of a rank in a run whose largest micro-batch has `micro_batch` tokens."""
    offload = offloaded(config, machine)
    states = [*_trained("policy", shapes.policy, machine, config)]
    if shapes.critic is not None:
        states += _trained("critic", shapes.critic, machine, config)
    if shapes.reference is not None and offload != "all":
        states.append(Item("frozen policy: weights", shapes.reference.weights // machine.ranks))
    stages = Pipeline.of(algorithm).stages.values()
    if any(s.algorithm.interleaved_update is not None and s.algorithm.interleaved_update.own_optimizer for s in stages):
        moments = 8 * shapes.policy.trained // machine.ranks
        moments = 0 if offload != "none" else moments
        states.append(Item("policy: the interleaved update's own moments, 8 bytes per parameter", moments))
    if machine.has_gpus:
        states.append(Item("reserve: context, collectives, gaps", RESERVE, is_certain=False))
    engine = tuple(_engine(config, shapes.policy, machine)) if algorithm.needs.rollouts else ()
    sleeps = engine and machine.has_gpus and config.rollout.engine != "transformers"
    update = tuple(_update(config, shapes.policy, machine, micro_batch))
    return Memory(machine, tuple(states), engine, update, shapes.policy.weights * machine.ranks if sleeps else 0)


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
    """(bytes that vLLM may take, bytes that it needs at least: one sequence's cache and, on a GPU, the weights)."""
    least = longest(config) * shape.cache_per_token
    # On a GPU the share covers weights and cache, elsewhere the cache alone.
    return int(config.rollout.memory_fraction * machine.memory), least + (shape.weights if machine.has_gpus else 0)


def _quiet_deepspeed() -> None:
    """Stops DeepSpeed from warning that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _trained(name: str, shape: ModelShape, machine: Machine, config: RunConfig) -> Iterator[Item]:
    _quiet_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    count, ranks, offload = shape.trained, machine.ranks, offloaded(config, machine)
    zero = DeepSpeedZeroConfig(**zero_settings(config.deepspeed))
    what = f"weights, gradient, AdamW of {shape.size} parameters over {counted(ranks, 'rank')}, DeepSpeed's estimate"
    if shape.adapter:
        what = f"weights of {shape.size} parameters over {counted(ranks, 'rank')}; {count:,} of adapters are trained"
    if offload != "none":
        what += f", without what deepspeed.offload={offload} keeps in the machine's memory"
    yield Item(f"{name}: {what}", zero3_states(shape, ranks, offload))
    if shape.itemsize > 2 and offload != "all":
        more = (shape.itemsize - 2) * count // ranks
        yield Item(f"{name}: {shape.itemsize} bytes per weight where that estimate has 2", more)
    # On a GPU the whole bucket is allocated, in ordinary memory only the part that is written.
    bucket = int(zero.reduce_bucket_size) if machine.has_gpus else min(int(zero.reduce_bucket_size), count)
    yield Item(f"{name}: ZeRO-3's bucket of gradients", bucket * shape.itemsize)
    gathered = min(shape.parameters, int(zero.max_live_parameters)) * shape.itemsize
    yield Item(f"{name}: weights that ZeRO-3 keeps gathered, at most", gathered, "training", is_certain=False)


def _engine(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[Item]:
    """The inference engine's items. Only vLLM on a GPU frees its memory during updates."""
    one = longest(config) * shape.cache_per_token
    by_auto = config.rollout.engine == "auto" and not machine.has_gpus and shape.parameters < SMALL_MODEL
    if config.rollout.engine == "transformers" or by_auto:
        yield Item("rollouts: a copy of the weights", shape.weights)
        tokens = max(TOKEN_BUDGET["cuda" if machine.has_gpus else "cpu"], longest(config))
        yield Item(f"rollouts: cache of {tokens:,} tokens", tokens * shape.cache_per_token, "sampling", False)
        return
    room, _ = engine_room(config, shape, machine)
    if machine.has_gpus:
        count = max(room - shape.weights, 0) // one
        share = f"rollout.memory_fraction={config.rollout.memory_fraction:g} of the GPU"
        what = f"{share}, weights and a cache of {count} sequences of {longest(config):,} tokens"
        yield Item(f"rollouts: {what}", room, "sampling")
        return
    yield Item("rollouts: a copy of the weights", shape.weights)
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
