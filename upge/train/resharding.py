"""Loads a checkpoint that another number of ranks saved: each rank reads its part of their files.

ZeRO-3 divides every parameter into equal parts, one per rank; the last parts are padded. A rank's parts lie one after
another in flat tensors, one per sub-group of parameters. Master weights and AdamW's moments have this layout.

DeepSpeed's universal checkpoint (0.19.8) is not used for this. Its conversion (`extract_zero_shards_stage3` in
checkpoint/ds_to_universal.py) fails if the optimizer has no moments yet, as during a critic's warm-up, and leaves out
the sets of moments that are not in use. It writes every state twice next to the checkpoint, 24 bytes per parameter, and
every rank then reads all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.errors import ModelError

#: AdamW's state of one sub-group: `step` and the moments; empty before the first update.
AdamState = Mapping[str, Tensor]


class Layout(NamedTuple):
    """Where the parameters lie in the ranks' flat tensors.

    Attributes:
        sub_groups: for each sub-group, name → number of elements of its parameters, in order.
        ranks: the number of ranks over which each parameter is divided.
    """

    sub_groups: Sequence[Mapping[str, int]]
    ranks: int

    def part(self, size: int) -> int:
        """The elements of each rank's part of a parameter with `size` elements, padding included."""
        return -(-size // self.ranks)

    def is_same(self, other: Layout) -> bool:
        """Whether the ranks' flat tensors have the same parameters at the same places."""
        groups, others = ([list(group.items()) for group in one.sub_groups] for one in (self, other))
        return self.ranks == other.ranks and groups == others


def layout(shapes: Sequence[Mapping[str, torch.Size]], ranks: int) -> Layout:
    """The layout of parameters with these shapes by sub-group, in DeepSpeed's order."""
    return Layout([{name: shape.numel() for name, shape in group.items()} for group in shapes], ranks)


def reshard(
    saved: Sequence[Sequence[Float[Tensor, "_"]]], before: Layout, now: Layout, rank: int
) -> list[Float[Tensor, "_"]]:
    """A rank's flat tensors, one per sub-group, from those of all ranks that wrote the checkpoint.

    Args:
        saved: the flat tensors by rank and sub-group, in the layout `before`.
        before, now: the layouts, of the same parameters. Their sub-groups may differ, because DeepSpeed sizes
            sub-groups by a rank's own elements.
        rank: one of the ranks of `now`.

    Returns:
        Tensors in the layout `now`, with zeros as padding.

    Raises:
        KeyError: the checkpoint lacks a parameter.
    """
    places = {}
    for number, group in enumerate(before.sub_groups):
        offset = 0
        for name, size in group.items():
            places[name] = (number, offset)
            offset += before.part(size)
    tensors = []
    for group in now.sub_groups:
        flat = torch.zeros(sum(map(now.part, group.values())), dtype=saved[0][0].dtype)
        end = 0
        for name, size in group.items():
            number, offset = places[name]
            begin, end, width = end, end + now.part(size), before.part(size)
            start, stop = (min(place * now.part(size), size) for place in (rank, rank + 1))
            # The saved ranks whose parts overlap with the elements start .. stop - 1 of the parameter.
            for source in range(start // width, -(-stop // width)):
                low, high = max(start, source * width), min(stop, (source + 1) * width)
                overlap = saved[source][number].narrow(0, offset + low - source * width, high - low)
                flat.narrow(0, begin + low - start, high - low).copy_(overlap)
        tensors.append(flat)
    return tensors


def reshard_states(
    saved: Sequence[Sequence[AdamState]], before: Layout, now: Layout, rank: int
) -> list[dict[str, Tensor]]:
    """As `reshard`, for AdamW's states. All sub-groups are updated together, so they have one step count.

    Raises:
        ValueError: the states do not have the same step count.
    """
    states = [state for of_rank in saved for state in of_rank]
    if not any(states):
        return [{} for _ in now.sub_groups]
    steps = {float(state["step"]) if state else 0.0 for state in states}
    if len(steps) > 1:
        raise ValueError(f"the parts of the optimizer's state are of different steps: {sorted(steps)}")
    names = [name for name in states[0] if name != "step"]
    moments = {n: reshard([[state[n] for state in of_rank] for of_rank in saved], before, now, rank) for n in names}
    return [
        {"step": states[0]["step"].clone(), **{name: moments[name][group] for name in names}}
        for group in range(len(now.sub_groups))
    ]


def deepspeed_part(shards: Sequence[Mapping[str, Any]], before: Layout, now: Layout, rank: int) -> dict[str, Any]:
    """The state of DeepSpeed's ZeRO-3 optimizer that this rank would have saved, from that of all saved ranks."""
    # torch numbers the optimizer's parameters, here the sub-groups. Our AdamW has a single parameter group.
    adamws = [shard["optimizer_state_dict"] for shard in shards]
    states = [[adamw["state"].get(i, {}) for i in range(len(before.sub_groups))] for adamw in adamws]
    resharded = reshard_states(states, before, now, rank)
    (group,) = adamws[0]["param_groups"]
    return {
        **shards[0],
        "fp32_flat_groups": reshard([shard["fp32_flat_groups"] for shard in shards], before, now, rank),
        "optimizer_state_dict": {
            "state": {i: state for i, state in enumerate(resharded) if state},
            "param_groups": [{**group, "params": list(range(len(resharded)))}],
        },
    }


def read(path: Path, mapped: bool = True) -> Any:
    """The content of a checkpoint's file. With `mapped` tensors are memory-mapped, so only what is used is read.

    Apart from tensors and plain values, a file may hold only the two classes of DeepSpeed that its checkpoints need, so
    reading it runs no code from it.

    Raises:
        UnpicklingError: the file holds something else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ModelError if the checkpoint or the file that the block reads is missing or damaged."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnpicklingError):
            reason = "it holds objects other than tensors and plain values, which could execute code"
        raise ModelError(
            f"{path}: the checkpoint cannot be read ({reason}); remove it to resume from an older one"
        ) from error


def model_file(checkpoint: Path, rank: int = 0) -> Path:
    """DeepSpeed's file of a rank with counters, layout and upge's own state, without ZeRO-3's weights."""
    return checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optimizer_file(checkpoint: Path, rank: int) -> Path:
    """DeepSpeed's file of a rank with its part of the master weights and moments; the name depends on the dtype."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    plain, half = checkpoint / name, checkpoint / f"bf16_{name}"
    return half if half.exists() else plain


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint in float32, and its buffers, by their names in the module.

    Raises:
        UnpicklingError, OSError, RuntimeError, KeyError, ValueError: the checkpoint is incomplete or damaged.
    """
    model, ranks = read(model_file(checkpoint)), saved_ranks(checkpoint)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    shards = [read(optimizer_file(checkpoint, rank))["optimizer_state_dict"] for rank in range(ranks)]
    flats = [shard["fp32_flat_groups"] for shard in shards]
    weights = {name: model["module"][name] for name in model["buffer_names"]}
    for name, shape in shapes.items():
        (flat,) = reshard(flats, layout(model["param_shapes"], ranks), layout([{name: shape}], 1), 0)
        weights[name] = flat.reshape(shape)
    tied = model["shared_params"].items()
    return weights | {name: weights[source] for name, source in tied if source in weights}


def saved_ranks(checkpoint: Path) -> int:
    """The number of ranks that wrote a checkpoint."""
    return int(read(model_file(checkpoint))["dp_world_size"])
