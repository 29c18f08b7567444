"""Verifiers that break, or that do to a pool what code in a response could do."""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import resource
import socket
import struct
import subprocess
import time
from pathlib import Path


def crashes(response, answer, prompt=None):
    return 1 / 0


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no text")


class Unreadable:
    def __float__(self):
        raise RuntimeError("no number")


async def later():
    return 1.0


RETURNED = {
    "none": None,
    "nan": math.nan,
    "infinite": math.inf,
    "text": "1",
    "bytes": b"1",
    "buffer": bytearray(b"1"),
    "above": 1.5,
    "below": -0.1,
    "complex": 1j,
    "list": [1.0],
    "huge": 10**400,
    "unshowable": Unshowable(),
    "unreadable": Unreadable(),
}


def returns(response, answer, prompt=None):
    return later() if response == "coroutine" else RETURNED[response]


def forks(response, answer, prompt=None):
    """A fork whose child returns from the verifier as well, with the wrong reward, before the parent does."""
    if response in ("fork", "raw fork"):
        pid = os.fork() if response == "fork" else ctypes.CDLL(None).fork()
        if pid == 0:
            return 0.0
        os.waitpid(pid, 0)
        return 1.0
    return float(response == answer)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def connection() -> int:
    """The descriptor of the worker's connection to the pool."""
    names = [int(name) for name in os.listdir("/proc/self/fd")]
    return next(fd for fd in names if os.path.exists(f"/proc/self/fd/{fd}") and is_socket(fd))


def is_socket(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")


def framed(message) -> bytes:
    text = json.dumps(message).encode()
    return struct.pack(">Q", len(text)) + text


def speaks(response, answer, prompt=None):
    """Writes to the worker's connection, as code in a response could; it is the pool's second task."""
    verdict = [[1.0], "ok", "", None, "", 0.1]
    written = {
        # The length of 4096 bytes as multiprocessing writes it, and the beginning of a message.
        "part": struct.pack("!i", 4096) + b"abc",
        "pickle": struct.pack("!i", len(pickle.dumps(Planted(answer)))) + pickle.dumps(Planted(answer)),
        "long": struct.pack(">Q", 1 << 40),
        "no json": struct.pack(">Q", 3) + b"abc",
        "deep": struct.pack(">Q", 100_000) + b"[" * 100_000,
        "no array": framed({"reward": 1.0}),
        "another task": framed(["done", 3, *verdict]),
        "forged": framed(["done", 2, *verdict]),
        "ready again": framed(["ready", 1]),
        "cannot load": framed(["failed", "x", "y"]),
        "started again": framed(["started", 2]),
        "no verdict": framed(["done", 2, 7, "fine", [], {}, 0, 0]),
    }
    if response in written:
        os.write(connection(), written[response])
    return float(response == answer)


def leaves(response, answer, prompt=None):
    """Starts processes in several ways, writes their ids to the file `answer`, and then does what `response` says."""
    sleep = ["sleep", "600"]
    pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
    shown = subprocess.run(
        ["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!; sleep 600 >/dev/null 2>&1 & echo $!"],
        capture_output=True,
        text=True,
    )
    pids += [int(pid) for pid in shown.stdout.split()]
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            Path(f"{answer}.daemon").write_text(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)
    while not (Path(f"{answer}.daemon").exists() and Path(f"{answer}.daemon").read_text()):
        time.sleep(0.01)
    Path(answer).write_text(" ".join(map(str, [*pids, Path(f"{answer}.daemon").read_text()])))
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(3)
    return 1.0


def sees(response, answer, prompt=None):
    """Whether the environment variable is set."""
    return float(response in os.environ)


def connects(response, answer, prompt=None):
    """Whether a TCP connection to the local port `response` is possible."""
    try:
        socket.create_connection(("127.0.0.1", int(response)), timeout=10).close()
    except OSError:
        return 0.0
    return 1.0


def limited(response, answer, prompt=None):
    """Tries what a limit forbids."""
    if response == "file":
        with open(answer, "wb") as file:
            file.truncate(2**33)
    if response == "files":
        kept = [open("/dev/null") for _ in range(5000)]
        return float(len(kept) > 0)
    if response == "core":
        return float(resource.getrlimit(resource.RLIMIT_CORE)[0] == 0)
    if response == "cpu":
        return float(0 < resource.getrlimit(resource.RLIMIT_CPU)[0] < 10**5)
    return 1.0


def prints(response, answer, prompt=None):
    print(f"printed {response}")
    return 1.0
