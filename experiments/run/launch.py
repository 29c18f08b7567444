"""Several GPUs: `gpus=8` starts torchrun, and a run that does not fit on one GPU says how many it needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace

import torch

from experiments import cli
from experiments.config import Composed
from experiments.files import command
from experiments.run.memory_check import outlook
from experiments.run.workload import planned, pluralize
from upge.errors import ConfigError
from upge.models.loading import has_cuda
from upge.train.distributed import World, is_launched
from upge.train.folder import RunFolder

_KEY = "gpus="


def on_gpus(arguments: Sequence[str], is_dry: bool, module: str = "experiments.run") -> list[str]:
    """The arguments without `gpus=N`; a process that no launcher started is replaced by torchrun with N ranks.

    A dry run plans for N GPUs instead (`hardware.gpus=N`). `module` is the one that torchrun starts.

    Raises:
        ConfigError: N is not a number of GPUs that this machine has.
    """
    rest = [argument for argument in arguments if not argument.startswith(_KEY)]
    given = [argument.removeprefix(_KEY) for argument in arguments if argument.startswith(_KEY)]
    if not given:
        return rest
    text = given[-1]
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"gpus: '{text}' is not a number of GPUs; give 1 or more, as in gpus=8")
    if is_dry:
        return [*rest, f"hardware.gpus={text}"]
    if is_launched():
        return rest
    count, there = int(text), torch.cuda.device_count() if has_cuda() else 0
    if count > there:
        on_cpu = "; for ranks on the CPU start torchrun yourself, see docs/running.md" if not there else ""
        raise ConfigError(f"gpus: {count}, but this machine has {pluralize(there, 'GPU')}{on_cpu}")
    if count > 1:
        line = [*cli.launcher(count), "-m", module, *rest]
        os.execve(line[0], line, os.environ | cli.child_environment())
    return rest


def check_gpus(composed: Composed, arguments: Sequence[str]) -> tuple[str, ...]:
    """A note if a run that no launcher started leaves GPUs idle.

    Raises:
        ConfigError: the run fits only on several of them; the message has the smallest number and the command.
    """
    if is_launched() or not has_cuda() or torch.cuda.device_count() < 2:
        return ()
    there = torch.cuda.device_count()
    fewest = next((count for count in range(1, there + 1) if _fits(composed, count)), None)
    if fewest == 1:
        return (f"this run uses one of {there} GPUs; gpus={there} uses all of them",)
    if fewest is None:
        outlook(composed, planned(replace(composed.config.hardware, gpus=there)))  # raises the error
    line = command("experiments.run", [*arguments, f"gpus={fewest}"])
    raise ConfigError(
        f"model.path: '{composed.config.model.path}' does not fit on one of the {there} GPUs of this machine; it needs "
        f"{fewest} of them. Start `{line}`, or torchrun --nproc_per_node {fewest} -m experiments.run with the same "
        "arguments"
    )


def check_shared(folder: RunFolder, world: World) -> None:
    """Wait for the main rank to start the run's folder, then check that all ranks see it.

    Raises:
        ConfigError: some do not; each would write its part of a checkpoint to a folder of its own.
    """
    started = world.broadcast(folder.metadata.get("started"))
    views = world.gather((socket.gethostname(), folder.metadata.get("started") == started))
    without = sorted({host for host, sees in views if not sees})
    if without:
        raise ConfigError(
            f"output: {folder.path} on {views[0][0]} is another folder than on {', '.join(without)}; choose one that "
            "all machines share"
        )


def _fits(composed: Composed, gpus: int) -> bool:
    try:
        outlook(composed, planned(replace(composed.config.hardware, gpus=gpus)))
    except ConfigError:
        return False
    return True
