"""Whole trainers, each in a child process that runs the requested steps and then waits for the next command.

This module holds both ends of the connection, which exchange lines of JSON. `ours` and `trl_grpo` are the children.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from experiments.cli import ROOT
from upge.errors import ConfigError, UserError, nearest

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


def check(trl: Iterable[str], rows: int, batch: int, key: str) -> None:
    """Check the settings of TRL: its ways to sample, the responses of a step, and the rows of its micro-batches.

    Args:
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


class Connection:
    """One end of a connection that exchanges JSON messages over two open file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "r", encoding="utf-8"), os.fdopen(write, "w", encoding="utf-8")

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raise BrokenPipeError if the other end is closed."""
        self._write.write(json.dumps(message) + "\n")
        self._write.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message of the other end; None if it has closed the connection."""
        text = self._read.readline()
        return json.loads(text) if text else None

    def close(self) -> None:
        """Close this end; the other end then receives None."""
        for end in (self._write, self._read):
            with suppress(BrokenPipeError):
                end.close()


# The bench's end.


class ChildError(RuntimeError):
    """A child reported an error, or exited without a message."""


class Child:
    """A trainer in its own process; a context manager that ends the process at its exit.

    Args:
        name: its name in messages.
        module: the program of the child, see `serve`.
        job: the settings that the program gets.
        folder: gets NAME.log with the output of the child.
        threads: OpenMP threads of the child.
    """

    def __init__(self, name: str, module: str, job: Mapping[str, Any], folder: Path, threads: int) -> None:
        self.name, self.log = name, folder / f"{name.replace(' ', '-')}.log"
        (there, to_child), (from_child, back) = os.pipe(), os.pipe()
        environment = {
            # GiB of vLLM's cache on a CPU; by default it would take memory that the other trainers need.
            **{"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
            **{"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        }
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
        """Send a command and wait for the answer; raise the errors of `answer`."""
        with suppress(BrokenPipeError):  # `answer` raises the error
            self._connection.send({"do": do, **more})
        return self.answer()

    def close(self) -> None:
        """End the process by closing the connection; kill it if it does not exit."""
        self._connection.close()
        try:
            self._process.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


#: Starts a child: name, module, job, folder, threads.
Start = Callable[[str, str, Mapping[str, Any], Path, int], Child]


# The child's end.


class Stop(BaseException):
    """The parent ends the training. It is not an Exception, so that no trainer handles it."""


class StepControl:
    """Controls a trainer by the parent's commands; the trainer calls `begin` before its first step and `stepped` after
    each step.

    Args:
        connection: the connection to the parent.
        evaluate: returns the accuracies of the current weights; its time does not count.
        compare: takes a command and returns a context manager for one step that takes the gradient without an update.
            The step puts its results into the dict that the context manager yields.
    """

    def __init__(
        self,
        connection: Connection,
        evaluate: Callable[[], Mapping[str, float]],
        compare: Callable[[Mapping[str, Any]], AbstractContextManager[dict[str, Any]]],
    ) -> None:
        self._connection, self._evaluate, self._compare = connection, evaluate, compare
        self._left, self._began = 0, 0.0
        self._sums: dict[str, float] = {}
        self._comparison, self._compared = ExitStack(), {}

    def begin(self) -> None:
        """Report that everything is loaded, and wait for the first command."""
        self._connection.send({"ready": True})
        self._wait()

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a finished step to the running sums, and wait after the last requested step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._left -= 1
        if self._left > 0:
            return
        seconds = time.perf_counter() - self._began
        self._comparison.close()
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._connection.send({"seconds": seconds, "rss": peak_gib, **self._sums, **self._compared})
        self._wait()

    def _wait(self) -> None:
        """Carry out commands until one starts a step."""
        while (command := self._connection.receive() or {"do": "stop"})["do"] == "evaluate":
            self._connection.send(self._evaluate())
        if command["do"] == "stop":
            raise Stop
        self._compared = self._comparison.enter_context(self._compare(command)) if command["do"] == "compare" else {}
        self._left, self._sums = int(command.get("count", 1)), {}
        self._began = time.perf_counter()


def serve(train: Callable[[dict[str, Any], Connection], None]) -> None:
    """The program of a child: trains the job in its arguments until it is stopped, then exits at once.

    It skips the libraries' own clean-up, which sometimes aborts a process that has finished.
    """
    connection, job, code = Connection(int(sys.argv[1]), int(sys.argv[2])), json.loads(sys.argv[3]), 0
    try:
        train(job, connection)
    except Stop:
        pass
    except BaseException as error:
        traceback.print_exc()
        message, is_users = (str(error).strip().splitlines() or [""])[0], isinstance(error, UserError)
        with suppress(BrokenPipeError):  # the parent has exited
            text = message if is_users else f"{type(error).__name__}: {message}"
            connection.send({"error": text, "users": is_users})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
