"""What the benches of whole trainers have in common: which children there are, and what they are told."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.bench.measure import Spread
from experiments.bench.trainers.link import Child
from upge.errors import ConfigError, nearest

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


def spread(values: Iterable[float]) -> Spread:
    """Median and range."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
