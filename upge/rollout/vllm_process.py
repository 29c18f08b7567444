"""What vLLM does to the process it lives in: its environment variables, its output, its process groups."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import psutil
import torch


def prepare_environment() -> None:
    """Set the variables that vLLM reads when it is imported or started; only those that the user left open.

    It must run in the trainer's process, next to the trainer's tensors, hence no worker process of its own; that one is
    not left open.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_binding())


def cpu_binding() -> str:
    """The cores of each local rank as vLLM writes them ("0,1|2,3"), from the cores this process may use.

    Where a launcher has already given each rank cores of its own, those stand for every rank, since each only reads its
    own part. vllm-cpu 0.32 ignores the setting in process, where torch's thread count (OMP_NUM_THREADS) rules.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cores) < (os.cpu_count() or 1) or len(cores) < ranks:
        parts = [cores] * ranks
    else:
        share = len(cores) // ranks
        parts = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def import_vllm() -> ModuleType:
    """vLLM, imported quietly. Raises whatever its import raises."""
    prepare_environment()
    with quiet():
        return importlib.import_module("vllm")


def why_not_vllm(device: str) -> str | None:
    """None if vLLM is installed and serves `device` ("cpu" or "cuda"), else the reason as half a sentence."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        import_vllm()
        platform = importlib.import_module("vllm.platforms").current_platform
    except Exception as error:  # a build that does not fit torch fails in many ways, each a reason not to use it
        return f"vLLM is installed but cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    if device == "cpu" and not platform.is_cpu():
        return "the installed vLLM is not a CPU build"
    if device == "cuda" and not platform.is_cuda():
        return "the installed vLLM is not a CUDA build"
    return None


def cache_bytes(sequences: int, max_length: int, bytes_per_token: int, memory_fraction: float, block: int) -> int:
    """Memory for `sequences` full sequences in blocks of `block` tokens, at most `memory_fraction` of this rank's share
    of what is free now."""
    blocks = sequences * (-(-max_length // block) + 1)
    share = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(blocks * block * bytes_per_token, memory_fraction * share))


def free_memory() -> int:
    """Bytes that are free: the machine's, or less where vLLM, which keeps to one NUMA node and its container, sees
    less; it refuses to start with a cache beyond that."""
    free = psutil.virtual_memory().available
    try:
        resources = importlib.import_module("vllm.utils.cpu_resource_utils")
        node = resources.get_allowed_cpu_list()[0].numa_node
        return min(free, resources.get_memory_node_info(node).available_memory)
    except (ImportError, AttributeError, LookupError, OSError):  # another version; it will say what it finds too large
        return free


def ranks_uncompiled() -> None:
    """Have vLLM count the ranks of sampled tokens, which nothing here asks for, without compiling a kernel for it.

    Eager mode does not reach this function: it alone would start the C++ compiler in the first call of every process.
    """
    sampler = importlib.import_module("vllm.v1.sample.sampler")
    compiled = getattr(sampler, "batched_count_greater_than", None)
    plain = getattr(compiled, "_torchdynamo_orig_callable", None)
    if plain is not None:
        sampler.batched_count_greater_than = plain


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back everything written to stdout and stderr, by libraries in C++ too; on an error show it after all.

    Does nothing where the user asked vLLM for more than errors (VLLM_LOGGING_LEVEL).
    """
    if os.environ.get("VLLM_LOGGING_LEVEL", "ERROR").upper() not in ("ERROR", "CRITICAL"):
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)
            if failed:
                sink.seek(0)
                os.write(2, sink.read()[-8000:])


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: an engine stopped in the middle of a step cannot be used again."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(held[0], None)


@contextmanager
def thread_setter_kept() -> Iterator[None]:
    """vLLM's CPU worker replaces torch.set_num_threads by a function that only warns; put the real one back."""
    setter = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = setter


def several_ranks() -> bool:
    """Whether this process is one of several in torch's default process group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
