"""The models of a run under DeepSpeed ZeRO-3: policy, critic, reference policy; and the sampler's copy of weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upge.rollout import Sampler
from upge.train.config import CriticConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_module import (
    DeepSpeedModule,
    check_tokens,
    checkpoint_activations,
    load_causal_lm,
    settings,
    vocabulary_size,
)
from upge.train.distributed import World
from upge.train.micro_batches import Costs
from upge.train.packed_policy import Objective, PackedPolicy, PackedValue
from upge.train.packing import PackedBatch, pack
from upge.train.sample import TokenIds

#: Parameters are gathered for the sampler in buckets of about this size.
_BUCKET_BYTES = 512 * 2**20


class Engine(DeepSpeedModule):
    """The policy's weights, gradients and optimizer, partitioned over the ranks.

    Log-probs are computed at `temperature`, as in sampling.

    Raises:
        ModelError: the model cannot be loaded, is not complete, or cannot run packed rows.
    """

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, world: World, temperature: float = 1.0) -> None:
        network = load_causal_lm(model, world)
        if model.gradient_checkpointing:
            checkpoint_activations(network)
        costs = Costs.of(network)
        super().__init__(PackedPolicy(network).train(), model.dtype, optimizer, optimizer.lr, world)
        self.network, self.temperature, self.costs = network, temperature, costs

    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """Log-probs [B, T] of the responses of (prompt_ids, response_ids) pairs, with gradient.

        Every rank must call it equally often; a rank without work passes no trajectories.
        """
        packed = self.pack(trajectories)
        return packed.pad(self.logprobs(packed)[0])

    def pack(self, trajectories: Sequence[TokenIds]) -> PackedBatch:
        """(prompt_ids, response_ids) pairs as one row on the model's device."""
        return pack(trajectories, self.world.device)

    def logprobs(self, packed: PackedBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs [n] of the responses in packed order and entropies [n] or None, with gradient.

        Every rank must call it equally often; a rank without work packs no trajectories.
        """
        return self._engine(packed, temperature=self.temperature, entropy=entropy)

    def loss(self, packed: PackedBatch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logprobs [n], entropies [n]). The gradient flows through the loss only; part of it is computed here.

        Every rank must call it equally often; a rank without work packs no trajectories, and its loss is 0.
        """
        return self._engine(packed, temperature=self.temperature, objective=objective)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every parameter, on every rank; gathered in buckets.

        A tensor is valid until the next one is asked for. Every rank must exhaust the iterator.
        """
        import deepspeed

        for bucket in buckets(list(self.network.named_parameters())):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket], modifier_rank=None):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format (safetensors), from rank 0; all ranks call it."""
        keep = self.world.is_main
        weights = {n: w.to("cpu", copy=True).contiguous() for n, w in self.named_weights() if keep}
        if keep:
            attention = self.network.config._attn_implementation
            self.network.config._attn_implementation = None
            self.network.save_pretrained(folder, state_dict=weights)
            self.network.config._attn_implementation = attention
        self.world.barrier()

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.network.parameters())


class CriticEngine(DeepSpeedModule):
    """V(prompt, response up to t) with its own backbone, partitioned over the ranks.

    The backbone is the trunk of the causal LM at `critic.path`, or at `model.path` if that is empty. dtype, activation
    checkpointing and AdamW's settings are the policy's, except the learning rate. `model.overrides` apply to the model
    at `model.path` only.

    Raises:
        ModelError: the model cannot be loaded, is not complete, or cannot run packed rows.
    """

    def __init__(self, model: ModelConfig, critic: CriticConfig, optimizer: OptimizerConfig, world: World) -> None:
        self._key = "critic.path" if critic.path else "model.path"
        if critic.path:
            model = dataclasses.replace(model, path=critic.path, overrides={})
        network = load_causal_lm(model, world, self._key)
        if model.gradient_checkpointing:
            checkpoint_activations(network)
        self._vocabulary = vocabulary_size(network)
        self.module = PackedValue(network, world.device).train()
        super().__init__(self.module, model.dtype, optimizer, critic.lr, world)

    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """Values [B, T] of the states before each response token of (prompt_ids, response_ids) pairs, with gradient.

        Every rank must call it equally often; a rank without work passes no trajectories.

        Raises:
            ModelError: a token that is not in the backbone's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        return packed.pad(self._engine(packed))


class ReferencePolicy:
    """The model at `model.path` without gradients or optimizer, its weights partitioned over the ranks by ZeRO-3.

    `temperature` is that of the log-probs, as in training; `key` is the setting that gave `model.path`, for messages.

    Raises:
        ModelError: the model cannot be loaded, is not complete, or cannot run packed rows.
    """

    def __init__(self, model: ModelConfig, world: World, temperature: float = 1.0, key: str = "model.path") -> None:
        import deepspeed

        self.world, self.temperature, self._key = world, temperature, key
        network = load_causal_lm(model, world, key)
        self._vocabulary = vocabulary_size(network)
        policy = PackedPolicy(network).eval().requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=policy, config=settings(model.dtype, world))

    @torch.no_grad()
    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """As `Engine.forward`, without gradient.

        Raises:
            ModelError: a token that is not in the model's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        return packed.pad(self._engine(packed, temperature=self.temperature)[0])


class SamplerState(Enum):
    """What the sampler's weights are worth.

    Attributes:
        STALE: awake, with other weights than the policy's.
        FRESH: awake, with the policy's weights.
        ASLEEP: its GPU memory is free for training; it has no weights until the next refresh.
    """

    STALE = "stale"
    FRESH = "fresh"
    ASLEEP = "asleep"


class WeightSync:
    """Owns the sampler's state and the transfer of weights from the trainer's shards to the sampler.

    The trainer calls `refresh` before anything is sampled and `sleep` before every update:

        stale or asleep -- refresh --> fresh -- sleep --> asleep
    """

    def __init__(self, sampler: Sampler, policy: Engine) -> None:
        self.sampler, self.policy, self.state = sampler, policy, SamplerState.STALE

    def refresh(self) -> float:
        """Makes the sampler's weights those of the policy; returns the seconds it took, 0 if they were fresh.

        All ranks call it.
        """
        if self.state is SamplerState.FRESH:
            return 0.0
        began = time.perf_counter()
        self.sampler.load_weights(self.policy.named_weights())
        self.state = SamplerState.FRESH
        return time.perf_counter() - began

    def sleep(self) -> None:
        """Frees the sampler's GPU memory for an update; the update makes the sampler's weights stale."""
        if self.state is not SamplerState.ASLEEP:
            self.sampler.sleep()
            self.state = SamplerState.ASLEEP


def buckets(parameters: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Cuts named parameters, partitioned or not, into the buckets in which they are gathered for the sampler."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        bucket.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
