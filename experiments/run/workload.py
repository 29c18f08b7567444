"""The machine of a run, and the most trajectories and tokens that a step can have under its configuration."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.models.loading import has_cuda
from upge.train.config import HardwareConfig, RunConfig
from upge.train.distributed import world_size

GIB = 2**30


def pluralize(number: int, noun: str, ending: str = "s") -> str:
    """The number with its noun, as in "1 rank" and "8 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


@dataclass(frozen=True)
class Machine:
    """The ranks of a run and their memory.

    Attributes:
        ranks: processes of the run.
        memory: bytes available to one rank: those of its GPU, or its share of the machine's if there is no GPU.
        has_gpus: whether there are GPUs.
        origin: where these numbers come from, in words.
        is_here: whether it is the machine of this process, so that its disk and main memory are known.
    """

    ranks: int
    memory: int
    has_gpus: bool
    origin: str
    is_here: bool

    @property
    def ranks_here(self) -> int:
        """Ranks on one computer: as the launcher says, else at most 8."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", min(self.ranks, 8)))

    def __str__(self) -> str:
        ranks = pluralize(self.ranks, "GPU" if self.has_gpus else "rank") + ("" if self.has_gpus else " without a GPU")
        return f"{ranks} of {self.memory / GIB:.1f} GiB ({self.origin})"


def present() -> Machine:
    """The machine on which this process runs."""
    return planned(HardwareConfig())


def planned(hardware: HardwareConfig) -> Machine:
    """The machine that the section `hardware` describes; values of 0 are taken from this machine.

    Raises:
        ConfigError: GPUs are stated without their memory, and there is no GPU here to query.
    """
    import psutil
    import torch

    has_gpus = has_cuda()
    ranks = hardware.gpus or world_size()
    stated = [f"hardware.{name}" for name in ("gpus", "memory") if getattr(hardware, name)]
    origin = f"as {' and '.join(stated)} say" if len(stated) > 1 else f"as {stated[0]} says" if stated else "as found"
    if hardware.gpus and not hardware.memory and not has_gpus:
        raise ConfigError(
            f"hardware.gpus: {hardware.gpus}, but hardware.memory is not given and there is no GPU here; give "
            "the GiB of one GPU, such as hardware.memory=79"
        )
    if has_gpus or hardware.gpus:
        own = int(os.environ.get("LOCAL_RANK", "0"))
        memory = int(hardware.memory * GIB) or torch.cuda.get_device_properties(own).total_memory
        here = has_gpus and hardware.gpus <= torch.cuda.device_count()
        return Machine(ranks, memory, True, origin, here)
    total = int(hardware.memory * GIB) or psutil.virtual_memory().total
    return Machine(ranks, total // ranks, False, origin, True)


@dataclass(frozen=True)
class Workload:
    """Upper bounds on the work of a step.

    Attributes:
        rollouts: rollouts of a step, over all ranks.
        given: demonstrations or sides of preference pairs of a step, if every prompt has as many as allowed.
        longest: tokens of the longest prompt and response together.
        updates: optimizer updates in a step.
        ranks: processes.
        block: trajectories that must stay in one micro-batch.
        budget: optimizer.micro_batch_tokens.
        epochs: passes over a step's batch.
    """

    rollouts: int
    given: int
    longest: int
    updates: int
    ranks: int
    block: int
    budget: int
    epochs: int

    @classmethod
    def of(cls, algorithm: Algorithm, config: RunConfig, ranks: int) -> Workload:
        """The work of a step with this algorithm. `data_policy.demonstrations=0`, which means all, counts as one."""
        needs, prompts = algorithm.step_needs, config.prompts_per_step
        each = 2 if needs.preference_pairs else max(config.data_policy.demonstrations, 1) if needs.demonstrations else 0
        rollouts = prompts * config.group_size if needs.rollouts else 0
        members = each + (config.group_size if needs.rollouts else 0)
        return cls(
            rollouts=rollouts,
            given=prompts * each,
            longest=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            updates=config.optimizer.mini_batches * config.optimizer.epochs,
            ranks=ranks,
            block=members if algorithm.reach == "group" else 1,
            budget=config.optimizer.micro_batch_tokens,
            epochs=config.optimizer.epochs,
        )

    @property
    def trajectories(self) -> int:
        """Trajectories of a step, over all ranks."""
        return self.rollouts + self.given

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks, if every response has the maximum length."""
        return self.trajectories * self.longest

    @property
    def tokens_per_update(self) -> int:
        """Tokens of one update on one rank, if every response has the maximum length."""
        return math.ceil(self.tokens * self.epochs / self.updates / self.ranks)

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch on one rank; a block stays together even if it exceeds the budget."""
        return max(self.block * self.longest, min(self.budget, self.tokens_per_update))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one update on one rank, if every response has the maximum length."""
        fitting = max(self.budget // (self.block * self.longest), 1) * self.block
        rows = math.ceil(self.trajectories * self.epochs / self.updates / self.ranks)
        return math.ceil(rows / fitting)

    def __str__(self) -> str:
        sampled = math.ceil(self.rollouts / self.ranks)
        micro_batches = pluralize(self.micro_batches, "micro-batch", "es")
        parts = [
            f"at most {self.trajectories:,} trajectories: {self.rollouts:,} rollouts, {self.given:,} given responses",
            f"at most {self.tokens:,} tokens, {self.longest:,} each; {math.ceil(self.tokens / self.ranks):,} per rank",
            f"sampled per rank: {pluralize(sampled, 'response')}",
            f"{pluralize(self.updates, 'update')} of at most {micro_batches} per rank",
        ]
        return "\n".join(parts)
