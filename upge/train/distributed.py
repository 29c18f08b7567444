"""The process group: one process or several, on CPU (gloo) or CUDA (nccl)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from upge.errors import ConfigError, RunError, UserError
from upge.models.loading import has_cuda

_T = TypeVar("_T")
#: The loopback interface; Linux and macOS name it differently.
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run.

    Attributes:
        rank: 0 .. size - 1.
        size: the number of processes.
        device: where this rank's part of the model is.
        group: the gloo group that exchanges Python objects, even if tensors use nccl; None = the default group.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """`value` of every rank, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size  # filled by torch
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_main(self, value: _T) -> list[_T]:
        """`value` of every rank, in order of rank, on the main rank; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None  # filled by torch
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def broadcast(self, value: _T) -> _T:
        """The main rank's `value` on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise the first UserError or RunError of any rank in the block on all ranks; all ranks run the block.

        The block must not contain a collective operation: the other ranks would wait in it for a rank that failed.
        """
        error: UserError | RunError | None = None
        try:
            yield
        except (UserError, RunError) as own:
            error = own
        _raise_first(self.gather(error), self.rank, error)


def gather_results(world: World, work: Callable[[], _T]) -> list[_T]:
    """What `work` returns on each rank, in order of rank; every rank gets the whole list.

    Raises:
        UserError, RunError: `work` raised it on some rank; all ranks raise that of the first such rank.
    """
    result: _T | None = None
    error: UserError | RunError | None = None
    try:
        result = work()
    except (UserError, RunError) as own:
        error = own
    of_ranks = world.gather((result, error))
    _raise_first([of_rank for _, of_rank in of_ranks], world.rank, error)
    return [cast(_T, of_rank) for of_rank, _ in of_ranks]


def _raise_first(errors: Sequence[UserError | RunError | None], rank: int, own: UserError | RunError | None) -> None:
    """Raise the first error in `errors`; if it is this rank's `own`, with its traceback."""
    for of, error in enumerate(errors):
        if error is not None:
            error = own if of == rank and own is not None else error
            error.is_shared = True
            raise error


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """The number of processes that the launcher started; known before they are connected, see `check_launched`."""
    return _number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's rank as the launcher set it; known before it is connected, see `check_launched`."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's rank on its machine, as the launcher set it; known before it is connected."""
    return _number("LOCAL_RANK", launched_rank())


def _number(name: str, default: int) -> int:
    """The value of an environment variable; the default if it is not a number (`check_launched` refuses that)."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def check_launched() -> None:
    """Check the environment variables that a launcher sets.

    Raises:
        ConfigError: some are missing, not numbers, or inconsistent.
    """
    fix = "start several ranks with torchrun, which sets all of them, or unset them for a single process"
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    for name, text in given.items():
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ConfigError(f"the environment variable {name} is {text!r}, not a number; {fix}")
    if not given:
        return
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    needed += ["MASTER_ADDR", "MASTER_PORT"] if given.get("WORLD_SIZE", "1") != "1" else []
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(f"the environment variable {missing[0]} is not set ({', '.join(needed)} are needed); {fix}")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise ConfigError(f"RANK={given['RANK']} is not below WORLD_SIZE={given['WORLD_SIZE']}; {fix}")


def connect() -> World:
    """Join the process group, which DeepSpeed needs even for one process.

    Several ranks meet at MASTER_ADDR, which their launcher set. A single process has its store in memory, and its
    backend listens only on the loopback interface.

    Raises:
        ConfigError: there is a GPU that torch cannot use.
    """
    cuda = has_cuda()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_alone = world_size() == 1
    if is_alone:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _LOOPBACK)
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
    import deepspeed

    if not cuda:
        # Otherwise DeepSpeed compiles a shared-memory extension, which needs a compiler and is not faster here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if is_alone and not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    group = dist.new_group(backend="gloo") if cuda else None
    assert not isinstance(group, int), "this process is a member of the group"
    return World(dist.get_rank(), dist.get_world_size(), device, group)


def leave(world: World | None, code: int, together: bool | None = None) -> None:
    """Flush all output and end this process at once.

    This skips the libraries' cleanup at exit, which sometimes aborts a run that has finished.

    Args:
        world: the run's processes; None without a process group.
        code: the exit code.
        together: whether to wait for the other ranks first, because a launcher ends all ranks as soon as one fails;
            None = wait if the code is 0.
    """
    if world is not None and (code == 0 if together is None else together) and dist.is_initialized():
        world.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
