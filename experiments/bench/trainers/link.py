"""The bench's side of the trainers: the connection by lines of JSON, the child processes, and the known trainers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from upge.errors import ConfigError, nearest

ROOT = Path(__file__).parents[3]
#: Seconds in which a child must exit before it is killed.
EXIT_TIMEOUT = 20.0
#: GiB of vLLM's cache on a CPU; by default it would take memory that the other trainers need.
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}


class ChildError(RuntimeError):
    """A child reported an error, or exited without a message."""


class Connection:
    """One end of a connection that exchanges JSON messages over two open file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "r", encoding="utf-8"), os.fdopen(write, "w", encoding="utf-8")

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; raises BrokenPipeError if the other end is closed."""
        self._write.write(json.dumps(message) + "\n")
        self._write.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message of the other end; None if it has closed the connection."""
        text = self._read.readline()
        return json.loads(text) if text else None

    def close(self) -> None:
        """Closes this end; the other end then receives None."""
        for end in (self._write, self._read):
            try:
                end.close()
            except BrokenPipeError:
                pass


class Child:
    """A trainer in its own process; a context manager that ends the process at its exit.

    Args:
        name: its name in messages.
        module: the program of the child, see `experiments.bench.trainers.control.serve`.
        job: the settings that the program gets.
        folder: gets NAME.log with the output of the child.
        threads: OpenMP threads of the child.
    """

    def __init__(self, name: str, module: str, job: Mapping[str, Any], folder: Path, threads: int) -> None:
        self.name, self.log = name, folder / f"{name.replace(' ', '-')}.log"
        (there, to_child), (from_child, back) = os.pipe(), os.pipe()
        environment = {**CACHE, **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", module, str(there), str(back), json.dumps(job)]
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                pass_fds=(there, back),
            )  # fmt: skip
        os.close(there)
        os.close(back)
        self._connection = Connection(from_child, to_child)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def answer(self) -> dict[str, Any]:
        """The next message of the child; its first one says that it is ready.

        Raises:
            ConfigError: the child reports a user error.
            ChildError: the child reports another error, or has exited.
        """
        message = self._connection.receive()
        if message is None:
            tail = self.log.read_text("utf-8", errors="replace")[-2000:]
            raise ChildError(f"{self.name} exited without a message; the end of its output:\n{tail}")
        if "error" in message:
            raise ConfigError(message["error"]) if message.get("users") else ChildError(message["error"])
        return message

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer; raises the errors of `answer`."""
        try:
            self._connection.send({"do": do, **more})
        except BrokenPipeError:
            pass  # `answer` raises the error
        return self.answer()

    def close(self) -> None:
        """Ends the process by closing the connection."""
        self._connection.close()
        try:
            self._process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


OURS, TRL = "experiments.bench.trainers.ours", "experiments.bench.trainers.trl_grpo"
#: TRL's ways to sample, and their names in the tables.
ENGINES = {
    "generate": "TRL, `generate`",
    "continuous": "TRL, continuous batching",
    "vllm": "TRL, vLLM",
    "vllm-patched": "TRL, vLLM patched",
}
#: TRL uses 1e-4; our default is 1e-6. With rewards of 0 and 1 the difference is only in the last digits.
EPSILON = "algo.terms.rl.estimator.advantage.epsilon=1e-4"
#: Neither trainer logs rollouts or writes checkpoints.
PLAIN = ("resume=never", "log_rollouts=0", "checkpoint.every=0")

#: Starts a child: name, module, job, folder, threads.
Start = Callable[[str, str, Mapping[str, Any], Path, int], Child]


def check(trl: Iterable[str], rows: int, batch: int, key: str) -> None:
    """Checks the settings of TRL.

    Args:
        trl: ways of TRL to sample.
        rows: responses of a step.
        batch: rows of TRL's micro-batches.
        key: the key of `batch`, for messages.

    Raises:
        ConfigError: TRL is not installed, has no such way to sample, or `batch` does not divide `rows`.
    """
    if not has_trl():
        raise ConfigError("TRL is not installed in this environment; run `make peers` and start the bench again")
    for engine in trl:
        if engine not in ENGINES:
            raise ConfigError(f"trl: found '{engine}'; {nearest(engine, ENGINES)}")
    if batch < 1 or rows % batch:
        raise ConfigError(f"{key}: {batch} does not divide the {rows} responses of a step; choose a divisor")


def has_trl() -> bool:
    """Whether TRL can be imported here."""
    return importlib.util.find_spec("trl") is not None


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
