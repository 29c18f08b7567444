"""The parent's side of the worker processes: how they are started, replaced and ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from upge.verify.loading import BUILT_IN
from upge.verify.worker import FORK, KILL, PID, QUIT

START_LIMIT = 300.0
"""Seconds for a worker to say that it is ready, or that it has taken up an item."""


class Task(NamedTuple):
    """What a worker does: have the verifier of that name look at a response, or at the answer extracted from it."""

    verifier: str
    text: str
    answer: str
    prompt: str | None = None
    is_extracted: bool = False


class Worker:
    """One worker as the parent sees it: no pid until it is ready; a job, and whether it has started on it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.pid: int | None = None
        self.job: Any = None
        self.has_started = False
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def is_idle(self) -> bool:
        """Is it ready, and without a job?"""
        return self.pid is not None and self.job is None

    def take_up(self, job: Any, task: Task) -> bool:
        """Hands over the task of a job; False if the worker has died since its last one."""
        try:
            self.connection.send(tuple(task))
        except OSError:
            return False
        self.job, self.has_started, self.deadline = job, False, time.monotonic() + START_LIMIT
        return True


class Server:
    """The process that imports the verifiers and forks workers (`upge.verify.worker`).

    Not multiprocessing's fork server: that one runs the main program again in every child, and its settings belong to
    the whole process, vLLM's use of it included.
    """

    def __init__(self, names: Sequence[str], memory_limit: float | None) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_LIMIT)
        setup = {
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            "path": [str(entry) or os.getcwd() for entry in sys.path],
            "names": list(names),
            "built_in": [name for name in names if name in BUILT_IN],
            "memory": memory_limit,
        }
        script = Path(__file__).with_name("worker.py")
        # -P: the script's folder, with its math.py, must not come onto the import path. One hash seed: the order in
        # which sympy tries things, and so a border case, must not depend on the process.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), json.dumps(setup)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            )

    def fork(self) -> Connection:
        """A connection to a new worker, which reports when it is ready."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._control, [FORK], [theirs.fileno()])
            return Connection(ours.detach())

    def kill(self, pid: int) -> int:
        """Kills a worker if it still lives; its wait status."""
        self._control.sendall(KILL + PID.pack(pid))
        status = self._control.recv(PID.size, socket.MSG_WAITALL)
        if len(status) < PID.size:
            raise ConnectionError("the verification server has gone")
        return PID.unpack(status)[0]

    def stop(self, patience: float = 5.0) -> None:
        """Ends the server, which ends its workers first; after `patience` seconds the kernel ends all of them."""
        try:
            self._control.sendall(QUIT)
        except OSError:  # it has gone already
            pass
        self._control.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:  # still importing
            self._process.kill()
            self._process.wait()


class Team:
    """A server and its workers."""

    def __init__(self, names: Sequence[str], size: int, memory_limit: float | None) -> None:
        self._names, self._memory_limit = names, memory_limit
        self._server = Server(names, memory_limit)
        self.workers = [Worker(self._server.fork()) for _ in range(size)]

    @property
    def title(self) -> str:
        """The verifiers' names, for messages."""
        return ", ".join(f"'{name}'" for name in self._names)

    def replace(self, worker: Worker) -> str:
        """Kills `worker`, whatever its state, and puts a new one in its place; says how the old one ended."""
        ending = "ended"
        try:
            if worker.pid is not None:
                ending = _how(self._server.kill(worker.pid))
            connection = self._server.fork()
        except OSError:  # the server itself was killed, and its workers with it
            self._server.stop()
            self._server = Server(self._names, self._memory_limit)
            connection = self._server.fork()
        worker.connection.close()
        self.workers[self.workers.index(worker)] = Worker(connection)
        return ending

    def stop(self) -> None:
        """Ends all processes."""
        for worker in self.workers:
            worker.connection.close()
        # Before it has made its first worker, it is importing, and has nothing to clean up.
        self._server.stop(5.0 if any(worker.pid for worker in self.workers) else 0.1)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
