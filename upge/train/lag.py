"""Stale rollouts: with `rollout.lag`, the sampler uses the policy's weights from earlier steps.

DeepSpeed's internal `fp16_partitioned_groups_flat` are this rank's parts of the trained weights (of any dtype), from
which every forward pass gathers. They have the layout of the float32 master weights.
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

#: This rank's parts of a policy's trained weights in CPU memory, one flat tensor per sub-group of parameters.
Weights = Sequence[Tensor]


def copied(zero: Any) -> Weights:
    """A copy of this rank's parts of the trained weights in DeepSpeed's stage 3 optimizer `zero`."""
    return [flat.to("cpu", copy=True) for flat in zero.fp16_partitioned_groups_flat]


@contextmanager
def exchanged(zero: Any, weights: Weights | None) -> Iterator[None]:
    """Replace the trained weights by `weights` in the block and restore them exactly after it; all ranks call it.

    This is meant for forward passes: the master weights, from which an optimizer step makes the next weights, do not
    change.

    Args:
        zero: DeepSpeed's stage 3 optimizer.
        weights: the result of `copied`; None = the current weights.
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
    # Small parameters stay gathered between passes, so they are released before the change and gathered again after it.
    zero.checkpoint_event_prologue()
    with torch.no_grad():
        for flat, values in zip(zero.fp16_partitioned_groups_flat, weights, strict=True):
            flat.copy_(values)
    zero.checkpoint_event_epilogue()


class EarlierWeights:
    """The policy's weights from the last steps, in CPU memory.

    Step s (from 0) samples with the weights from before step max(0, s - lag). There are lag + 1 copies during a step,
    and `lag` between steps. Each rank keeps its own part: (lag + 1) · itemsize · trained parameters / ranks bytes.

    Args:
        policy: the policy whose weights are kept.
        lag: the number of steps, at least 1.
    """

    def __init__(self, policy: DeepSpeedModule, lag: int) -> None:
        self.policy, self.lag = policy, lag
        self._before: dict[int, Weights] = {}

    def remember(self, step: int) -> None:
        """Keep the current weights as those before `step`, and drop those that no later step samples with."""
        if step not in self._before:
            self._before[step] = copied(self.policy.zero)
        self._before = {s: weights for s, weights in self._before.items() if s >= step - self.lag}

    def of_sampler(self, step: int) -> Weights | None:
        """The weights with which `step` samples; None = the current weights, as in the first step."""
        return self._before[max(0, step - self.lag)] if step else None

    def save(self, checkpoint: Path, step: int) -> None:
        """Write this rank's parts of the weights that `step` and later steps need; all ranks call it.

        Raises:
            StorageError: a file cannot be written; all ranks raise it.
        """
        world = self.policy.world
        needed = {s: list(weights) for s, weights in self._before.items() if step - self.lag <= s < step}
        with world.together(), disk_errors(checkpoint):
            torch.save(needed, _file(checkpoint, world.rank))

    def load(self, checkpoint: Path) -> None:
        """Restore what `save` wrote, on any number of ranks; all ranks call it.

        Raises:
            ModelError: a file is missing or incomplete; all ranks raise it.
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
        """The largest size of this rank's part of a checkpoint."""
        return self.lag * sum(flat.nbytes for flat in self.policy.zero.fp16_partitioned_groups_flat)


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"earlier_weights_rank_{rank}.pt"
