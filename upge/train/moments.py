"""What DeepSpeed's ZeRO-3 optimizer holds on this rank beside the weights: the gradient and AdamW's moments.

All knowledge of its inside is here: `fp16_groups` are the parameters in sub-groups (of any dtype), the flat float32
partitions are what AdamW updates and what its moments are kept for.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The set of moments that is in use at first.
FIRST = "main"


def take_gradient(zero: Any, rank: int) -> list[Tensor]:
    """This rank's part of every parameter's gradient, copied, in float32 and without padding; then none is left.

    The next backward pass starts from zero, and of the pass that was taken no trace remains in norms or moments.

    Args:
        zero: DeepSpeed's stage 3 optimizer, after the last backward pass of an update.
        rank: this process's place in the partition.
    """
    partitions = zero.get_fp32_grad_partitions()
    assert partitions, "no gradient to take: backward comes first"
    taken = []
    for group, parameters in enumerate(zero.fp16_groups):
        for place, parameter in enumerate(parameters):
            size = parameter.partition_numel()
            held = min(max(parameter.ds_numel - rank * size, 0), size)
            taken.append(partitions[group][place].reshape(-1)[:held].clone())
    drop_gradient(zero)
    return taken


def drop_gradient(zero: Any) -> None:
    """Forgets the gradient so far: the next backward pass starts from zero."""
    zero.zero_grad()
    zero.averaged_gradients = {}
    zero.grad_partitions_flat_buffer.zero_()


def gradient_norm(zero: Any) -> float:
    """The global norm of the gradient so far, before clipping; after the last backward pass, on all ranks."""
    groups = [zero.get_grad_norm_direct(zero.averaged_gradients[i], g) for i, g in enumerate(zero.fp16_groups)]
    return float(torch.stack([norm.double() for norm in groups]).norm()) if min(groups) >= 0 else float("nan")


class Moments:
    """Named sets of AdamW's moments and step counts over the same weights, one of them in use.

    Those not in use stay where they are, so each set costs as much memory as the first: 8 bytes a weight over all
    ranks.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._idle: dict[str, Any] = {}
        self.in_use = FIRST

    def use(self, name: str) -> None:
        """Puts the set `name` in use; a name that never was starts with fresh moments."""
        if name == self.in_use:
            return
        self._idle[self.in_use] = self._zero.state
        self._zero.state = self._idle.pop(name, defaultdict(dict))
        self.in_use = name

    def reset(self, everything: bool = False) -> None:
        """Makes the set in use fresh: no moments, no steps. With `everything` all idle sets are dropped, too."""
        if everything:
            self._idle = {}
        self._zero.state = defaultdict(dict)

    def save(self, path: Path) -> None:
        """Writes this rank's idle sets and which is in use; the one in use is in DeepSpeed's checkpoint."""
        flat = self._zero.fp32_partitioned_groups_flat
        idle = {name: [dict(state.get(partition, {})) for partition in flat] for name, state in self._idle.items()}
        torch.save({"in_use": self.in_use, "idle": idle}, path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote; DeepSpeed has restored the set in use before."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        flat = self._zero.fp32_partitioned_groups_flat
        self._idle = {}
        for name, states in saved["idle"].items():
            self._idle[name] = defaultdict(dict)
            for partition, state in zip(flat, states, strict=True):
                if state:
                    self._idle[name][partition] = {k: _placed(k, v, partition) for k, v in state.items()}
        self.in_use = saved["in_use"]


def _placed(key: str, value: Tensor, partition: Tensor) -> Tensor:
    """AdamW keeps its count of steps on the CPU, wherever the weights are: reading it there needs no waiting."""
    return value if key == "step" else value.to(partition.device)
