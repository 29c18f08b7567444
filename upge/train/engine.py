"""A run's models under DeepSpeed ZeRO-3 (policy, critic, reference policy), and the sampler's copy of the weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upge.rollout import Sampler
from upge.rollout.noise import with_rounding
from upge.train.activations import checkpoint_activations
from upge.train.adapter import Adapter, Weight
from upge.train.config import CriticConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_module import (
    DeepSpeedModule,
    check_tokens,
    load_causal_lm,
    vocabulary_size,
)
from upge.train.deepspeed_settings import PLAIN, DeepspeedConfig, settings
from upge.train.distributed import World
from upge.train.files import disk_errors
from upge.train.lag import Weights, exchanged
from upge.train.micro_batches import Costs
from upge.train.packed_policy import Objective, PackedPolicy, PackedValue
from upge.train.packing import PackedBatch, pack
from upge.train.sample import TokenIds

#: The approximate size of the buckets in which parameters are gathered for the sampler.
_BUCKET_BYTES = 512 * 2**20
#: An output embedding [V, D] and its bias; None if they are the policy's own.
OutputWeights = tuple[Tensor | None, Tensor | None]
#: The folder of the LoRA adapters within the folder of an exported model.
ADAPTER = "adapter"


class Engine(DeepSpeedModule):
    """The policy's weights, gradients and optimizer, partitioned over the ranks.

    Log-probs are computed at `temperature`, as in sampling. With `model.lora.rank` only LoRA adapters are trained;
    their initial values and dropout follow from `seed`.

    Attributes:
        adapter: the LoRA adapters, or None if all weights are trained.

    Raises:
        ModelError: the model cannot be loaded, is incomplete, or cannot run packed rows.
        ConfigError: a setting of `model.lora` does not fit the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        world: World,
        temperature: float = 1.0,
        seed: int = 0,
        deepspeed: DeepspeedConfig = PLAIN,
    ) -> None:
        network = load_causal_lm(model, world, deepspeed=deepspeed)
        self.network, self.temperature, self.costs = network, temperature, Costs.of(network)
        policy = PackedPolicy(network).train()
        # After PackedPolicy, which turns all dropout off.
        self.adapter = Adapter(network, model.lora, seed) if model.lora.rank else None
        checkpoint_activations(network, model.gradient_checkpointing, self.adapter is not None)
        super().__init__(policy, model.dtype, optimizer, optimizer.lr, world, deepspeed)

    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """Log-probs [B, T] of the responses of (prompt_ids, response_ids) pairs, with gradient.

        All ranks must make the same number of calls; a rank without work passes no trajectories.
        """
        packed = self.pack(trajectories)
        return packed.pad(self.logprobs(packed)[0])

    def score_norms(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """[B, T] ‖∂ log π_θ/∂z‖² of each response token with logits z, without gradient; called like `forward`."""
        packed = self.pack(trajectories)
        return packed.pad(self._run(packed, score_norms=True)[0])

    def pack(self, trajectories: Sequence[TokenIds]) -> PackedBatch:
        """(prompt_ids, response_ids) pairs as one row on the model's device."""
        return pack(trajectories, self.world.device)

    def logprobs(self, packed: PackedBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs [n] of the responses in packed order and entropies [n] or None, with gradient.

        All ranks must make the same number of calls; a rank without work packs no trajectories.
        """
        return self._run(packed, entropy=entropy)

    def loss(self, packed: PackedBatch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logprobs [n], entropies [n]). Only the loss carries a gradient, part of which is computed here.

        All ranks must make the same number of calls; a rank without work packs no trajectories, and its loss is 0.
        """
        return self._run(packed, objective=objective)

    @torch.no_grad()
    def states(self, packed: PackedBatch) -> Float[Tensor, "n D"]:
        """The hidden states before the responses, in packed order, without gradient and without dropout."""
        return self._engine(packed, states=True)[0]

    def output(self) -> AbstractContextManager[OutputWeights]:
        """No output embedding, because the head of the policy's own forward has it."""
        return nullcontext((None, None))

    def _run(self, packed: PackedBatch, **arguments: Any) -> Any:
        """A pass of the module; dropout in the adapters differs between passes and ranks."""
        with self.adapter.dropout(*self.position, self.world.rank) if self.adapter else nullcontext():
            return self._engine(packed, temperature=self.temperature, **arguments)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, on every rank; gathered in buckets.

        With adapters, these are the merged weights. A tensor is valid until the next one is requested. Every rank must
        exhaust the iterator.
        """
        for weight in _gathered(self._weights()):
            yield weight.name, weight.merged()

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format (safetensors) from rank 0; all ranks call it.

        With LoRA this is the merged model, and the adapter is also written to folder/adapter in PEFT's format.

        Raises:
            StorageError: a file cannot be written; all ranks raise it.
        """
        keep = self.world.is_main
        weights = {n: w.to("cpu", copy=True).contiguous() for n, w in self.named_weights() if keep}
        of_adapter = self.adapter.parameters() if self.adapter is not None else []
        parts = [Weight(name, parameter) for name, parameter in of_adapter]
        matrices = {part.name: part.merged().to("cpu", copy=True) for part in _gathered(parts)}
        with self.world.together(), disk_errors(folder):
            if keep:
                attention = self.network.config._attn_implementation
                self.network.config._attn_implementation = None
                self.network.save_pretrained(folder, state_dict=weights)
                self.network.config._attn_implementation = attention
            if keep and self.adapter is not None:
                self.adapter.save(folder / ADAPTER, matrices)

    def _weights(self) -> list[Weight]:
        if self.adapter is not None:
            return self.adapter.weights()
        return [Weight(name, parameter) for name, parameter in self.network.named_parameters()]

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, without adapters."""
        return sum(getattr(w.parameter, "ds_numel", w.parameter.numel()) for w in self._weights())


class CriticEngine(DeepSpeedModule):
    """V(prompt, response up to t) with its own backbone, partitioned over the ranks.

    The backbone is the trunk of the causal LM at `critic.path`, or at `model.path` if that is empty. dtype, activation
    checkpointing and AdamW's settings are the policy's, except the learning rate. `model.overrides` apply only to the
    model at `model.path`.

    Raises:
        ModelError: the model cannot be loaded, is incomplete, or cannot run packed rows.
    """

    def __init__(
        self,
        model: ModelConfig,
        critic: CriticConfig,
        optimizer: OptimizerConfig,
        world: World,
        deepspeed: DeepspeedConfig = PLAIN,
    ) -> None:
        self._key = "critic.path" if critic.path else "model.path"
        if critic.path:
            model = dataclasses.replace(model, path=critic.path, overrides={})
        network = load_causal_lm(model, world, self._key, deepspeed)
        checkpoint_activations(network, model.gradient_checkpointing)
        self._vocabulary = vocabulary_size(network)
        self.module = PackedValue(network, world.device).train()
        super().__init__(self.module, model.dtype, optimizer, critic.lr, world, deepspeed)

    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """Values [B, T] of the states before each response token of (prompt_ids, response_ids) pairs, with gradient.

        All ranks must make the same number of calls; a rank without work passes no trajectories.

        Raises:
            ModelError: a token is not in the backbone's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        return packed.pad(self._engine(packed))


class ReferencePolicy:
    """The model at `model.path` without gradients or optimizer, its weights partitioned over the ranks by ZeRO-3.

    Log-probs are computed at `temperature`, as in training. `key` is the setting that `model.path` comes from, for
    messages.

    Raises:
        ModelError: the model cannot be loaded, is incomplete, or cannot run packed rows.
    """

    def __init__(
        self,
        model: ModelConfig,
        world: World,
        temperature: float = 1.0,
        key: str = "model.path",
        deepspeed: DeepspeedConfig = PLAIN,
    ) -> None:
        from deepspeed import initialize

        self.world, self.temperature, self._key = world, temperature, key
        network = load_causal_lm(model, world, key, deepspeed)
        self._network, self._vocabulary = network, vocabulary_size(network)
        policy = PackedPolicy(network).eval().requires_grad_(False)
        self._engine, *_ = initialize(model=policy, config=settings(model.dtype, world, deepspeed))

    @torch.no_grad()
    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """As `Engine.forward`, without gradient.

        Raises:
            ModelError: a token is not in the model's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        return packed.pad(self._engine(packed, temperature=self.temperature)[0])

    @torch.no_grad()
    def states(self, packed: PackedBatch) -> Float[Tensor, "n D"]:
        """The hidden states before the responses, in packed order."""
        return self._engine(packed, states=True)[0]

    @contextmanager
    def output(self) -> Iterator[OutputWeights]:
        """The whole output embedding and its bias, on every rank; all ranks enter and leave together."""
        import deepspeed

        head: Any = self._network.get_output_embeddings()
        bias = getattr(head, "bias", None)
        parameters = [head.weight] if bias is None else [head.weight, bias]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield head.weight.detach(), None if bias is None else bias.detach()


class BasePolicy:
    """The policy's model without its adapters, as a reference policy that takes no extra memory."""

    def __init__(self, policy: Engine) -> None:
        assert policy.adapter is not None
        self._policy, self._adapter = policy, policy.adapter

    @torch.no_grad()
    def forward(self, trajectories: Sequence[TokenIds]) -> Float[Tensor, "B T"]:
        """As `Engine.forward`, without gradient and without the adapters."""
        with self._adapter.disabled():
            return self._policy.forward(trajectories)

    def states(self, packed: PackedBatch) -> Float[Tensor, "n D"]:
        """As `Engine.states`, without the adapters."""
        with self._adapter.disabled():
            return self._policy.states(packed)

    def output(self) -> AbstractContextManager[OutputWeights]:
        """No output embedding, because the policy's own has no adapter."""
        return self._policy.output()


#: A model that predicts the responses without being trained: the initial policy, another model, or a base model.
FrozenPolicy = ReferencePolicy | BasePolicy
#: The teacher may also be the policy itself, with its current weights, on another prompt.
Teacher = FrozenPolicy | Engine


class SamplerState(Enum):
    """The state of the sampler's weights.

    Attributes:
        STALE: awake, with outdated weights.
        FRESH: awake, with the weights and the rounding of the last `refresh`.
        ASLEEP: its GPU memory is free for training; it has no weights until the next `refresh`.
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
        #: The weights and the rounding of the last `refresh`.
        self._weights: Weights | None = None
        self._bits = 0

    def refresh(self, weights: Weights | None = None, bits: int = 0) -> float:
        """Copy the policy's weights to the sampler; return the seconds it took, or 0 if they were fresh.

        All ranks call it.

        Args:
            weights: the weights of an earlier step; None = the current weights.
            bits: the bits to which weight matrices are rounded (`rollout.noise.weight_bits`); 0 = no rounding.
        """
        if self.state is SamplerState.FRESH and weights is self._weights and bits == self._bits:
            return 0.0
        began = time.perf_counter()
        with nullcontext() if weights is None else exchanged(self.policy.zero, weights):
            self.sampler.load_weights(with_rounding(self.policy.named_weights(), bits))
        self.state, self._weights, self._bits = SamplerState.FRESH, weights, bits
        return time.perf_counter() - began

    def restart(self) -> None:
        """Restart the sampler's engine with the weights of the last `refresh`; all ranks call it."""
        self.sampler.restart()
        self.state = SamplerState.STALE
        self.refresh(self._weights, self._bits)

    def sleep(self) -> None:
        """Free the sampler's GPU memory for an update."""
        if self.state is not SamplerState.ASLEEP:
            self.sampler.sleep()
            self.state = SamplerState.ASLEEP


def _gathered(weights: Sequence[Weight]) -> Iterator[Weight]:
    """The weights one after another, each whole on every rank until the next one is requested."""
    import deepspeed

    for bucket in buckets(weights):
        with deepspeed.zero.GatheredParameters(
            [part for weight in bucket for part in weight.parts], modifier_rank=None
        ):
            yield from bucket


def buckets(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Cut weights, partitioned or not, into the buckets in which they are gathered for the sampler."""
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        bucket.append(weight)
        size += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weight.parts)
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
