"""Processes of tests, forked from one that has imported the libraries.

Importing torch, transformers, DeepSpeed and vLLM takes longer than what most tests do with them. Two of Python's fork
servers, one of them with vLLM, import them once for each process of pytest. With a CUDA device every process starts
anew: CUDA does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from upge.rollout.vllm_process import prepare_environment

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
#: Libraries alone, so that no process begins with an old state of the package. What is not installed is left out.
PRELOADED = [
    *("torch", "transformers", "transformers.models.qwen2.modeling_qwen2", "safetensors.torch", "deepspeed"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "rich.table", "tqdm", "scipy.stats", "jinja2", "psutil"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
]
#: What an engine of vLLM imports on a CPU. The rest follows from these.
VLLM = [
    *("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.qwen2", "vllm.model_executor.warmup.kernel_warmup"),
    "vllm.v1.attention.backends.cpu_attn",
]


class Forked:
    """A forked process, with the part of the interface of `subprocess.Popen` that the tests need.

    Attributes:
        pid: its id, and that of its process group.
    """

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid
        self._process, self.pid = process, process.pid

    @property
    def sentinel(self) -> int:
        """A file descriptor that is ready to be read once the process has ended."""
        return self._process.sentinel

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    out: Path | str,
    err: Path | str | None = None,
    vllm: bool = False,
) -> Forked | subprocess.Popen[bytes]:
    """Starts `python -m module arguments` in a process group of its own.

    Args:
        environment: all variables but OMP_NUM_THREADS, which is 1.
        out, err: files to which its output is appended. Without `err` both streams go to `out`.
        vllm: whether it starts with vLLM imported.
    """
    files = (str(out), str(err or out))
    if torch.cuda.is_available():
        command = [sys.executable, "-m", module, *arguments]
        with open(files[0], "ab") as one, open(files[1], "ab") as other:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=one, stderr=other, start_new_session=True
            )
    return _fork(module, arguments, environment, files, vllm)


def _fork(
    module: str, arguments: tuple[str, ...], environment: Mapping[str, str], files: tuple[str, str], vllm: bool
) -> Forked:
    target = (module, arguments, {**environment, "OMP_NUM_THREADS": "1"}, *files)
    process = multiprocessing.get_context("forkserver").Process(target=_child, args=target)
    with _starting, mock.patch.multiple(multiprocessing.forkserver, connect_to_new_process=_fork_server(vllm)):
        process.start()
    return Forked(process)


#: Held while a process is started, which replaces a function of the library.
_starting = threading.Lock()


def run(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    ranks: int = 1,
    torchrun: bool = False,
    vllm: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` in one process or on several ranks.

    Args:
        module: its name.
        environment: all variables but OMP_NUM_THREADS, which is 1, and those of torchrun.
        ranks: the number of processes. Several run under torchrun.
        torchrun: whether one process runs under torchrun as well.
        vllm: whether the processes start with vLLM imported.
        timeout: seconds, after which all ranks are killed.

    Returns:
        The output of all ranks, and the exit code of the first that failed, or 0. The other ranks are killed then.

    Raises:
        subprocess.TimeoutExpired: a rank did not end in time.
    """
    is_launched = torchrun or ranks > 1
    if torch.cuda.is_available():
        command = [sys.executable, *([*TORCHRUN, str(ranks)] if is_launched else [])]
        return subprocess.run(
            [*command, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    port = _free_port()
    with TemporaryDirectory() as folder:
        files = [(f"{folder}/{rank}.out", f"{folder}/{rank}.err") for rank in range(ranks)]
        started = []
        for rank in range(ranks):
            variables = {**environment, **(_torchrun_variables(rank, ranks, port) if is_launched else {})}
            started.append(_fork(module, arguments, variables, files[rank], vllm))
        code = _wait(started, timeout)
        out, err = ("".join(Path(f).read_text(errors="replace") for f in kind) for kind in zip(*files, strict=True))
    if code is None:
        raise subprocess.TimeoutExpired([module, *arguments], timeout, out, err)
    return subprocess.CompletedProcess([module, *arguments], code, out, err)


@cache
def _fork_server(vllm: bool) -> Callable[[Sequence[int]], tuple[int, int]]:
    """Starts a process of the fork server. Its libraries are imported with one thread and for the CPU."""
    server = multiprocessing.forkserver.ForkServer()
    # Collections in a child would write to, and so copy, the memory of all that is imported.
    server.set_forkserver_preload([*PRELOADED, *(VLLM if vllm else ()), "tests.freeze"])
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "60"}
    with mock.patch.dict(os.environ, settings):
        if vllm:
            prepare_environment()
        server.ensure_running()
    return server.connect_to_new_process


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}


def _child(module: str, arguments: tuple[str, ...], variables: dict[str, str], out: str, err: str) -> None:
    """What a forked process does: become `python -m module arguments`."""
    os.setsid()
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.path[:0] = [folder for folder in variables.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _wait(started: Sequence[Forked], timeout: float) -> int | None:
    """The exit code of the first process that fails, 0 if none does, None after `timeout`; all have ended then."""
    end, codes = time.monotonic() + timeout, [process.poll() for process in started]
    try:
        while None in codes and not any(codes) and time.monotonic() < end:
            running = [process.sentinel for process, code in zip(started, codes, strict=True) if code is None]
            multiprocessing.connection.wait(running, timeout=1)
            codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return next((code for code in codes if code), None if None in codes else 0)
