"""What a sweep does: it checks all configurations, takes over what is there, and runs the rest as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from experiments import cli, provenance
from experiments.config import compose
from experiments.evaluate.settings import choose
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Planned, Sweep, text
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


#: Exit code of a job that was not started, because a signal asked for the end.
NOT_STARTED = -1
#: What stands before each command in a log.
BEGINS = "$ "


@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other, each only if the one before succeeded.

    Attributes:
        name: for progress and messages.
        modules: (module, arguments) of each command, as in `python -m module arguments`.
        log: where their output goes, appended.
        ranks: of the first of them, GPUs or none; more than 1 is started by torchrun.
    """

    name: str
    modules: tuple[tuple[str, tuple[str, ...]], ...]
    log: Path
    ranks: int = 1


@dataclass(frozen=True)
class Slots:
    """How many jobs run at once, and what each may use.

    Attributes:
        gpus: of every slot, counted as this process sees them; none on a CPU.
        threads: of each of a job's processes.
        names: of the GPUs, where CUDA_VISIBLE_DEVICES shows this process only some of the machine's.
    """

    gpus: tuple[tuple[int, ...], ...]
    threads: int
    names: tuple[str, ...] = ()

    @staticmethod
    def of(jobs: int, gpus_per_run: int, gpus: int, cores: int) -> Slots:
        """Those of a machine. Every GPU is in one slot, unless more runs of one GPU are asked for than there are GPUs:
        small models leave most of one idle. Without GPUs the cores are shared out evenly.

        Raises:
            ConfigError: there are GPUs, but fewer than a run is to have.
        """
        if 0 < gpus < gpus_per_run:
            raise ConfigError(f"gpus_per_run: {gpus_per_run} are asked for, and there are {gpus}; give at most that")
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
        """What is set for the processes of each slot."""
        found = []
        for gpus in self.gpus:
            own = {"OMP_NUM_THREADS": str(self.threads)}
            named = [self.names[gpu] if self.names else str(gpu) for gpu in gpus]
            found.append(own | ({"CUDA_VISIBLE_DEVICES": ",".join(named)} if gpus else {}))
        return found


class Crew:
    """Works through jobs; a signal is passed on to the running ones, which save and end, and no other is started.

    Args:
        ended: called with each job that ended, its exit code and its seconds.
        held: file descriptors that the jobs keep open, such as that of a lock.
    """

    def __init__(self, slots: Slots, ended: Callable[[Job, int, float], None], held: Sequence[int] = ()) -> None:
        self.slots, self.ended, self.held = slots, ended, held
        self.stopped = 0
        self._running: set[subprocess.Popen] = set()
        # Of a kind that one thread may take twice: a second signal may arrive while the first is being passed on.
        self._lock = threading.RLock()

    def run(self, jobs: Sequence[Job]) -> dict[str, int]:
        """Name → exit code of the command that ended it, 0 if all succeeded; calls `ended(job, code, seconds)`."""
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
                # With a time-out, so that signals reach this thread in between.
                while thread.is_alive():
                    thread.join(0.5)
        return codes

    def _do(self, job: Job, environment: dict[str, str]) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            for place, (module, arguments) in enumerate(job.modules):
                command = [*launcher(job.ranks if place == 0 else 1), "-m", module, *arguments]
                print(f"{BEGINS}{provenance.command(module, arguments)}", file=log, flush=True)
                with self._lock:
                    if self.stopped:
                        return 128 + self.stopped
                    # A session of its own: a Ctrl-C at the terminal reaches it once, through us.
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
        """Passes a signal on and starts nothing more."""
        # Locked, lest a process that is just being started be missed.
        with self._lock:
            self.stopped = number
            for process in self._running:
                if process.poll() is None:
                    # Nobody but a sweep knows what to do when its terminal is closed.
                    process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self.stop(number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Started by nohup, a sweep is to outlive its terminal.
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def launcher(ranks: int) -> list[str]:
    """The start of a command of so many ranks."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def last_words(log: Path) -> str:
    """The last line of the last command in a log that says something, for a message about what failed."""
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    _, begins, last = f"\n{text}".rpartition(f"\n{BEGINS}")
    lines = last.replace("\r", "\n").splitlines()[1 if begins else 0 :]
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or ["nothing was said"])[-1]
