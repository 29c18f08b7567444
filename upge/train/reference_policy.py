"""The reference policy: a frozen model, such as the one that training started from, for its log-probs only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from upge.train.config import ModelConfig
from upge.train.deepspeed_module import check_tokens, load_causal_lm, settings, vocabulary_size
from upge.train.distributed import World
from upge.train.engine import Forward
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack
from upge.train.sample import TokenIds


class ReferencePolicy:
    """The model at `model.path` without gradients or optimizer, its weights partitioned over the ranks by ZeRO-3.

    Args:
        model: which model, and how it is loaded.
        world: of the run.
        temperature: of the log-probs, as in training.
        key: the setting that gave `model.path`, for messages.

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
    def forward(self, trajectories: Sequence[TokenIds]) -> Forward:
        """Log-probs [B, T] of the responses of (prompt_ids, response_ids) pairs, without gradient.

        Every rank must call it equally often; a rank without work passes no trajectories.

        Raises:
            ModelError: a token that is not in the model's vocabulary.
        """
        check_tokens(trajectories, self._vocabulary, self._key)
        packed = pack(trajectories, self.world.device)
        logprobs, _ = self._engine(packed, temperature=self.temperature, entropy=False)
        return Forward(packed, logprobs, None)
