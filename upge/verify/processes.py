"""Starts, replaces and ends the worker processes, from the parent's side."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from upge.verify import isolation
from upge.verify.base import BUILT_IN, printable
from upge.verify.messages import LONGEST, Channel
from upge.verify.server import COMMAND, FORK, KILL, QUIT, STATUS

START_LIMIT = 300.0
"""Seconds within which a worker must report that it is ready, or that it has started an item."""
TAIL = 4000
"""The maximum number of characters of the processes' output that a message quotes."""
_CHUNK, _PIPE = 1 << 16, 1 << 20


class Task(NamedTuple):
    """One verification by a worker.

    Attributes:
        text: the response, or the answer extracted from it.
        is_extracted: whether `text` is the extracted answer.
        more: additional arguments that the verifier takes, as JSON; empty for none.
        responses: the number of responses in `more`, for a verifier that compares them; else 0.
    """

    verifier: str
    text: str
    answer: str
    prompt: str | None = None
    is_extracted: bool = False
    more: str = ""
    responses: int = 0


@dataclass(frozen=True)
class Settings:
    """The settings of a pool's processes.

    Attributes:
        names: the names of the verifiers.
        workers: number of worker processes.
        time_limit: seconds that a worker may spend on an item.
        memory_limit: memory that a worker may use beyond what it starts with [GiB]; None for no limit.
        environment: names of additional environment variables that verifiers see.
        network: whether verifiers may use the network.
        ranges: name → smallest and largest reward of the verifier.
    """

    names: tuple[str, ...]
    workers: int
    time_limit: float
    memory_limit: float | None
    environment: tuple[str, ...] = ()
    network: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Worker:
    """The parent's view of one worker.

    Attributes:
        number: identifies the worker to the server.
        channel: the connection to the worker.
        pid: the process id that the worker reports; None until it is ready.
        job: its current job; None if it has none.
        task_number: the unique number of that job's task.
        has_started: whether it has started the job.
        deadline: the latest time (`time.monotonic`) of its next message.
    """

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number, self.channel = number, Channel(connection, LONGEST, blocking=False)
        self.pid: int | None = None
        self.job: Any = None  # Any: `dispatch.Job`, whose module imports this one
        self.task_number = 0
        self.has_started = False
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def is_idle(self) -> bool:
        """Whether the worker is ready and has no job."""
        return self.pid is not None and self.job is None

    def expects(self, number: int) -> bool:
        """Whether the worker has the task with this number."""
        return self.job is not None and number == self.task_number

    def take_up(self, job: Any, task: Task, number: int) -> bool:
        """Send the task of a job to the worker. Return False if the worker has died."""
        try:
            self.channel.post([number, *task])
        except OSError:
            return False
        self.job, self.task_number, self.has_started = job, number, False
        self.deadline = time.monotonic() + START_LIMIT
        return True


class Server:
    """The process that imports the verifiers and forks workers (`upge.verify.server`).

    This is not multiprocessing's fork server, which runs the main program again in every child and whose settings apply
    to the whole process, including vLLM's use of it.

    `pass_on` passes what the processes print, to either stream, on to this process's standard error. So a verifier that
    prints does not fail when standard output is closed.
    """

    def __init__(self, settings: Settings) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_LIMIT)
        self._printed = b""
        setup = {
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            "path": [str(entry) or os.getcwd() for entry in sys.path],
            "names": list(settings.names),
            "built_in": [name for name in settings.names if name in BUILT_IN],
            "memory": settings.memory_limit,
            "seconds": settings.time_limit,
            "network": settings.network,
        }
        script = Path(__file__).with_name("start.py")
        read, write = os.pipe()
        os.set_blocking(read, False)
        self.output: int | None = read
        # -P keeps the script's folder, which has a math.py, off the import path.
        with theirs, open(write, "wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), json.dumps(setup)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env=isolation.environment(settings.environment),
            )

    def fork(self, number: int) -> socket.socket:
        """Fork a new worker and return a connection to it. The worker reports when it is ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [COMMAND.pack(FORK, number)], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def kill(self, number: int) -> int:
        """Kill a worker, if it is still alive, and all processes that it has started. Return its wait status."""
        self._control.sendall(COMMAND.pack(KILL, number))
        status = self._control.recv(STATUS.size, socket.MSG_WAITALL)
        if len(status) < STATUS.size:
            raise ConnectionError("the verification server has ended")
        return STATUS.unpack(status)[0]

    def pass_on(self) -> None:
        """Pass what the processes have printed on to standard error, at most as much as their pipe can hold."""
        for _ in range(_PIPE // _CHUNK):
            if self.output is None:
                return
            try:
                data = os.read(self.output, _CHUNK)
            except BlockingIOError:  # nothing is left
                return
            if not data:  # all processes have closed the pipe
                os.close(self.output)
                self.output = None
            self._printed = (self._printed + data)[-4 * TAIL :]
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError, ValueError):  # standard error has no reader or is closed
                    os.write(sys.__stderr__.fileno(), data)

    def last_words(self) -> str:
        """The end of what was passed on, for a message."""
        text = printable(self._printed.decode("utf-8", "replace")).strip()[-TAIL:]
        return f"; the end of their output:\n{text}" if text else "; they printed nothing"

    def stop(self, patience: float = 5.0) -> int:
        """End the server, which first ends its workers. After `patience` seconds all of them are killed.

        Returns:
            The server's exit code, or the negative number of the signal that ended it.
        """
        with contextlib.suppress(OSError):  # it has already ended
            self._control.sendall(COMMAND.pack(QUIT, 0))
        self._control.close()
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:  # still importing
            self._process.kill()
            code = self._process.wait()
        self.pass_on()
        if self.output is not None:
            os.close(self.output)
            self.output = None
        return code


class Team:
    """A server and its workers.

    Raises:
        OSError: processes cannot be started.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._forked = settings, 0
        # For the last server that has ended: the number of its last worker, how it ended, and its last output.
        self._lost, self._loss = 0, ("", "")
        self._server = Server(settings)
        self.workers = [self._new_worker() for _ in range(settings.workers)]

    @property
    def title(self) -> str:
        """The names of the verifiers, for messages."""
        return ", ".join(f"'{name}'" for name in self._settings.names)

    @property
    def output(self) -> int | None:
        """The descriptor that becomes readable when the processes have printed something; None once they cannot."""
        return self._server.output

    def pass_on(self) -> None:
        """Pass what the processes have printed on to standard error."""
        self._server.pass_on()

    def replace(self, worker: Worker) -> tuple[str, str]:
        """Kill `worker`, whatever its state, and start another in its place.

        Returns:
            How the old one ended, and the end of the processes' output, for messages.
        """
        try:
            if worker.number <= self._lost:
                ending, words = self._loss
            else:
                ending = f"the worker process {_how(os.waitstatus_to_exitcode(self._server.kill(worker.number)))}"
                self._server.pass_on()
                words = self._server.last_words()
            new = self._new_worker()
        except OSError:  # the server has ended, and its workers with it
            ending = f"the process that imports the verifiers {_how(self._server.stop())}"
            words = self._server.last_words()
            self._lost, self._loss = self._forked, (ending, words)
            self._server = Server(self._settings)
            new = self._new_worker()
        worker.channel.close()
        self.workers[self.workers.index(worker)] = new
        return ending, words

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.channel.close()
        # Until its first worker is ready, the server may still be importing and has nothing to clean up.
        self._server.stop(5.0 if any(worker.pid for worker in self.workers) else 0.1)

    def _new_worker(self) -> Worker:
        self._forked += 1
        return Worker(self._forked, self._server.fork(self._forked))


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
