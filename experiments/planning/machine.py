"""The machine that a run is planned for or started on: how many ranks, and how much memory each of them has."""

from __future__ import annotations

import os
from dataclasses import dataclass

from upge.errors import ConfigError
from upge.train.config import HardwareConfig
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
