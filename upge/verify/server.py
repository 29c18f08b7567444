"""The process behind a `VerifierPool` that imports the verifiers and forks workers. It never runs a verifier itself.

It stays single-threaded, so that it can fork safely. A worker, also one that replaces a killed worker, starts in
milliseconds with everything imported.

Protocol: the parent sends a `COMMAND`, which holds a letter and the worker's number: FORK with a socket (fork a worker
that uses the socket), KILL (the server replies with the worker's wait status), or QUIT.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import traceback
from typing import Any, NoReturn

from upge.verify import base, isolation, worker

Setup = dict[str, Any]  # Any: JSON values

FORK, KILL, QUIT = b"F", b"K", b"Q"
COMMAND, STATUS = struct.Struct("=cI"), struct.Struct("=i")


def serve(setup: Setup) -> NoReturn:
    """Serve one pool until the pool's process ends or closes the connection.

    Args:
        setup: the JSON that `processes.Server` writes: descriptor of the connection, id of the parent, import path,
            names of the verifiers and of the built-in ones, memory limit [GiB], time limit [s], and whether verifiers
            may use the network.
    """
    control = socket.socket(fileno=setup["fd"])
    control.set_inheritable(False)
    if not setup["network"]:
        isolation.leave_network()  # before an import can start a thread
    isolation.adopt_orphans()
    for name in setup["names"]:
        with contextlib.suppress(BaseException):  # every worker raises the same error and reports it
            # Only import it: each worker makes its own instance, because an instance may open files or sockets.
            base.find(name)
    for name in setup["built_in"]:
        with contextlib.suppress(BaseException):
            verifier: Any = base.load(name)  # an AnswerVerifier, possibly from another import of its module
            verifier.warm_up()
    gc.freeze()
    workers: dict[int, int] = {}  # number → process id
    helpers = isolation.children()  # processes that an import has started
    try:
        while _serve_one(control, setup, workers, helpers):
            pass
    except BaseException:
        traceback.print_exc()
    finally:
        for pid in workers.values():
            isolation.kill(pid)
        _end_orphans(set())
        os._exit(0)


def _serve_one(control: socket.socket, setup: Setup, workers: dict[int, int], helpers: set[int]) -> bool:
    """Wait for one request and handle it. Return False if the parent has ended or sent QUIT."""
    while not select.select([control], [], [], 1.0)[0]:
        # A process that the parent forked may hold the other end open after the parent itself has ended.
        if os.getppid() != setup["parent"]:
            return False
    data, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if len(data) < COMMAND.size:
        return False
    command, number = COMMAND.unpack(data)
    if command == FORK:
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            control.close()
            worker.work(socket.socket(fileno=descriptors[0]), server, setup)
        os.close(descriptors[0])
        workers[number] = pid
        return True
    if command == KILL:
        status = isolation.kill(workers.pop(number))
        _end_orphans(helpers | set(workers.values()))
        control.sendall(STATUS.pack(int(signal.SIGKILL) if status is None else status))
        return True
    return False


def _end_orphans(others: set[int]) -> None:
    """Kill this process's children except `others`. These are what ended workers have left behind, in any session.

    A living worker itself adopts the orphans among its descendants.
    """
    others = set(others)
    while orphans := isolation.children() - others:
        others |= {pid for pid in orphans if isolation.kill(pid) is None}
