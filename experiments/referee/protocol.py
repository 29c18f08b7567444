"""The protocol: one seeded float64 batch, cut in several ways, and the gradient of a loss by its log-probs.

An update is a batch of B rollouts that R processes share, each in G micro-batches. As in training, gradients are summed
over micro-batches and averaged over processes. A loss is judged by the weight of each token,

    w = -∂(1/R Σ_ranks Σ_micro loss)/∂ log π_θ,    [B, T],

which an algorithm of this project gives as `Estimate.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import algorithms
from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.trajectories import Trajectories

#: Sizes of the batch. They differ from each other and from the numbers of micro-batches and ranks, so that a factor of
#: the gradient names its cause; only the layout with 8 micro-batches has as many of them as there are questions.
#: `LIMIT` is the response limit in tokens.
QUESTIONS, GROUP, LENGTH, LIMIT = 8, 3, 7, 11


class MissingLossError(Exception):
    """A version of a framework does not have a loss or a setting that other versions have."""


@dataclass(frozen=True)
class Layout:
    """How an update is cut.

    Attributes:
        micro_batches: G, per process.
        ranks: R, the processes.
        padding: further columns of padding on the right of every response.
        generation: S, the micro-batches for which rollouts are sampled at once; 0 = G.
    """

    micro_batches: int = 1
    ranks: int = 1
    padding: int = 0
    generation: int = 0

    def __str__(self) -> str:
        parts = [f"{self.micro_batches} micro-batches" if self.micro_batches > 1 else ""]
        parts += [f"sampled for {self.generation}" if self.generation else ""]
        parts += [f"{self.ranks} ranks" if self.ranks > 1 else ""]
        parts += [f"{self.padding} columns of padding" if self.padding else ""]
        return ", ".join(filter(None, parts)) or "whole"


#: Rows of the batch whose first token has a large importance ratio.
OUTLIERS = [0, 9, 15]
#: The layouts of every loss, and those in which the rollouts of one sampling are not those of one update.
LAYOUTS = (Layout(), Layout(2), Layout(4), Layout(padding=5), Layout(ranks=2))
GENERATIONS = (Layout(2, generation=4), Layout(8, generation=2))


@dataclass(frozen=True)
class Case:
    """What is compared: an algorithm of this project, and what a framework calls it.

    Attributes:
        name: the framework's name, with its setting.
        algorithm: the name of this project's algorithm.
        overrides: changes of its file that give it the framework's own settings.
        settings: what the adapter passes to the framework.
        layouts: how the update is cut.
    """

    name: str
    algorithm: str
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    layouts: tuple[Layout, ...] = LAYOUTS

    def load(self) -> Algorithm:
        """This project's algorithm.

        Raises:
            ConfigError: it is a pipeline of several.
        """
        loaded = algorithms.load(self.algorithm, list(self.overrides))
        if not isinstance(loaded, Algorithm):
            raise ConfigError(
                f"found {self.algorithm!r}, which is several algorithms in a row; give one of them", "algo"
            )
        return loaded


@dataclass(frozen=True)
class Batch:
    """A batch of an update, padded.

    Attributes:
        trajectories: what the algorithms read.
        logprobs, old_logprobs: [B, T], also on padding, where a loss without a mask would read them.
        advantages: [B] of this project's algorithm, for losses that do not compute their own.
    """

    trajectories: Trajectories
    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Micro:
    """A micro-batch of b rollouts, as a loss gets it.

    Attributes:
        logprobs: [b, T] log π_θ with gradient.
        old_logprobs: [b, T] of the policy that sampled.
        mask: [b, T] True on the tokens of responses.
        advantages, rewards: [b].
        group: [b] number of the prompt.
        layout: how the update is cut.
        tokens: response tokens of the whole update, of all micro-batches and ranks.
        generation_tokens: response tokens of the sampling that this micro-batch belongs to.
        rollouts: B, of the whole update.
        group_size: rollouts of each prompt.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    advantages: Tensor
    rewards: Tensor
    group: Tensor
    layout: Layout
    tokens: int
    generation_tokens: int
    rollouts: int
    group_size: int

    @property
    def logits(self) -> Tensor:
        """[b, T, 2] logits of a vocabulary of two tokens, with token 0 the sampled one: log p and log(1 - p).

        Their log-softmax at token 0 is `logprobs`, so ∂/∂ log p of any loss of the distribution is what is compared.
        """
        return torch.stack([self.logprobs, torch.log1p(-self.logprobs.exp())], dim=-1)


#: The forward and backward passes of one process: calls `backward` for each micro-batch.
Update = Callable[[Sequence[Micro]], None]


def make_batch(algorithm: Algorithm, padding: int = 0, seed: int = 0) -> Batch:
    """The batch: off-policy rollouts of all lengths, with rewards that differ within each group and importance ratios
    on both sides of every clip. For an algorithm that learns from demonstrations alone, all are demonstrations."""
    g = torch.Generator().manual_seed(seed)
    b, width = QUESTIONS * GROUP, LENGTH + padding

    def noise(scale: float) -> Tensor:
        # Drawn at one size, whatever the padding, so that the padded batch has the same values.
        return torch.randn(b, LENGTH + 16, dtype=torch.float64, generator=g)[:, :width] * scale

    lengths = torch.randint(1, LENGTH + 1, (b,), generator=g)
    lengths[:2] = torch.tensor([LENGTH, 1])
    logprobs = -noise(1.0).abs() - 0.05
    old = (logprobs + noise(0.3)).clamp(max=-1e-3)
    # Ratios of 4, 6 and 12 on bad responses, beyond the bounds of dual clips and of CISPO.
    old[OUTLIERS, 0] = logprobs[OUTLIERS, 0] - torch.tensor([4.0, 6.0, 12.0], dtype=torch.float64).log()
    rewards = torch.rand(b, dtype=torch.float64, generator=g)
    rewards = (rewards * 4).round() / 4 + torch.arange(b) % GROUP * 0.5
    imitates = not algorithm.needs.rollouts
    trajectories = Trajectories(
        logprobs=logprobs.clone().requires_grad_(),
        response_mask=torch.arange(width) < lengths[:, None],
        rewards=torch.ones(b, dtype=torch.float64) if imitates else rewards,
        group=torch.arange(b) // GROUP,
        is_demonstration=torch.full((b,), imitates),
        behavior_logprobs=None if imitates else old,
        finished=torch.ones(b, dtype=torch.bool),
    )
    factors = next(iter(algorithm.estimate(trajectories).terms.values()))
    return Batch(trajectories, logprobs, old, factors.advantages[:, 0])


def micro_batches(batch: Batch, layout: Layout, leaf: Tensor) -> list[list[Micro]]:
    """The micro-batches of each rank; their log-probs are rows of `leaf` [B, T].

    A sampling for more micro-batches than the update has also covers other updates with as many tokens.
    """
    mask, rows = batch.trajectories.response_mask, torch.arange(len(leaf))
    g, samplings = layout.micro_batches, layout.generation or layout.micro_batches
    parts = [rank.chunk(g) for rank in rows.chunk(layout.ranks)]
    total = int(mask.sum())

    def sampled(step: int) -> int:
        if samplings >= g:
            return total * samplings // g
        first = step // samplings * samplings
        return sum(int(mask[rank[i]].sum()) for rank in parts for i in range(first, first + samplings))

    def cut(some: Tensor, step: int) -> Micro:
        return Micro(
            logprobs=leaf[some],
            old_logprobs=batch.old_logprobs[some],
            mask=mask[some],
            advantages=batch.advantages[some],
            rewards=batch.trajectories.rewards[some],
            group=batch.trajectories.group[some],
            layout=layout,
            tokens=total,
            generation_tokens=sampled(step),
            rollouts=len(leaf),
            group_size=GROUP,
        )

    return [[cut(some, step) for step, some in enumerate(rank)] for rank in parts]


def weights(update: Update, batch: Batch, layout: Layout) -> Tensor:
    """[B, T] the weight of each token in one optimizer step: minus the gradient, averaged over ranks."""
    leaf = batch.logprobs.clone().requires_grad_()
    for rank in micro_batches(batch, layout, leaf):
        update(rank)
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return -gradient / layout.ranks


def each(loss: Callable[[Micro], Tensor], scale: Callable[[Layout], float] = lambda layout: 1.0) -> Update:
    """An update from the loss of a micro-batch, which is multiplied by `scale` before the backward pass."""

    def update(micros: Sequence[Micro]) -> None:
        for micro in micros:
            (loss(micro) * scale(micro.layout)).backward()

    return update
