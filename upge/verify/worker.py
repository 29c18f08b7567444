"""The processes behind a `VerifierPool`: one server that imports the verifiers, and the workers forked from it.

This file runs as a script. Until the verifiers are loaded, it uses only the standard library. The server stays
single-threaded and never runs a verifier itself. So a worker starts in milliseconds with everything imported, also one
that replaces a killed worker. Server and workers import neither the main program of the parent nor torch, and, if all
verifiers are built in, not `upge`.

Protocol: the parent sends the server FORK with a socket (fork a worker that uses it), KILL with a process id (the
server replies with the wait status), or QUIT. A worker sends ("ready", pid) or ("failed", verifier, reason), then for
each task ("started",) and ("done", reward, status, detail, extracted, seconds).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

Setup = dict[str, Any]  # Any: JSON values
Verifier = Any  # a verifier of the user, of which nothing is known
Load = Callable[[str], Verifier]

FORK, KILL, QUIT = b"F", b"K", b"Q"
PID = struct.Struct("i")


def main(setup: Setup) -> NoReturn:
    """Serves one pool until the pool's process ends or closes the connection.

    Args:
        setup: JSON with the keys fd, parent, path, names, built_in and memory, as `processes.Server` writes it.
    """
    # Launchers send these to the whole process group. The parent handles them, after it has finished its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.path[:] = setup["path"]
    control = socket.socket(fileno=setup["fd"])
    base = _import_base(light=setup["names"] == setup["built_in"])
    for name in setup["names"]:
        try:
            # Only import it: each worker makes an instance of its own, because an instance may open files or sockets.
            base.find(name)
        except BaseException:  # every worker raises the same error and reports it
            pass
    for name in setup["built_in"]:
        with contextlib.suppress(BaseException):
            base.load(name).warm_up()
    gc.freeze()
    children: set[int] = set()
    try:
        while _serve_one(control, setup, base.load, children):
            pass
    except BaseException:
        traceback.print_exc()
    finally:
        for pid in children:
            _kill(pid)
        os._exit(0)


def _serve_one(control: socket.socket, setup: Setup, load: Load, children: set[int]) -> bool:
    """Waits for one request and handles it. Returns False if the parent has ended or sent QUIT."""
    while not select.select([control], [], [], 1.0)[0]:
        # A process that the parent forked may hold the other end open after the parent itself has ended.
        if os.getppid() != setup["parent"]:
            return False
    command, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if command == FORK:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            _work(Connection(descriptors[0]), server, setup, load)
        os.close(descriptors[0])
        children.add(pid)
        return True
    if command == KILL:
        pid = PID.unpack(control.recv(PID.size, socket.MSG_WAITALL))[0]
        # An unknown pid belonged to a worker of an earlier server, which is dead. The id may have been reused.
        status = _kill(pid) if pid in children else int(signal.SIGKILL)
        children.discard(pid)
        control.sendall(PID.pack(status))
        return True
    return False


def _kill(pid: int) -> int:
    """Kills a worker and what it started. Returns its wait status.

    The id cannot have been reused, because only this function reaps.
    """
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except OSError:  # its group does not exist yet, or all of it has ended
            pass
    return os.waitpid(pid, 0)[1]


def _work(connection: Connection, server: int, setup: Setup, load: Load) -> NoReturn:
    """Runs a worker: scores items until the parent closes the connection, then exits without the server's clean-up."""
    try:
        os.setpgid(0, 0)
        _die_with_parent(server)
        _limit_memory(setup["memory"])
        verifiers = {}
        for name in setup["names"]:
            try:
                verifiers[name] = load(name)
            except BaseException as error:
                connection.send(("failed", name, str(error) or repr(error)))
                os._exit(1)
        connection.send(("ready", os.getpid()))
        while True:
            name, *task = connection.recv()
            connection.send(("started",))
            begin = time.monotonic()
            outcome = _score(verifiers[name], *task)
            connection.send(("done", *outcome, time.monotonic() - begin))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(1)


def _score(
    verifier: Verifier, text: str, answer: str, prompt: str | None, is_extracted: bool
) -> tuple[float, str, str, str | None]:
    """(reward, status, detail, extracted) of one response, or of an answer that was already extracted from it."""
    extracted = None
    try:
        if is_extracted:
            result = verifier.judge(text, answer, prompt)
        else:
            extracted = _extracted(verifier, text)
            result = verifier(text, answer, prompt)
    except Exception as error:
        # If a built-in verifier fails, the answer is malformed and so wrong. A user's verifier may have a defect.
        blameless = is_extracted and not isinstance(error, (ImportError, MemoryError))
        return (0.0, "ok", "", None) if blameless else (0.0, "error", _told(error), extracted)
    try:
        reward = math.nan if isinstance(result, (str, bytes)) else float(result)
    except Exception:
        reward = math.nan
    if not 0.0 <= reward <= 1.0:
        shown = repr(result)[:200]
        return 0.0, "error", f"the verifier returned {shown}; it must return a finite number in [0, 1]", extracted
    return reward, "ok", "", extracted


def _extracted(verifier: Verifier, response: str) -> str | None:
    """The answer that a verifier extracts, if it has a method `extract`."""
    extract = getattr(verifier, "extract", None)
    extracted = extract(response) if callable(extract) else None
    return None if extracted is None else str(extracted)[:10_000]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _die_with_parent(server: int) -> None:
    """Makes the kernel kill this worker when the server ends, even if the worker is busy (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)


def _limit_memory(gibibytes: float | None) -> None:
    """Limits the address space to its present size plus `gibibytes`, so that a memory bomb fails in this process."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    if gibibytes is not None:
        limit = used + int(gibibytes * 2**30)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _import_base(light: bool) -> types.ModuleType:
    """Imports `upge.verify.base` without upge's own __init__, which loads torch.

    Args:
        light: whether to keep the bare package, which is all that built-in verifiers need. Otherwise it is removed
            again, so that a user's module that imports `upge` gets the real one.
    """
    package = types.ModuleType("upge")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["upge"] = package
    base = importlib.import_module("upge.verify.base")
    if not light:
        for name in [name for name in sys.modules if name.partition(".")[0] == "upge"]:
            del sys.modules[name]
    return base


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
