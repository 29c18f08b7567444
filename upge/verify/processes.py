"""Starts, replaces and ends the worker processes, from the parent's side."""

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

from upge.verify.base import BUILT_IN
from upge.verify.worker import FORK, KILL, PID, QUIT

START_LIMIT = 300.0
"""Seconds within which a worker must report that it is ready, or that it has started an item."""


class Task(NamedTuple):
    """One verification by a worker.

    Attributes:
        text: the response, or the answer extracted from it.
        is_extracted: whether `text` is the extracted answer.
    """

    verifier: str
    text: str
    answer: str
    prompt: str | None = None
    is_extracted: bool = False


class Worker:
    """The parent's view of one worker.

    Attributes:
        pid: its process id; None until it is ready.
        job: the job that it was given; None if it has none.
        has_started: whether it has started on the job.
        deadline: the time (`time.monotonic`) of its next message at the latest.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.pid: int | None = None
        self.job: Any = None  # Any: `dispatch.Job`, whose module imports this one
        self.has_started = False
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and has no job."""
        return self.pid is not None and self.job is None

    def take_up(self, job: Any, task: Task) -> bool:
        """Sends the task of a job to the worker. Returns False if the worker has died."""
        try:
            self.connection.send(tuple(task))
        except OSError:
            return False
        self.job, self.has_started, self.deadline = job, False, time.monotonic() + START_LIMIT
        return True


class Server:
    """The process that imports the verifiers and forks workers (`upge.verify.worker`).

    This is not multiprocessing's fork server, which runs the main program again in every child and whose settings apply
    to the whole process, including vLLM's use of it.
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
        # -P keeps the script's folder, which has a math.py, off the import path. The fixed hash seed keeps the order in
        # which sympy tries methods, and so the result of borderline cases, independent of the process.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), json.dumps(setup)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            )

    def fork(self) -> Connection:
        """Forks a new worker and returns a connection to it. The worker reports when it is ready."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._control, [FORK], [theirs.fileno()])
            return Connection(ours.detach())

    def kill(self, pid: int) -> int:
        """Kills a worker if it is still alive. Returns its wait status."""
        self._control.sendall(KILL + PID.pack(pid))
        status = self._control.recv(PID.size, socket.MSG_WAITALL)
        if len(status) < PID.size:
            raise ConnectionError("the verification server has gone")
        return PID.unpack(status)[0]

    def stop(self, patience: float = 5.0) -> None:
        """Ends the server, which ends its workers first. After `patience` seconds all of them are killed."""
        try:
            self._control.sendall(QUIT)
        except OSError:  # it has already ended
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
        """The names of the verifiers, for messages."""
        return ", ".join(f"'{name}'" for name in self._names)

    def replace(self, worker: Worker) -> str:
        """Kills `worker` in any state and starts another in its place. Returns how the old one ended, for messages."""
        ending = "ended"
        try:
            if worker.pid is not None:
                ending = _how(self._server.kill(worker.pid))
            connection = self._server.fork()
        except OSError:  # the server was killed, and its workers with it
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
        # Until it has forked its first worker, the server is importing and has nothing to clean up.
        self._server.stop(5.0 if any(worker.pid for worker in self.workers) else 0.1)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
