"""The machine: GPU, driver, packages, memory, disk, compiler. Each rank notes facts; rows are made of all of them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from experiments.doctor.rows import Context, Row, Verdict, judged, size_of
from experiments.files import versions
from experiments.run.memory import zero3_states
from experiments.run.workload import pluralize
from upge.train.config import ModelConfig

#: The device file of NVIDIA's driver.
NVIDIA_CONTROL = Path("/dev/nvidiactl")
#: Major version of CUDA → the oldest driver that runs it.
OLDEST_DRIVER = {12: 525, 13: 580}
#: Shared memory that NCCL and vLLM need between the processes of a machine, in bytes.
SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class Facts:
    """What a rank found out.

    Attributes:
        host: name of its machine.
        local_ranks: ranks on this machine.
        gpu: name of the rank's GPU; empty without one.
        gpu_total, gpu_free: its memory in bytes.
        has_driver: whether NVIDIA's driver is loaded, and no setting hides its GPUs.
        driver: its version; empty if unknown.
        cuda: version of CUDA that torch was built for; empty if it was built without.
        versions: package → version.
        unfit: installed packages outside the range that upge needs, as "torch 2.11.0 (needs >=2.13)".
        memory_total, memory_free: of the machine, in bytes.
        shared_memory: size of /dev/shm in bytes; None if there is none.
        compiler: path of the C compiler; empty if there is none.
        has_headers: whether Python.h is installed.
        disks: what is written → (folder, bytes free).
    """

    host: str
    local_ranks: int
    gpu: str
    gpu_total: int
    gpu_free: int
    has_driver: bool
    driver: str
    cuda: str
    versions: dict[str, str]
    unfit: tuple[str, ...]
    memory_total: int
    memory_free: int
    shared_memory: int | None
    compiler: str
    has_headers: bool
    disks: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Needs:
    """Bytes that a run with the model needs; 0 where nothing is known.

    Attributes:
        gpu: on each rank's GPU, besides the engine's share.
        engine_share: of the GPU's memory that vLLM takes.
        host: of a machine's memory, for each of its ranks.
        disks: what is written → bytes.
    """

    gpu: int
    engine_share: float
    host: int
    disks: dict[str, int]


def check(context: Context) -> Iterator[Row]:
    """The rows of the machine."""
    facts = context.gather(facts_of(context))
    yield from rows(facts, needs_of(context))


def rows(facts: Sequence[Facts], needs: Needs) -> Iterator[Row]:
    """The rows that follow from the facts of all ranks."""
    yield driver(facts)
    yield gpu_memory(facts, needs)
    yield packages(facts)
    yield host_memory(facts, needs)
    for what in facts[0].disks:
        yield disk(facts, what, needs.disks.get(what, 0))
    yield shared_memory(facts)
    yield compiler(facts)


def driver(facts: Sequence[Facts]) -> Row:
    """GPU, driver and CUDA."""
    if not any(f.has_driver or f.gpu for f in facts):
        return Row("GPU, driver", Verdict.NOT_HERE, "no NVIDIA GPU; the ranks run on the CPU")
    dark = [f for f in facts if not f.gpu]
    first = (dark or facts)[0]
    oldest = OLDEST_DRIVER.get(int(first.cuda.partition(".")[0] or 0))
    old = bool(first.driver and oldest) and int(first.driver.partition(".")[0]) < (oldest or 0)
    names = ", ".join(dict.fromkeys(f.gpu or "no usable GPU" for f in facts))
    built = f"torch for CUDA {first.cuda}" if first.cuda else "torch without CUDA"
    measured = f"{names} ({pluralize(len(facts), 'rank')}); driver {first.driver or 'unknown'}, {built}"
    if not first.cuda:
        advice = "install torch's CUDA build: make env ENGINE=gpu"
    elif old or oldest and not first.driver:
        advice = f"CUDA {first.cuda} needs driver {oldest} or newer; update it, or install torch for an older CUDA"
    else:
        advice = "torch.cuda.is_available() is False: check CUDA_VISIBLE_DEVICES, and that the container was given GPUs"
    return judged("GPU, driver", not dark and not old, measured, advice, gpus=[f.gpu for f in facts])


def gpu_memory(facts: Sequence[Facts], needs: Needs) -> Row:
    """Free memory against what the training states and the engine take."""
    if not all(f.gpu for f in facts):
        return Row("GPU memory", Verdict.NOT_HERE, "no usable GPU")
    least = min(facts, key=lambda f: f.gpu_free - needs.engine_share * f.gpu_total)
    needed = needs.gpu + needs.engine_share * least.gpu_total
    measured = f"{size_of(least.gpu_free)} free of {size_of(least.gpu_total)}; model and engine take {size_of(needed)}"
    used = least.gpu_total - least.gpu_free
    advice = f"other processes hold {size_of(used)} (nvidia-smi lists them); stop them, " if used > 2**31 else ""
    advice += "take more GPUs or a smaller model, or lower rollout.memory_fraction"
    return judged("GPU memory", needed <= least.gpu_free, measured, advice, free=least.gpu_free, needed=needed)


def packages(facts: Sequence[Facts]) -> Row:
    """Versions inside the ranges of pyproject.toml, and the same on all ranks."""
    first = facts[0]
    other = next((f for f in facts if f.versions != first.versions), None)
    measured = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    if other is not None:
        differing = sorted(k for k in first.versions if first.versions[k] != other.versions.get(k))
        advice = f"{other.host} has other versions of {', '.join(differing)}; install the same set on all machines"
    else:
        advice = f"outside the tested range: {', '.join(first.unfit)}; install the pinned set with `make env`"
    return judged("packages", other is None and not first.unfit, measured, advice, **first.versions)


def host_memory(facts: Sequence[Facts], needs: Needs) -> Row:
    """The machine's memory."""
    least = min(facts, key=lambda f: f.memory_free - needs.host * f.local_ranks)
    needed = needs.host * least.local_ranks
    measured = (
        f"{size_of(least.memory_free)} free of {size_of(least.memory_total)}; the ranks take about {size_of(needed)}"
    )
    advice = f"give {least.host} more memory (for a container: its limit), or take a smaller model or fewer ranks"
    return judged("memory", needed <= least.memory_free, measured, advice, free=least.memory_free, needed=needed)


def disk(facts: Sequence[Facts], what: str, needed: int) -> Row:
    """Free disk where something is written."""
    least = min(facts, key=lambda f: f.disks[what][1])
    folder, free = least.disks[what]
    measured = f"{size_of(free)} free in {folder}; needed: {size_of(needed)}"
    fixes = {
        "output": "choose another folder with output=, or keep fewer checkpoints (checkpoint.keep)",
        "hub cache": "set HF_HOME to a folder on a larger disk",
        "temporary files": "set TMPDIR to a folder on a larger disk",
    }
    advice = f"free some space, or {fixes[what]}"
    return judged(f"disk: {what}", needed <= free, measured, advice, free=free, needed=needed)


def shared_memory(facts: Sequence[Facts]) -> Row:
    """/dev/shm, which containers limit to 64 MiB by default."""
    least = min(facts, key=lambda f: -1 if f.shared_memory is None else f.shared_memory)
    size, needed = least.shared_memory, SHARED_MEMORY if least.gpu else 0
    measured = "there is none" if size is None else size_of(size)
    advice = "NCCL and vLLM exchange data there; start the container with --shm-size=16g or --ipc=host"
    if size is None and not needed:
        return Row("/dev/shm", Verdict.NOT_HERE, measured)
    return judged("/dev/shm", (size or 0) >= needed, measured, advice, size=size)


def compiler(facts: Sequence[Facts]) -> Row:
    """The C compiler and Python's headers, with which Triton builds its launchers."""
    first = next((f for f in facts if not f.compiler or not f.has_headers), facts[0])
    headers = "Python.h" if first.has_headers else "no Python.h"
    measured = f"{first.compiler or 'no C compiler'}, {headers}"
    if first.compiler and first.has_headers:
        return Row("compiler", Verdict.OK, measured)
    if not first.gpu:
        return Row("compiler", Verdict.NOT_HERE, f"{measured}; only a GPU needs them")
    return judged("compiler", False, measured, "Triton needs both: apt-get install gcc python3-dev, or set CC")


def facts_of(context: Context) -> Facts:
    """What this rank finds out about its machine."""
    gpu, free, total = "", 0, 0
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(context.world.device)
        free, total = torch.cuda.mem_get_info(context.world.device)
    memory = psutil.virtual_memory()
    shm = Path("/dev/shm")
    return Facts(
        host=socket.gethostname(),
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        gpu=gpu,
        gpu_total=total,
        gpu_free=free,
        has_driver=NVIDIA_CONTROL.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"),
        driver=driver_version(),
        cuda=torch.version.cuda or "",
        versions=versions(),
        unfit=unfit_packages(),
        memory_total=memory.total,
        memory_free=memory.available,
        shared_memory=shutil.disk_usage(shm).total if shm.is_dir() else None,
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), ""),
        has_headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        disks={what: (str(folder), shutil.disk_usage(_existing(folder)).free) for what, folder in folders(context)},
    )


def folders(context: Context) -> Iterator[tuple[str, Path]]:
    """What a run writes, and where."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield "output", Path(context.config.output or "runs").expanduser().absolute()
    yield "hub cache", Path(HF_HUB_CACHE)
    yield "temporary files", context.scratch


def needs_of(context: Context) -> Needs:
    """What a run with the model takes: states and engine, checkpoints, the download."""
    shape, run = context.shape, context.run
    if shape is None:
        return Needs(0, 0.0, 0, {})
    # Two moments and the weights in float32. The newest checkpoint stays until a new one is complete.
    checkpoint, kept = 12 * shape.parameters, max(run.checkpoint.keep, 2)
    download = 0 if context.config.random or is_here(run.model) else shape.weights
    disks = {
        "output": kept * checkpoint + shape.weights,
        "hub cache": download,
        "temporary files": shape.weights if context.config.random else 0,
    }
    states = zero3_states(shape, context.world.size)
    on_gpu = context.world.device.type == "cuda"
    share = run.rollout.memory_fraction if run.rollout.engine != "transformers" else 0.0
    copy = shape.of_engine(run.rollout.tensor_parallel).weights
    return Needs(states, share, shape.weights if on_gpu else states + copy, disks)


def is_here(model: ModelConfig) -> bool:
    """Whether a model is a folder or in the hub's cache, so that nothing is downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE) / f"models--{model.path.replace('/', '--')}"
    return Path(model.path).is_dir() or any(cached.glob("snapshots/*/*.safetensors"))


def driver_version() -> str:
    """The version of NVIDIA's driver; empty if it is unknown."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    except OSError:
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def unfit_packages() -> tuple[str, ...]:
    """The installed packages outside the ranges that upge needs, except those for its development."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("upge") or ()]
    except importlib.metadata.PackageNotFoundError:
        return ()
    unfit = {}
    for requirement in requirements:
        if "dev" in str(requirement.marker or ""):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unfit[requirement.name] = f"{requirement.name} {version} (needs {requirement.specifier})"
    return tuple(unfit.values())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
