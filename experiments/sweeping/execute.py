"""What a sweep does: checks all configurations, takes over what is there, trains and evaluates the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.config import compose
from experiments.evaluating.settings import choose
from experiments.sweeping.folder import SweepFolder
from experiments.sweeping.jobs import Crew, Job, Slots, last_words
from experiments.sweeping.settings import Planned, Sweep, text
from upge.errors import ConfigError

#: Exit code where some runs failed.
SOME_FAILED = 4


def check(sweep: Sweep) -> None:
    """Composes every run's and evaluation's configuration, so that a wrong key is found before hours of training.

    Raises:
        ConfigError: naming the run or the evaluation.
    """
    seen = set()
    for planned in sweep.runs:
        keys = {name: value for name, value in planned.keys.items() if name not in sweep.config.seed_keys}
        if str(keys) in seen:
            continue
        seen.add(str(keys))
        try:
            compose(planned.arguments(Path("x")))
        except ConfigError as error:
            raise ConfigError(f"{planned.label}: {error}") from error
    for name, keys in sweep.config.evaluate.items():
        try:
            choose(["model=tiny", *(f"{k}={text(v)}" for k, v in keys.items())])
        except ConfigError as error:
            raise ConfigError(f"evaluate.{name}: {error}") from error


def execute(folder: SweepFolder) -> int:
    """Trains and evaluates what is left; returns the exit code.

    Raises:
        ConfigError: another sweep is at work in the folder.
    """
    with folder.locked() as lock:
        return _execute(folder, lock)


def _execute(folder: SweepFolder, lock: int) -> int:
    config = folder.sweep.config
    for planned in folder.sweep.runs:
        found = folder.adopt(planned)
        if found:
            print(f"{planned.slug}: taken over from {found}, which has the same settings", flush=True)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    slots = Slots.of(config.jobs, config.gpus_per_run, gpus, os.cpu_count() or 1)
    left = [planned for planned in folder.sweep.runs if not folder.is_done(planned)]
    jobs = []
    for planned in left:
        folder.begin(planned)
        # Only training is of several ranks; where it is done the first command is an evaluation.
        ranks = config.gpus_per_run if gpus and not folder.is_trained(planned) else 1
        jobs.append(Job(planned.slug, tuple(_modules(folder, planned)), folder.log(planned), ranks))
    done, total = len(folder.sweep.runs) - len(left), len(folder.sweep.runs)
    print(f"{len(left)} to do, {len(slots.gpus)} at once, {slots.threads} CPU threads each", flush=True)

    def ended(job: Job, code: int, seconds: float) -> None:
        nonlocal done
        done += not code
        if code and crew.stopped:
            said = f"stopped with exit code {code}"
        else:
            said = "done" if not code else f"failed with exit code {code} ({last_words(job.log)}; all of it: {job.log})"
        print(f"[{done}/{total}] {job.name}: {said}, {seconds:.0f} s", flush=True)

    crew = Crew(slots, ended, (lock,))
    codes = crew.run(jobs)
    if crew.stopped:
        print(f"stopped by signal {crew.stopped}; the same command continues", file=sys.stderr)
        return 128 + crew.stopped
    return SOME_FAILED if any(codes.values()) else 0


def _modules(folder: SweepFolder, planned: Planned) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The commands that are left to do for a run."""
    if not folder.is_trained(planned):
        yield "experiments.run", tuple(planned.arguments(folder.run(planned)))
    for name in folder.missing(planned):
        keys = {"seed": planned.seed, **folder.sweep.config.evaluate[name]}
        arguments = [f"model={folder.run(planned) / 'final'}", *(f"{k}={text(v)}" for k, v in keys.items())]
        yield "experiments.evaluate", (*arguments, f"output={folder.evaluation(planned, name)}")
