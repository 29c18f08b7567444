"""Executes a sweep: checks all configurations, reuses finished runs, and runs the others as jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import cli, files
from experiments.config import compose
from experiments.evaluate.prepare import choose
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Planned, Sweep, text
from upge.errors import ConfigError
from upge.models.loading import has_cuda
from upge.train.stopping import stop_signals

#: Exit code if some runs failed.
SOME_FAILED = 4


def check(sweep: Sweep) -> None:
    """Compose every run's and evaluation's configuration, so that errors appear before hours of training.

    Raises:
        ConfigError: a configuration is invalid; the message names the run or the evaluation.
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
    """Train and evaluate the remaining runs; return the exit code.

    Raises:
        ConfigError: another sweep is using the folder.
    """
    with folder.locked() as lock:
        return _execute(folder, lock)


def _execute(folder: SweepFolder, lock: int) -> int:
    config = folder.sweep.config
    for planned in folder.sweep.runs:
        if adopted := folder.adopt(planned):
            print(f"{planned.slug}: copied from {adopted}, which has the same settings", flush=True)
    gpus = torch.cuda.device_count() if has_cuda() else 0
    slots = Slots.of(config.jobs, config.gpus_per_run, gpus, os.cpu_count() or 1)
    left = [planned for planned in folder.sweep.runs if not folder.is_done(planned)]
    jobs = []
    for planned in left:
        folder.begin(planned)
        # Only training has several ranks; if it is done the first command is an evaluation.
        ranks = config.gpus_per_run if gpus and not folder.is_trained(planned) else 1
        jobs.append(Job(planned.slug, tuple(_modules(folder, planned)), folder.log(planned), ranks))
    done, total = len(folder.sweep.runs) - len(left), len(folder.sweep.runs)
    print(f"{len(left)} to do, {len(slots.gpus)} at once, {slots.threads} CPU threads each", flush=True)

    def ended(job: Job, code: int, seconds: float) -> None:
        nonlocal done
        done += not code
        if code and pool.stopped:
            outcome = f"stopped with exit code {code}"
        elif code:
            outcome = f"failed with exit code {code} ({last_message(job.log)}; full log: {job.log})"
        else:
            outcome = "done"
        print(f"[{done}/{total}] {job.name}: {outcome}, {seconds:.0f} s", flush=True)

    pool = JobPool(slots, ended, (lock,))
    codes = pool.run(jobs)
    if pool.stopped:
        print(f"stopped by signal {pool.stopped}; the same command continues", file=sys.stderr)
        return 128 + pool.stopped
    return SOME_FAILED if any(codes.values()) else 0


def _modules(folder: SweepFolder, planned: Planned) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The remaining commands of a run."""
    if not folder.is_trained(planned):
        yield "experiments.run", tuple(planned.arguments(folder.run(planned)))
    for name in folder.missing(planned):
        keys = {"seed": planned.seed, **folder.sweep.config.evaluate[name]}
        arguments = [f"model={folder.run(planned) / 'final'}", *(f"{k}={text(v)}" for k, v in keys.items())]
        yield "experiments.evaluate", (*arguments, f"output={folder.evaluation(planned, name)}")


#: Exit code of a job that was not started because a signal had stopped the sweep.
NOT_STARTED = -1
#: The text before each command in a log.
COMMAND_PREFIX = "$ "


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other, each only if the one before succeeded.

    Attributes:
        modules: (module, arguments) of each command, as in `python -m module arguments`.
        log: the file to which their output is appended.
        ranks: number of ranks of the first command; more than 1 are started by torchrun.
    """

    name: str
    modules: tuple[tuple[str, tuple[str, ...]], ...]
    log: Path
    ranks: int = 1


@dataclass(frozen=True)
class Slots:
    """How many jobs run at once, and the resources of each.

    Attributes:
        gpus: the GPUs of each slot, numbered as this process sees them; empty without GPUs.
        threads: CPU threads of each process of a job.
        names: the names of the GPUs in CUDA_VISIBLE_DEVICES, if it is set.
    """

    gpus: tuple[tuple[int, ...], ...]
    threads: int
    names: tuple[str, ...] = ()

    @staticmethod
    def of(jobs: int, gpus_per_run: int, gpus: int, cores: int) -> Slots:
        """The slots of a machine.

        Every GPU is in one slot. Only if there are more jobs of one GPU than GPUs do several slots share a GPU, because
        small models leave most of it idle. Without GPUs the cores are divided evenly.

        Args:
            jobs: number of slots; 0 = the number of GPUs, or of cores without GPUs.
            gpus, cores: those of the machine.

        Raises:
            ConfigError: there are GPUs, but fewer than `gpus_per_run`.
        """
        if 0 < gpus < gpus_per_run:
            raise ConfigError(f"gpus_per_run: {gpus_per_run} requested, but there are {gpus}; give at most {gpus}")
        if gpus:
            whole = gpus // gpus_per_run
            count = min(jobs or whole, whole) if gpus_per_run > 1 else jobs or gpus
            firsts = [i % whole * gpus_per_run for i in range(count)]
            share = tuple(tuple(range(first, first + gpus_per_run)) for first in firsts)
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = tuple(name.strip() for name in visible.split(",") if name.strip())
            return Slots(share, max(1, cores // (count * gpus_per_run)), names)
        count = jobs or cores
        return Slots(((),) * count, max(1, cores // count))

    @property
    def environments(self) -> list[dict[str, str]]:
        """The environment variables of each slot's processes."""
        named = [",".join(self.names[gpu] if self.names else str(gpu) for gpu in gpus) for gpus in self.gpus]
        own = {"OMP_NUM_THREADS": str(self.threads)}
        return [own | ({"CUDA_VISIBLE_DEVICES": names} if names else {}) for names in named]


class JobPool:
    """Runs jobs in slots. A signal is forwarded to the running jobs, which save and exit; no other job is started.

    Args:
        ended: called with each job that ended, its exit code and its seconds.
        held: file descriptors that the jobs keep open, such as that of a lock.

    Attributes:
        stopped: the signal that stopped the jobs, or 0.
    """

    def __init__(self, slots: Slots, ended: Callable[[Job, int, float], None], held: Sequence[int] = ()) -> None:
        self.slots, self.ended, self.held = slots, ended, held
        self.stopped = 0
        self._running: set[subprocess.Popen] = set()
        # Reentrant, because a second signal may arrive while the first is being forwarded.
        self._lock = threading.RLock()

    def run(self, jobs: Sequence[Job]) -> dict[str, int]:
        """Run all jobs; return name → exit code of the job's last command, 0 if all succeeded."""
        waiting, codes = iter(jobs), {job.name: NOT_STARTED for job in jobs}

        def work(environment: dict[str, str]) -> None:
            while True:
                with self._lock:
                    job = None if self.stopped else next(waiting, None)
                if job is None:
                    return
                start = time.monotonic()
                codes[job.name] = self._do(job, environment)
                with self._lock:
                    self.ended(job, codes[job.name], time.monotonic() - start)

        with self._signals():
            threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in self.slots.environments]
            for thread in threads:
                thread.start()
            for thread in threads:
                # With a timeout, so that signals reach this thread in between.
                while thread.is_alive():
                    thread.join(0.5)
        return codes

    def _do(self, job: Job, environment: dict[str, str]) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            for place, (module, arguments) in enumerate(job.modules):
                command = [*cli.launcher(job.ranks if place == 0 else 1), "-m", module, *arguments]
                print(f"{COMMAND_PREFIX}{files.command(module, arguments)}", file=log, flush=True)
                with self._lock:
                    if self.stopped:
                        return 128 + self.stopped
                    # A new session, so that Ctrl-C at the terminal reaches the job only through `stop`.
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        env=os.environ | cli.child_environment() | environment, start_new_session=True,
                        pass_fds=self.held,
                    )  # fmt: skip
                    self._running.add(process)
                code = process.wait()
                with self._lock:
                    self._running.discard(process)
                if code:
                    return 128 - code if code < 0 else code
        return 0

    def stop(self, number: int) -> None:
        """Forward a signal to the running jobs and start no others."""
        # The lock makes sure that a process that is just being started is not missed.
        with self._lock:
            self.stopped = number
            for process in self._running:
                if process.poll() is None:
                    process.send_signal(number)

    def _signals(self) -> AbstractContextManager:
        if threading.current_thread() is not threading.main_thread():
            return nullcontext()
        return cli.signals_handled(stop_signals(), lambda number, frame: self.stop(number))


def last_message(log: Path) -> str:
    """The last error of the last command in a log, or else its last line that is not empty."""
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    _, has_command, last = f"\n{text}".rpartition(f"\n{COMMAND_PREFIX}")
    lines = last.replace("\r", "\n").splitlines()[1 if has_command else 0 :]
    messages = [line.strip() for line in lines if line.strip()]
    errors = [line for line in messages if line.startswith("error:")]
    return (errors or messages or ["no output"])[-1]
