"""Deliberate noise: the sampler's policy differs from the trainer's, to compare corrections of this mismatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upge.config import Settings, key
from upge.errors import ConfigError


@dataclass(frozen=True)
class NoiseConfig(Settings):
    """How the sampler of training rollouts is made to differ from the trainer. Evaluations have no noise.

    Nothing is random: the weights and these settings determine the noise. The sampler's log-probs are always those of
    the distribution that tokens were drawn from, with rounded weights or logits, and with `top_p` renormalized over the
    remaining tokens. The trainer's log-probs are those of its exact weights over all tokens.
    """

    weight_bits: int = key(
        0, "round the sampler's weight matrices to integers of N bits (2 to 8) times a scale per row; 0 = exact"
    )
    bfloat16_logits: bool = key(False, "round the sampler's logits to bfloat16; with rollout.engine=transformers only")
    top_p: float = key(
        1.0, "draw tokens of rollouts from the smallest set with this probability; 1 = from all", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_bits != 0 and not 2 <= self.weight_bits <= 8:
            raise ConfigError(f"found {self.weight_bits}; give a number of bits from 2 to 8, or 0", "weight_bits")

    @property
    def is_on(self) -> bool:
        """Whether the sampler differs from the trainer."""
        return self != NoiseConfig()

    def describe(self) -> str:
        """A sentence for the user on what differs; empty without noise."""
        parts = []
        if self.weight_bits:
            parts.append(f"its weight matrices are rounded to {self.weight_bits} bits")
        if self.bfloat16_logits:
            parts.append("its logits are rounded to bfloat16")
        if self.top_p < 1:
            parts.append(f"it draws with top_p={self.top_p:g}")
        if not parts:
            return ""
        return (
            f"rollout.noise: the sampler of training rollouts differs from the trainer on purpose: {', '.join(parts)}; "
            "evaluations use the exact policy"
        )

    def metrics(self) -> dict[str, float]:
        """The settings as metrics of a step; empty without noise."""
        if not self.is_on:
            return {}
        return {
            "noise/weight_bits": self.weight_bits,
            "noise/bfloat16_logits": float(self.bfloat16_logits),
            "noise/top_p": self.top_p,
        }


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Symmetric rounding of each row of a weight: q·s with integers q and one scale s per row.

        s = max|w| / (2^(bits-1) - 1),    q = round(w / s), half to even

    A row is what the last dimension holds: the weights of one output of a linear layer, or the embedding of a token.
    Tensors with fewer than two dimensions (biases, norms) and rows of zeros are returned unchanged. The result is
    computed in float32, by operations that IEEE 754 defines exactly, so it is the same on any machine.

    Args:
        weight: the weight, which is not modified.
        bits: at least 2.

    Returns:
        In the dtype of `weight`, to which q·s is rounded.
    """
    if weight.dim() < 2:
        return weight
    largest = weight.float().abs().amax(dim=-1, keepdim=True)
    scale = largest / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight.float() / scale).round_().mul_(scale).to(weight.dtype)


def with_rounding(weights: Iterable[tuple[str, Tensor]], bits: int) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as the sampler gets them: each `rounded`, or all unchanged if `bits` is 0."""
    for name, weight in weights:
        yield name, rounded(weight, bits) if bits else weight
