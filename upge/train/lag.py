"""Stale rollouts on purpose: the policy's weights of earlier steps, with which `rollout.lag` samples.

Of DeepSpeed's internals, `fp16_partitioned_groups_flat` are this rank's parts of the trained weights (of any dtype),
from which every forward pass gathers. They have the layout of the float32 master weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upge.train.deepspeed_module import DeepSpeedModule
from upge.train.files import disk_errors
from upge.train.resharding import model_file, read, reading, reshard

#: This rank's parts of a policy's trained weights in the main memory, one flat tensor per sub-group of parameters.
Weights = Sequence[Tensor]


def copied(zero: Any) -> Weights:
    """A copy of this rank's parts of the trained weights in DeepSpeed's stage 3 optimizer `zero`."""
    return [flat.to("cpu", copy=True) for flat in zero.fp16_partitioned_groups_flat]


@contextmanager
def exchanged(zero: Any, weights: Weights | None) -> Iterator[None]:
    """The trained weights are `weights` in the block, and after it bit for bit those of before; all ranks call it.

    It is for forward passes: the master weights, from which an optimizer step makes the next weights, are unchanged.

    Args:
        weights: from `copied`; None = the present ones.
    """
    if weights is None:
        yield
        return
    present = copied(zero)
    _fill(zero, weights)
    try:
        yield
    finally:
        _fill(zero, present)


def _fill(zero: Any, weights: Weights) -> None:
    # Small parameters stay gathered between passes: they are dropped before, and gathered anew after.
    zero.checkpoint_event_prologue()
    with torch.no_grad():
        for flat, values in zip(zero.fp16_partitioned_groups_flat, weights, strict=True):
            flat.copy_(values)
    zero.checkpoint_event_epilogue()


class EarlierWeights:
    """The weights that the policy had before the last steps' updates, in the main memory of each rank.

    Step s (from 0) samples with the weights before step max(0, s - lag). During a step there are lag + 1 copies,
    between steps `lag`. Each rank keeps its own part: (lag + 1) · itemsize · trained parameters / ranks bytes.

    Args:
        policy: whose weights.
        lag: in steps, at least 1.
    """

    def __init__(self, policy: DeepSpeedModule, lag: int) -> None:
        self.policy, self.lag = policy, lag
        self._before: dict[int, Weights] = {}

    def remember(self, step: int) -> None:
        """Keeps the present weights as those before `step`, and drops those that no later step samples with."""
        if step not in self._before:
            self._before[step] = copied(self.policy.zero)
        self._before = {s: weights for s, weights in self._before.items() if s >= step - self.lag}

    def of_sampler(self, step: int) -> Weights | None:
        """The weights with which `step` samples; None = the present ones, as in the first step."""
        return self._before[max(0, step - self.lag)] if step else None

    def save(self, checkpoint: Path, step: int) -> None:
        """Writes this rank's parts of the weights that steps from `step` on need; all ranks call it.

        Raises:
            StorageError: a file cannot be written; all ranks raise it.
        """
        world = self.policy.world
        needed = {s: list(weights) for s, weights in self._before.items() if step - self.lag <= s < step}
        with world.together(), disk_errors(checkpoint):
            torch.save(needed, _file(checkpoint, world.rank))

    def load(self, checkpoint: Path) -> None:
        """Restores what `save` wrote, on any number of ranks; all ranks call it.

        Raises:
            ModelError: a file is missing or not whole; all ranks raise it.
        """
        with self.policy.world.together(), reading(checkpoint):
            before, now = self.policy.layouts(read(model_file(checkpoint)))
            if before.is_same(now):
                self._before = read(_file(checkpoint, self.policy.world.rank), mapped=False)
                return
            saved = [read(_file(checkpoint, rank)) for rank in range(before.ranks)]
            self._before = {
                step: reshard([of_rank[step] for of_rank in saved], before, now, self.policy.world.rank)
                for step in saved[0]
            }

    @property
    def bytes(self) -> int:
        """The size of this rank's part of a checkpoint, at most."""
        return self.lag * sum(flat.nbytes for flat in self.policy.zero.fp16_partitioned_groups_flat)


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"earlier_weights_rank_{rank}.pt"
