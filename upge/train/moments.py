"""Gradients and sets of AdamW's moments in DeepSpeed's ZeRO-3 optimizer.

The optimizer's internal `fp16_groups` are the parameters (of any dtype) in sub-groups. AdamW updates the flat float32
partitions, to which its moments belong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from upge.train.resharding import AdamState

#: The set of moments that is in use at first.
FIRST = "main"


def drop_gradient(zero: Any) -> None:
    """Drop the gradient so far, so that the next backward pass starts from zero."""
    zero.zero_grad()
    zero.averaged_gradients = {}
    zero.grad_partitions_flat_buffer.zero_()
    if zero.offload_optimizer:
        # The last backward pass has copied the gradient to AdamW's partitions and stored the norms of its parts.
        zero.reset_cpu_buffers()
        for partition in zero.fp32_partitioned_groups_flat:
            partition.grad.zero_()


def gradient_norm(zero: Any) -> float:
    """The global gradient norm before clipping; all ranks call it, after the last backward pass."""
    groups = zero._get_norm_groups()
    return float(torch.stack([norm.double() for norm in groups]).norm()) if min(groups) >= 0 else float("nan")


class Moments:
    """Named sets of AdamW's moments and step counts in DeepSpeed's stage 3 optimizer `zero`, one of them in use.

    The other sets stay on the device, so each set takes as much memory as the first: 8 bytes per weight over all ranks.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._idle: dict[str, Any] = {}
        self.in_use = FIRST

    def use(self, name: str) -> None:
        """Put the set `name` in use; a new name starts with fresh moments."""
        if name == self.in_use:
            return
        self._idle[self.in_use] = self._zero.state
        self._zero.state = self._idle.pop(name, defaultdict(dict))
        self.in_use = name

    def reset(self, everything: bool = False) -> None:
        """Reset the moments and steps of the set in use; with `everything` also drop all other sets."""
        if everything:
            self._idle = {}
        self._zero.state = defaultdict(dict)

    @property
    def count(self) -> int:
        """The number of sets."""
        return 1 + len(self._idle)

    def state(self) -> dict[str, Any]:
        """This rank's idle sets, and the name of the set in use, whose content is in DeepSpeed's own checkpoint."""
        flat = self._zero.fp32_partitioned_groups_flat
        idle = {name: [dict(state.get(partition, {})) for partition in flat] for name, state in self._idle.items()}
        return {"in_use": self.in_use, "idle": idle}

    def restore(self, in_use: str, idle: Mapping[str, Sequence[AdamState]]) -> None:
        """Restore the idle sets, one state per sub-group, and the name of the set in use, both from `state`.

        DeepSpeed must already have restored the content of the set in use.
        """
        flat = self._zero.fp32_partitioned_groups_flat
        self._idle = {}
        for name, states in idle.items():
            self._idle[name] = defaultdict(dict)
            for partition, state in zip(flat, states, strict=True):
                if state:
                    self._idle[name][partition] = {k: _placed(k, v, partition) for k, v in state.items()}
        self.in_use = in_use


def _placed(key: str, value: Tensor, partition: Tensor) -> Tensor:
    """The state on the partition's device, except the step count, which AdamW keeps on the CPU."""
    return value if key == "step" else value.to(partition.device)
