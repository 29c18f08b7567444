"""Checks whether a run fits into memory and on the disk before any weight is loaded; errors name the keys to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import psutil

from experiments.config import Composed
from experiments.run.disk import Disk, check_disk
from experiments.run.memory import engine_room, estimate, offloaded, states, takes_transformers
from experiments.run.memory_items import MOMENTS, Memory, Moment, Shapes
from experiments.run.model_shape import ModelShape
from experiments.run.models import frozen_models
from experiments.run.prepare import output_folder
from experiments.run.workload import GIB, Machine, Workload, present
from upge.algorithm import Algorithm
from upge.errors import ConfigError, ModelError
from upge.models.loading import read_config
from upge.pipeline import Pipeline
from upge.rollout.shared_engine import check_tensor_parallel
from upge.train.config import ModelConfig, RunConfig
from upge.train.folder import RunFolder

#: The largest number of GPUs that a message proposes.
MOST_RANKS = 1024


@dataclass(frozen=True)
class Outlook:
    """The work, memory and disk space that a run is expected to take.

    Attributes:
        shapes: shapes of its models.
        workloads: a step's trajectories and tokens in each stage, by the stage's name.
        memory: memory of one rank.
        disk: space on the output folder's disk.
        notes: sentences about what is close to the limit.
    """

    shapes: Shapes
    workloads: Mapping[str, Workload]
    memory: Memory
    disk: Disk
    notes: tuple[str, ...]


def check_fits(composed: Composed) -> tuple[str, ...]:
    """Check at the start of a run that it fits this machine; return notes for the user.

    Raises:
        ConfigError: it does not fit; the message names the keys.
        ModelError: a model cannot be found or run.
    """
    machine, stated = present(), composed.config.hardware.gpus
    other = f"hardware.gpus: {stated}, but this run was started on {machine}"
    expected = outlook(composed, machine)
    disk = check_disk(expected.disk, composed.config, machine, output_folder(composed))
    return (*expected.notes, *disk, *([other] if stated not in (0, machine.ranks) else []))


def outlook(composed: Composed, machine: Machine) -> Outlook:
    """The work, memory and disk space of a run on `machine`; raises the errors of `check_fits`, except for the disk."""
    config, algorithm = composed.config, composed.algorithm
    shapes = _shapes(composed)
    _check_engine_ranks(config, shapes.policy, machine)
    stages = {name: stage.algorithm for name, stage in Pipeline.of(algorithm).stages.items()}
    workloads = {name: Workload.of(one, config, machine.ranks) for name, one in stages.items()}
    micro_batch = max(t.micro_batch for t in workloads.values())
    memory = estimate(config, algorithm, shapes, machine, micro_batch)
    existing = len(RunFolder(output_folder(composed)).checkpoint_steps())
    _check_states(composed, shapes, machine)
    _check_engine(config, shapes.policy, memory)
    _check_refresh(config, memory)
    _check_update(config, memory)
    disk = Disk.of(config, algorithm, shapes, existing)
    notes = (*_tight(memory), *_less_recomputation(config, algorithm, shapes, machine, micro_batch))
    return Outlook(shapes, workloads, memory, disk, notes)


def _shapes(composed: Composed) -> Shapes:
    config, needs = composed.config, composed.algorithm.needs
    policy = ModelShape.of(
        read_config(config.model.path, config.model.overrides), config.model.dtype, config.model.lora
    )
    critic = None
    if any(s.algorithm.critic is not None for s in Pipeline.of(composed.algorithm).stages.values()):
        path = config.critic.path
        own = _shape(replace(config.model, path=path, overrides={}), "critic.path") if path else policy
        critic = own.trunk
    frozen = {name: _shape(one.model, one.key) for name, one in frozen_models(config, needs).items()}
    return Shapes(policy, critic, frozen.get("reference"), frozen.get("teacher"))


def _shape(model: ModelConfig, key: str) -> ModelShape:
    """The shape of a model without adapters; `key` is the setting that gave its path, for messages."""
    try:
        return ModelShape.of(read_config(model.path, model.overrides), model.dtype)
    except ModelError as error:
        raise error.with_key(key) from error


def _check_engine_ranks(config: RunConfig, shape: ModelShape, machine: Machine) -> None:
    """Refuse engines that cannot be divided over `rollout.tensor_parallel` ranks."""
    size = config.rollout.tensor_parallel
    if size > 1 and takes_transformers(config, shape, machine):
        raise ConfigError(
            "rollout.engine=auto takes transformers for a model as small as this, and only vLLM divides an engine over "
            "ranks; set rollout.engine=vllm, or rollout.tensor_parallel=1",
            "rollout.tensor_parallel",
            size,
        )
    check_tensor_parallel(
        size, read_config(config.model.path, config.model.overrides), machine.ranks, machine.ranks_here
    )


def _check_states(composed: Composed, shapes: Shapes, machine: Machine) -> None:
    """Refuse a model whose weights, gradients and AdamW states alone do not fit, with AdamW's temporary tensors."""

    def least(ranks: int) -> int:
        items = states(composed.config, composed.algorithm, shapes, replace(machine, ranks=ranks))
        return sum(item.bytes for item in items if item.is_certain and item.when in ("always", "step"))

    needed = least(machine.ranks)
    if needed <= machine.memory:
        return
    models = f"'{composed.config.model.path}' ({shapes.policy.size} parameters)"
    models += " with its critic" if shapes.critic else ""
    enough = next((n for n in range(machine.ranks + 1, MOST_RANKS + 1) if least(n) <= machine.memory), None)
    more = f"at least {enough} of them" if machine.has_gpus and enough else "a larger machine"
    less = " Fewer bytes stay on a GPU with deepspeed.offload=optimizer or model.lora.rank=16"
    is_plain = offloaded(composed.config, machine) == "none" and not shapes.policy.adapter
    less = less if machine.has_gpus and is_plain else ""
    raise ConfigError(
        f"model.path: {models} takes {needed / GIB:.1f} GiB per rank for weights, gradients and AdamW alone, on "
        f"{machine}; take {more}, or a smaller model (hardware.gpus and hardware.memory say which machine a run is "
        f"meant for).{less}"
    )


def _check_engine(config: RunConfig, shape: ModelShape, memory: Memory) -> None:
    """Check that vLLM's share is large enough for one sequence and leaves room for the training states."""
    machine = memory.machine
    if not memory.engine or config.rollout.engine == "transformers":
        return
    room, least = engine_room(config, shape, machine)
    fraction, total = config.rollout.memory_fraction, machine.memory
    free = total - sum(i.bytes for i in memory.states if i.is_certain and i.when == "always")
    free = free if machine.has_gpus else total
    least_share, most_share = math.ceil(100 * least / total) / 100, math.floor(100 * free / total) / 100
    if room < least:
        held = "the weights and " if machine.has_gpus else ""
        fix = (
            f"raise it to {least_share:g} or more"
            if least_share <= most_share
            else f"take GPUs with more memory{_divided(config, memory)}"
        )
        raise ConfigError(
            f"rollout.memory_fraction: {fraction:g} of {total / GIB:.1f} GiB is {room / GIB:.1f} GiB, and {held}the "
            "cache of one sequence of rollout.max_prompt_tokens + rollout.max_response_tokens take "
            f"{least / GIB:.1f} GiB; {fix}"
        )
    if machine.has_gpus and room > free:
        more = f"take more GPUs (hardware.gpus){_divided(config, memory)}"
        fix = f"lower it to {most_share:g} or less" if least_share <= most_share else more
        raise ConfigError(
            f"rollout.memory_fraction: {fraction:g} of {total / GIB:.1f} GiB is {room / GIB:.1f} GiB, and weights, "
            f"gradients and AdamW take {(total - free) / GIB:.1f} GiB; {fix}"
        )


def _divided(config: RunConfig, memory: Memory) -> str:
    """A further fix where there are several ranks and the engine can be vLLM."""
    can_divide = memory.machine.ranks > 1 and config.rollout.engine != "transformers"
    return ", divide the engines over ranks (rollout.tensor_parallel)" if can_divide else ""


def _check_refresh(config: RunConfig, memory: Memory) -> None:
    """Refuse a model whose states do not fit next to the sampler's weights while these are replaced."""
    machine, least = memory.machine, memory.total("refresh", certain=True)
    if memory.engine and least > machine.memory:
        raise ConfigError(
            f"hardware.gpus: replacing the sampler's weights takes at least {least / GIB:.1f} GiB per rank, for the "
            f"trainer's states, the sampler's weights and a bucket of gathered ones, on {machine}; take more GPUs"
            f"{_divided(config, memory)}, or a smaller model (model.path)"
        )


def _check_update(config: RunConfig, memory: Memory) -> None:
    """Refuse a micro-batch whose activations alone do not fit."""
    machine, least = memory.machine, memory.total("training", certain=True)
    if least <= machine.memory:
        return
    fixes = {"none": "selective or full", "selective": "full"}
    more = fixes.get(config.model.gradient_checkpointing)
    fix = f"set model.gradient_checkpointing={more}, or " if more else ""
    raise ConfigError(
        f"optimizer.micro_batch_tokens: {config.optimizer.micro_batch_tokens:,} tokens leave a rank with at least "
        f"{least / GIB:.1f} GiB in the backward pass, on {machine}; {fix}lower it (at any value, a response of "
        f"rollout.max_response_tokens={config.rollout.max_response_tokens:,} must fit)"
    )


def _tight(memory: Memory) -> list[str]:
    """Warnings where the whole estimate, which is not a lower bound, exceeds the limit."""
    machine, warnings = memory.machine, []
    for moment in MOMENTS:
        total = memory.total(moment)
        if total > machine.memory:
            warnings.append(
                f"{moment} is estimated at {total / GIB:.1f} GiB per rank on {machine} and may run out of memory; "
                f"{_REMEDY[moment]}"
            )
    there = psutil.virtual_memory().total
    if machine.is_here and memory.host_peak > there:
        largest = max((*memory.offloaded, *memory.remembered, *memory.host), key=lambda item: item.bytes)
        fix = "set deepspeed.offload=none, or take more machines" if memory.offloaded else "take more machines"
        warnings.append(
            f"this machine has {there / GIB:.1f} GiB of main memory, and {memory.host_peak / GIB:.1f} GiB are needed, "
            f"most of it for this: {largest.what}. The run may be killed; {fix}"
        )
    return warnings


def _less_recomputation(
    config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, machine: Machine, micro_batch: int
) -> Iterator[str]:
    """Propose the gradient checkpointing that recomputes least and leaves a tenth of the memory free."""
    current = config.model.gradient_checkpointing
    for mode in ("none", "selective"):
        if mode == current or current == "none" or not machine.has_gpus:
            return
        changed = replace(config, model=replace(config.model, gradient_checkpointing=mode))
        needed = estimate(changed, algorithm, shapes, machine, micro_batch).total("training")
        if needed <= 0.9 * machine.memory:
            yield (
                f"model.gradient_checkpointing={mode} is also estimated to fit, with {needed / GIB:.1f} GiB per rank "
                f"on {machine}, and recomputes less than {current}"
            )
            return


#: What to change where a part of a step may run out of memory.
_REMEDY: dict[Moment, str] = {
    "sampling": "lower rollout.memory_fraction",
    "refresh": "take more GPUs (hardware.gpus)",
    "training": "lower optimizer.micro_batch_tokens",
    "step": "take more GPUs (hardware.gpus)",
}
