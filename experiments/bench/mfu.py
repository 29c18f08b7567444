"""Share of an H100's peak that an update can reach: the time of each kernel of a micro-batch, counted and not measured.

The model runs forward and backward on the meta device, so shapes and dtypes are real and nothing is computed. A kernel
takes as long as its operations or as its bytes, whichever is longer, at the H100's rates and at shares of them that
kernels usually reach. Launches, collectives and the optimizer are not counted.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from experiments.bench.kernels import ATTENTION, ELEMENTWISE, HEAD, PRODUCTS, Kernels, fused, softmax_block
from experiments.config import MODELS, compose
from experiments.grid import markdown_table
from experiments.run.memory import estimate
from experiments.run.memory_items import Shapes
from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, Machine
from experiments.scaling.counts import MEMORY, PEAK, PROMPT, RESPONSE
from upge import config
from upge.errors import ConfigError, nearest
from upge.logprobs import Coefficients, chunks
from upge.models.loading import random_state_kept, read_config
from upge.train import elementwise, packed_attention
from upge.train.activations import Checkpointing, checkpoint_activations
from upge.train.packed_policy import Objective, PackedPolicy
from upge.train.packing import PackedBatch, pack

SUMMARY = "share of an H100's peak that an update can reach, counted from operations and bytes on meta tensors"
RECIPES = ("hpt-qwen2.5-math-7b", "hpt-qwen2.5-math-1.5b")


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    recipes: str = config.key(",".join(RECIPES), "recipes whose models and sizes of micro-batches are counted")
    prompt: int = config.key(PROMPT, "tokens of the prompt of each trajectory", minimum=1, limit=10**6)
    response: int = config.key(RESPONSE, "tokens of the response of each trajectory", minimum=1, limit=10**6)
    modes: str = config.key("selective,full", "values of model.gradient_checkpointing")
    micro_batches: str = config.key("32768", "tokens of micro-batches, in addition to the recipe's")
    products: float = config.key(0.7, "assumed share of the peak rate that matrix products reach", above=0, maximum=1)
    attention: float = config.key(
        0.4, "the same for the attention kernel; FlashAttention 3 reaches more", above=0, maximum=1
    )
    memory: float = config.key(0.8, "the same for memory", above=0, maximum=1)


def policy_of(config: Any, mode: Checkpointing) -> PackedPolicy:
    """The model on the meta device in bfloat16, as the trainer prepares it."""
    from transformers import AutoModelForCausalLM

    with random_state_kept(), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    checkpoint_activations(network, mode)
    return PackedPolicy(network).train()


def micro_batch(tokens: int, prompt: int, response: int) -> PackedBatch:
    """Responses to one prompt, as many as fit."""
    count = tokens // (prompt + response - 1)
    return pack([([1] * prompt, [1] * response)] * count, "meta")


def counted(config: Any, mode: Checkpointing, is_fused: bool, batch: PackedBatch) -> Kernels:
    """The kernels of the forward and backward pass of a micro-batch."""

    def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        return Coefficients(logprobs.sum(), torch.ones_like(logprobs))

    policy, kernels = policy_of(config, mode), Kernels(batch.lengths)
    head = policy.head.forward

    def in_head(*arguments: Any, **settings: Any) -> Any:
        with kernels.inside(HEAD):
            return head(*arguments, **settings)

    policy.head.forward = in_head
    with (
        mock.patch.object(elementwise, "_compiled", lambda function: fused(kernels, function)),
        mock.patch.object(packed_attention, "_varlen_takes", lambda query, value: True),
        # Otherwise it reads the positions, which have no values here.
        mock.patch("transformers.masking_utils.is_tracing", lambda tensor: True),
        mock.patch.object(chunks, "_softmax_of", lambda device: softmax_block(kernels)),
    ):
        if is_fused:
            elementwise.compile_elementwise(policy.model)
        with kernels:
            loss, *_ = policy(batch, objective=Objective(coefficients))
            loss.backward()
    return kernels


def seconds_of(
    config: Any, mode: Checkpointing, is_fused: bool, batch: PackedBatch, *rates: Mapping[str, float]
) -> list[Counter[str]]:
    """Part of the model → seconds, for each of some shares of the peak rates.

    Each layer runs the same kernels, so the first layer and the second are counted and the others follow.
    """
    first, both = (counted(_with_layers(config, layers), mode, is_fused, batch) for layers in (1, 2))
    found = []
    for shares in rates:
        one, two = first.seconds(**shares), both.seconds(**shares)
        more = config.num_hidden_layers - 1
        found.append(Counter({part: one[part] + more * (two[part] - one[part]) for part in two}))
    return found


def _with_layers(config: Any, layers: int) -> Any:
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


def model_operations(shape: ModelShape, batch: PackedBatch) -> float:
    """What a forward and a backward pass need at least: 6 per weight of a matrix and token, and causal attention.

    Prompts do not pass the output head.
    """
    head = shape.vocabulary * shape.hidden
    trunk = shape.parameters - head - shape.output
    attention = shape.layers * shape.query * sum(length * length for length in batch.lengths)
    return 6.0 * (trunk * batch.input_ids.numel() + head * batch.targets.numel() + attention)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        recipe, tokens, mode: the model, the tokens of a micro-batch, and what is computed again.
        is_fused: whether norms, rotary embeddings and activations are compiled.
        seconds: by part of the model, at the assumed rates.
        mfu, at_peak: share of the peak, at the assumed rates and at the peak rates.
        memory: bytes of a rank during the update, by the planner.
    """

    recipe: str
    tokens: int
    mode: Checkpointing
    is_fused: bool
    seconds: Counter[str]
    mfu: float
    at_peak: float
    memory: float


def cases(settings: Settings) -> Iterator[Case]:
    """Every recipe with every size of micro-batch and mode, plain and compiled."""
    shares = {"products": settings.products, "attention": settings.attention, "memory": settings.memory}
    for recipe in _names(settings.recipes):
        composed = compose([f"recipe={recipe}"])
        run = composed.config
        config = read_config(str(MODELS / str(composed.names["model"])), run.model.overrides)
        shape = ModelShape.of(config, run.model.dtype)
        sizes = dict.fromkeys([run.optimizer.micro_batch_tokens, *_sizes(settings)])
        if min(sizes) < settings.prompt + settings.response - 1:
            raise ConfigError(
                f"response: found {settings.response}, which with a prompt does not fit into a micro-batch of "
                f"{min(sizes)} tokens ({recipe}); give a shorter one"
            )
        for tokens in sizes:
            batch = micro_batch(tokens, settings.prompt, settings.response)
            for mode in _modes(settings):
                changed = replace(run, model=replace(run.model, gradient_checkpointing=mode))
                machine = Machine(run.hardware.gpus, MEMORY, True, "assumed", False)
                memory = estimate(changed, composed.algorithm, Shapes(shape), machine, tokens).total("training")
                least = model_operations(shape, batch) / PEAK
                for is_fused in (False, True):
                    seconds, shortest = seconds_of(config, mode, is_fused, batch, shares, {})
                    mfu, at_peak = least / seconds.total(), least / shortest.total()
                    yield Case(recipe, tokens, mode, is_fused, seconds, mfu, at_peak, memory)


def _modes(settings: Settings) -> list[Any]:
    names = _names(settings.modes)
    for name in names:
        if name not in get_args(Checkpointing):
            raise ConfigError(f"modes: found '{name}'; {nearest(name, get_args(Checkpointing))}")
    return names


def _sizes(settings: Settings) -> list[int]:
    """Tokens of micro-batches, each with room for a trajectory."""
    names, least = _names(settings.micro_batches), settings.prompt + settings.response - 1
    if not all(name.isdecimal() and len(name) < 10 and int(name) >= least for name in names):
        raise ConfigError(
            f"micro_batches: found '{settings.micro_batches}'; give numbers of at least {least} and below 10^9 tokens"
        )
    return [int(name) for name in names]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(settings: Settings) -> str:
    """A Markdown table."""
    header = ["recipe", "micro-batch", "checkpointing", "compiled", "MFU, %", "at peak rates, %", "seconds"]
    header += [f"{kind}, %" for kind in (PRODUCTS, ATTENTION, HEAD, ELEMENTWISE)] + ["GiB of a rank"]
    rows = []
    for case in cases(settings):
        total = case.seconds.total()
        shares = [f"{100 * case.seconds[kind] / total:.0f}" for kind in (PRODUCTS, ATTENTION, HEAD, ELEMENTWISE)]
        fits = f"{case.memory / GIB:.0f}" + ("" if case.memory <= MEMORY else " (too much)")
        yes = "yes" if case.is_fused else "no"
        mfu = [f"{100 * case.mfu:.0f}", f"{100 * case.at_peak:.0f}"]
        rows.append([case.recipe, f"{case.tokens:,}", case.mode, yes, *mfu, f"{total:.2f}", *shares, fits])
    return markdown_table(header, rows)
