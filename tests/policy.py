"""A tabular policy for the tests: free logits, so gradients can be compared entry by entry in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upge import Trajectories


@dataclass
class Sample:
    """Some trajectories of a tabular policy with `logits` [B, T, V] as the only parameters.

    `rows` gives, for the textbook objectives, one dictionary per trajectory: its own scalars and its own unpadded
    per-token tensors, so that an objective can be written as plain loops over questions, responses and tokens.
    """

    logits: Tensor
    tokens: Tensor
    batch: Trajectories

    @property
    def rows(self) -> list[dict]:
        logprobs, entropies = log_softmax(self.logits, self.tokens)
        found = []
        for i in range(len(self.tokens)):
            n = int(self.batch.lengths[i])
            row = {
                "logp": logprobs[i, :n],
                "entropy": entropies[i, :n],
                "reward": float(self.batch.rewards[i]),
                "group": int(self.batch.group[i]),
                "demo": bool(self.batch.is_demonstration[i]),
                "preference": int(self.batch.preference[i]),
            }
            for name in ("behavior", "sampler", "reference"):
                row[name] = getattr(self.batch, f"{name}_logprobs")[i, :n]
            row["values"] = self.batch.values[i, :n]
            found.append(row)
        return found

    @property
    def questions(self) -> list[list[dict]]:
        rows = self.rows
        return [[r for r in rows if r["group"] == g] for g in sorted({r["group"] for r in rows})]


def log_softmax(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token log-probs and entropies, each [B, T]."""
    full = logits.log_softmax(dim=-1)
    return full.gather(-1, tokens[..., None])[..., 0], -(full.exp() * full).sum(dim=-1)


def sample(
    seed: int = 0, groups: int = 5, rollouts: int = 4, length: int = 6, vocabulary: int = 11, pairs: bool = False
):
    """Groups of different success with a demonstration each, off-policy by a realistic amount; group 0 fails."""
    g = torch.Generator().manual_seed(seed)
    size = rollouts + 1
    b = groups * size
    logits = torch.randn(b, length, vocabulary, dtype=torch.float64, generator=g).requires_grad_()
    tokens = torch.randint(0, vocabulary, (b, length), generator=g)
    lengths = torch.randint(1, length + 1, (b,), generator=g)
    logprobs, entropies = log_softmax(logits, tokens)
    noise = lambda scale: torch.randn(b, length, dtype=torch.float64, generator=g) * scale  # noqa: E731
    number = torch.arange(b)
    is_demonstration = number % size == rollouts
    rewards = torch.randint(0, 2, (b,), generator=g).double()
    rewards[:size], rewards[size : 2 * size] = 0.0, 1.0
    rewards[is_demonstration] = 1.0
    preference = torch.zeros(b, dtype=torch.long)
    if pairs:
        preference[number % size == 0], preference[number % size == 1] = 1, -1
    batch = Trajectories(
        logprobs=logprobs,
        response_mask=torch.arange(length) < lengths[:, None],
        rewards=rewards,
        group=number // size,
        is_demonstration=is_demonstration,
        behavior_logprobs=logprobs.detach() + noise(0.25),
        sampler_logprobs=logprobs.detach() + noise(0.25),
        reference_logprobs=logprobs.detach() + noise(0.5),
        values=noise(0.5),
        entropies=entropies,
        preference=preference,
        step=7,
    )
    return Sample(logits, tokens, batch)
