"""A bench and its trainers: the pipe between them, lines of JSON, and which trainers there are."""

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
#: Seconds that a child has for its own ending before it is killed.
PATIENCE = 20.0
#: GiB of vLLM's cache on a CPU: whoever uses it would take a share of the memory that others here need, too.
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}


class ChildError(RuntimeError):
    """A child told of an error, or ended without a word."""


class Line:
    """One end of the conversation, over two open file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "r", encoding="utf-8"), os.fdopen(write, "w", encoding="utf-8")

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends it; the other end may be gone."""
        self._write.write(json.dumps(message) + "\n")
        self._write.flush()

    def hear(self) -> dict[str, Any] | None:
        """What the other end says next; None where it has closed the line."""
        text = self._read.readline()
        return json.loads(text) if text else None

    def close(self) -> None:
        """Closes this end, so that the other one hears it."""
        for end in (self._write, self._read):
            try:
                end.close()
            except BrokenPipeError:
                pass


class Child:
    """A trainer in a process of its own; a context manager, at whose end the process ends, too.

    Args:
        name: for messages.
        module: run as a program with this `job`, see `experiments.bench.trainers.turns.serve`.
        folder: gets NAME.log, with all that the child prints.
        threads: OpenMP threads of the child.
    """

    def __init__(self, name: str, module: str, job: Mapping[str, Any], folder: Path, threads: int) -> None:
        self.name, self.log = name, folder / f"{name.replace(' ', '-')}.log"
        (there, to_child), (from_child, back) = os.pipe(), os.pipe()
        surroundings = {**CACHE, **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", module, str(there), str(back), json.dumps(job)]
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=surroundings, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                pass_fds=(there, back),
            )  # fmt: skip
        os.close(there)
        os.close(back)
        self._line = Line(from_child, to_child)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def answer(self) -> dict[str, Any]:
        """What the child says next, its first word being that it is ready.

        Raises:
            ConfigError: an error of the user's instead.
            ChildError: another error, or nothing any more.
        """
        message = self._line.hear()
        if message is None:
            tail = self.log.read_text("utf-8", errors="replace")[-2000:]
            raise ChildError(f"{self.name} ended without a word; the end of what it printed:\n{tail}")
        if "error" in message:
            raise ConfigError(message["error"]) if message.get("users") else ChildError(message["error"])
        return message

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Says a word and waits for the answer; errors as for `answer`."""
        try:
            self._line.tell({"do": do, **more})
        except BrokenPipeError:
            pass  # what there is to say about it, `answer` finds
        return self.answer()

    def close(self) -> None:
        """Ends the process: it sees the closed line as its end."""
        self._line.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


OURS, TRL = "experiments.bench.trainers.ours", "experiments.bench.trainers.trl_grpo"
#: TRL's ways to sample, as in the tables.
ENGINES = {
    "generate": "TRL, `generate`",
    "continuous": "TRL, continuous batching",
    "vllm": "TRL, vLLM",
    "vllm-mended": "TRL, vLLM mended",
}
#: TRL's is 1e-4; ours is 1e-6 unless told otherwise. With 0/1 rewards both mean the same, but not to the last digit.
EPSILON = "algo.terms.rl.estimator.advantage.epsilon=1e-4"
#: Neither trainer writes logs of rollouts or checkpoints.
PLAIN = ("resume=never", "log_rollouts=0", "checkpoint.every=0")

#: Starts a child: name, module, job, folder, threads.
Start = Callable[[str, str, Mapping[str, Any], Path, int], Child]


def check(trl: Iterable[str], rows: int, batch: int, key: str) -> None:
    """Refuses what TRL could not run with.

    Raises:
        ConfigError: TRL is not there, it has no such way to sample, or a step's rows are no multiple of `batch`.
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
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
