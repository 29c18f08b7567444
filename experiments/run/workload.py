"""The machine of a run, and the trajectories and tokens of a step, at most: what the configuration allows."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.train.config import HardwareConfig, RunConfig
from upge.train.distributed import world_size

GIB = 2**30


def counted(number: int, noun: str) -> str:
    """As in "1 rank", "8 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Machine:
    """Ranks and what each of them has.

    Attributes:
        ranks: processes of the run.
        memory: bytes that one rank may fill: its GPU's, or its share of the machine's where there is none.
        has_gpus: whether there are GPUs.
        origin: in words, where these numbers come from.
    """

    ranks: int
    memory: int
    has_gpus: bool
    origin: str

    def __str__(self) -> str:
        ranks = counted(self.ranks, "GPU" if self.has_gpus else "rank") + ("" if self.has_gpus else " without a GPU")
        return f"{ranks} of {self.memory / GIB:.1f} GiB ({self.origin})"


def present() -> Machine:
    """The machine of this start."""
    return planned(HardwareConfig())


def planned(hardware: HardwareConfig) -> Machine:
    """The machine that the section `hardware` states; what it leaves at 0 is that of this start.

    Raises:
        ConfigError: GPUs are stated without their memory, and there is none here to ask.
    """
    import psutil
    import torch

    found = torch.cuda.is_available()
    ranks = hardware.gpus or world_size()
    stated = [f"hardware.{name}" for name in ("gpus", "memory") if getattr(hardware, name)]
    origin = f"as {' and '.join(stated)} say" if len(stated) > 1 else f"as {stated[0]} says" if stated else "as found"
    if hardware.gpus and not hardware.memory and not found:
        raise ConfigError(
            f"hardware.gpus: {hardware.gpus}, but hardware.memory is not given and there is no GPU here to ask; give "
            "the GiB of one GPU, such as hardware.memory=79"
        )
    if found or hardware.gpus:
        own = int(os.environ.get("LOCAL_RANK", "0"))
        memory = int(hardware.memory * GIB) or torch.cuda.get_device_properties(own).total_memory
        return Machine(ranks, memory, True, origin)
    total = int(hardware.memory * GIB) or psutil.virtual_memory().total
    return Machine(ranks, total // ranks, False, origin)


@dataclass(frozen=True)
class Traffic:
    """
    Attributes:
        rollouts: sampled in a step, over all ranks.
        given: demonstrations, or the sides of preference pairs, beside them, if every prompt has as many as it may.
        longest: tokens of a prompt and a response.
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
    def of(cls, algorithm: Algorithm, config: RunConfig, ranks: int) -> Traffic:
        """That of a run's step with this algorithm. `data_policy.demonstrations=0`, all of them, counts as one."""
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
        """Of a step, over all ranks."""
        return self.rollouts + self.given

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks, if every response is as long as it may be."""
        return self.trajectories * self.longest

    @property
    def tokens_per_update(self) -> int:
        """On one rank, likewise."""
        return math.ceil(self.tokens * self.epochs / self.updates / self.ranks)

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch on one rank. What must stay together does so beyond the budget, too."""
        return max(self.block * self.longest, min(self.budget, self.tokens_per_update))

    @property
    def micro_batches(self) -> int:
        """Of one update on one rank, if every response is as long as it may be."""
        fitting = max(self.budget // (self.block * self.longest), 1) * self.block
        rows = math.ceil(self.trajectories * self.epochs / self.updates / self.ranks)
        return math.ceil(rows / fitting)

    def __str__(self) -> str:
        sampled = math.ceil(self.rollouts / self.ranks)
        parts = [
            f"at most {self.trajectories:,} trajectories: {self.rollouts:,} rollouts, {self.given:,} given responses",
            f"at most {self.tokens:,} tokens, {self.longest:,} each; {math.ceil(self.tokens / self.ranks):,} a rank",
            f"sampled by a rank: {counted(sampled, 'response')}",
            f"{counted(self.updates, 'update')}; micro-batches of each on a rank: at most {self.micro_batches}",
        ]
        return "\n".join(parts)
