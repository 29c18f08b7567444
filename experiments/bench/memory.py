"""How much memory something takes at most.

On a CPU torch counts nothing, and what its matrix products take for themselves no hook of torch's would see. So the
kernel is asked: the process's resident memory at its highest (VmHWM, which can be set back) less that before. On CUDA
torch's own counter is used. One thing is measured in one fresh process, where nothing of another's is left over.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

_SELF = Path("/proc/self")


def peak(call: Callable[[], object]) -> int:
    """Bytes of memory by which this process exceeded, at most, what it had before `call`; Linux only.

    Memory that was freed before and not given back to the kernel would hide as much: call this early in a process.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of a module in a process that is started for it; None if that was killed, as the kernel
    does when memory runs out."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def _kilobytes(name: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
