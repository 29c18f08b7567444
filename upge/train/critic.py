"""The critic in training: the value of the state before each response token, under its own ZeRO-3 engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upge.train.config import CriticConfig, ModelConfig, OptimizerConfig
from upge.train.deepspeed_module import (
    DeepSpeedModule,
    check_tokens,
    checkpoint_activations,
    load_causal_lm,
    vocabulary_size,
)
from upge.train.distributed import World
from upge.train.packed_attention import prepare
from upge.train.packed_policy import predicting_states
from upge.train.packing import PackedBatch, pack
from upge.train.sample import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The critic's folder inside a checkpoint's; DeepSpeed's file names would be those of the policy's.
_FOLDER = "critic"


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
        module = PackedValue(network, world.device).train()
        super().__init__(module, model.dtype, optimizer, critic.lr, world)
        self.module = module

    def forward(self, trajectories: Sequence[TokenIds]) -> ValueForward:
        """Values [B, T] of the states before each response token of (prompt_ids, response_ids) pairs.

        Every rank must call it equally often; a rank without work passes no trajectories.

        Raises:
            ModelError: a token that is not in the backbone's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        return ValueForward(packed, self._engine(packed))

    def save(self, folder: Path, tag: str) -> None:
        """Writes weights and all sets of optimizer moments to folder/tag/critic; all ranks call it."""
        self._save(folder / tag, _FOLDER, {})

    def load(self, folder: Path, tag: str) -> None:
        """Restores what `save` wrote.

        Raises:
            ModelError: there is none, or it is not whole.
        """
        self._load(folder / tag, _FOLDER)


class ValueForward(NamedTuple):
    """Values of a packed batch, which pads them."""

    packed: PackedBatch
    values_packed: Float[Tensor, "n"]

    @property
    def values(self) -> Float[Tensor, "B T"]:
        """[B, T] with gradient, 0 behind each response; entry t is the value before token t is chosen."""
        return self.packed.pad(self.values_packed)


class ValueHead(nn.Linear):
    """v = w·h + b, initialized to zero.

    With values of zero the first returns and advantages depend on the rewards only, where a random head would add a
    bias as large as its values. The original code for fine-tuning language models with rewards does the same
    (arXiv 1909.08593, reproduced in arXiv 2403.17031). With one output there is no symmetry to break: w learns from
    the first update on, the trunk from the second.

    The parameters have the backbone's dtype. The product is computed in float32 at least, because half precision would
    round the values to two or three digits.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(width, 1, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        """Values [n] of hidden states [n, D]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))[:, 0]


class PackedValue(nn.Module):
    """The trunk of a Hugging Face causal LM with a value head: a packed batch → the values of its states.

    Args:
        model: the causal LM, before or after DeepSpeed has partitioned it. Its attention is replaced in place, and its
            output embedding is dropped.
        device: of the head.

    Raises:
        ModelError: an architecture whose attention cannot be reproduced here.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str) -> None:
        super().__init__()
        prepare(model)
        output = cast(nn.Linear, model.get_output_embeddings())
        self.trunk = model.base_model
        self.head = ValueHead(output.in_features, output.weight.dtype, device)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "n"]:
        """The value [n] of the state before each response token, in packed order.

        A batch without response tokens gives an empty result that is still connected to every parameter.
        """
        return self.head(predicting_states(self.trunk, batch))
