"""The policy in training: a Hugging Face causal LM under DeepSpeed ZeRO-3, on one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.deepspeed_module import DeepSpeedModule, StepResult, checkpoint_activations, load_causal_lm
from upge.train.distributed import World
from upge.train.micro_batches import Costs
from upge.train.packed_policy import Objective, PackedPolicy
from upge.train.packing import PackedBatch, pack
from upge.train.sample import TokenIds

__all__ = ["Engine", "Forward", "StepResult"]

#: Parameters are gathered for the sampler in buckets of about this size.
_BUCKET_BYTES = 512 * 2**20


class Engine(DeepSpeedModule):
    """The policy's weights, gradients and optimizer, partitioned over the ranks.

    Args:
        model: which model, and how it is loaded.
        optimizer: AdamW's settings.
        world: of the run.
        temperature: that log-probs are computed at, as in sampling.

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

    def forward(self, trajectories: Sequence[TokenIds], entropy: bool = False) -> Forward:
        """Log-probs [B, T] of the responses of (prompt_ids, response_ids) pairs, with entropies [B, T] on request.

        Every rank must call it equally often; a rank without work passes no trajectories.
        """
        packed = self.pack(trajectories)
        return Forward(packed, *self.logprobs(packed, entropy))

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

        for bucket in _buckets(list(self.network.named_parameters())):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket], modifier_rank=None):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes weights, all sets of optimizer moments and `state` to folder/tag; all ranks call it."""
        self._save(folder, tag, state)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restores what `save` wrote and returns its `state`.

        Raises:
            ModelError: the checkpoint, or a file of it, is missing or not whole.
        """
        return self._load(folder, tag)

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


class Forward(NamedTuple):
    """Results of a forward pass over a packed batch, which pads them."""

    packed: PackedBatch
    logprobs_packed: Tensor
    entropies_packed: Tensor | None

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """[B, T] with gradient."""
        return self.packed.pad(self.logprobs_packed)

    @property
    def entropies(self) -> Float[Tensor, "B T"] | None:
        """[B, T] with gradient, or None."""
        return None if self.entropies_packed is None else self.packed.pad(self.entropies_packed)


def _buckets(parameters: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
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
