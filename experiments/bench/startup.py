"""Seconds from the command to the first rollout and to the end of the first step, with intermediate times.

Runs alternate, each in its own process that ends after its first step: with the cache of tokens and checked answers
filled, with an empty cache if this run uses it, and with the checkout in the folder `before` if that is given (`git
worktree add FOLDER COMMIT`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.measure import Ending, Spread, Timing, interleaved
from experiments.cli import ROOT
from upge import config
from upge.errors import ConfigError

SUMMARY = "seconds from the command to the first rollout and the first step, with and without the cache"
MARKS = ("prepared", "trainer", "engine", "first rollout", "first step")
NOW, COLD, BEFORE = "now", "now, empty cache", "before"
Marks = dict[str, tuple[float, float]]
"""Mark → (seconds since the command, CPU seconds)."""
PROBE = Path(__file__).with_name("startup_probe.py")


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    run: str = config.key(
        "data.evaluation_size=16 eval.samples=1 prompts_per_step=8",
        "arguments of experiments.run; `steps` and `output` are added here",
    )
    before: str = config.key("", "the folder of another checkout to compare with; empty = none")
    rounds: int = config.key(5, "number of rounds, at least five", minimum=0, limit=1000)


def run(settings: Settings) -> str:
    """A Markdown table with the marks of each kind of start, and how many times as fast it is.

    Raises:
        ConfigError: the run refuses its settings, or `before` is not a checkout.
    """
    before = Path(settings.before).expanduser().absolute()
    if settings.before and not (before / "experiments" / "config.py").is_file():
        raise ConfigError(f"before: {before} holds no experiments/config.py; give the folder of a checkout")
    arguments = _local(settings.run.split())
    with tempfile.TemporaryDirectory() as folder:

        def started(root: Path, cache: str) -> Callable[[int], Marks]:
            return lambda number: _started(root, arguments, Path(folder), cache.format(number))

        things = {NOW: started(ROOT, "warm"), COLD: started(ROOT, "cold-{}"), BEFORE: started(before, "before")}
        things[NOW](0)
        if not (Path(folder) / "warm").exists():
            del things[COLD]
        if not settings.before:
            del things[BEFORE]
        timing = interleaved(things, settings.rounds)
        return Ending(timing.signal).finished(table(timing))


def table(timing: Timing) -> str:
    """Medians of the marks in seconds and in seconds of CPU, and ratios of the first step with their range."""
    base = next(name for name in (BEFORE, COLD, NOW) if name in timing.results)
    lines = [f"| start | | {' | '.join(MARKS)} | first step, times {base} |", "|---" * (len(MARKS) + 3) + "|"]
    for name, results in timing.results.items():
        for kind, what in enumerate(("seconds", "CPU")):
            medians = [f"{statistics.median(marks[mark][kind] for marks in results):.1f}" for mark in MARKS]
            slow, fast = ([marks[MARKS[-1]][kind] for marks in some] for some in (timing.results[base], results))
            times = "1" if name == base else f"{Spread.ratio(slow, fast):.2f}"
            lines.append(f"| {name} | {what} | {' | '.join(medians)} | {times} |")
    rounds = len(timing.results[NOW])
    note = f"Since the command, medians of {rounds} rounds; CPU of the run's own process; ratios within the round."
    return "\n".join([*lines, "", note])


def _started(root: Path, arguments: Sequence[str], folder: Path, cache: str) -> Marks:
    """Start a run and return its marks."""
    number = len(list(folder.iterdir()))
    marks, output = folder / f"marks-{number}.jsonl", folder / f"run-{number}"
    environment = {**os.environ, "UPGE_CACHE": str(folder / cache)}
    command = [sys.executable, str(PROBE), str(marks), repr(time.time())]
    command += [*arguments, "steps=1", f"output={output}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ConfigError(f"run: the run ended with exit code {done.returncode}: {last}")
    seconds_of: Marks = {}
    for line in marks.read_text().splitlines():
        name, *spent = json.loads(line)
        seconds_of.setdefault(name, tuple(spent))
    return seconds_of


def _local(arguments: Sequence[str]) -> list[str]:
    """The arguments with an already converted model, because conversion is not measured here."""
    from experiments.config import compose
    from experiments.run.prepare import with_local_models

    composed: Any = compose([*arguments, "steps=1"])
    path = with_local_models(composed).config.model.path
    return [*arguments, f"model.path={Path(path).absolute() if Path(path).is_dir() else path}"]
