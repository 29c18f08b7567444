"""Running many commands at once: a slot for each GPU, or for each core where there is none."""

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

#: Exit code of a job that was not started, because a signal asked for the end.
NOT_STARTED = -1


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
    """How many jobs run at once, and what each may use: `gpus` of every slot (none on a CPU), `threads`."""

    gpus: tuple[tuple[int, ...], ...]
    threads: int

    @staticmethod
    def of(jobs: int, gpus_per_run: int, gpus: int, cores: int) -> Slots:
        """Those of a machine: every GPU in at most one slot; without GPUs the cores are shared out evenly."""
        if gpus >= gpus_per_run:
            count = min(jobs or gpus, gpus // gpus_per_run)
            share = tuple(tuple(range(i * gpus_per_run, (i + 1) * gpus_per_run)) for i in range(count))
            return Slots(share, max(1, cores // count))
        count = jobs or cores
        return Slots(((),) * count, max(1, cores // count))

    @property
    def environments(self) -> list[dict[str, str]]:
        """What is set for the processes of each slot."""
        found = []
        for gpus in self.gpus:
            own = {"OMP_NUM_THREADS": str(self.threads)}
            found.append(own | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}))
        return found


class Crew:
    """Works through jobs; a signal is passed on to the running ones, which save and end, and no other is started."""

    def __init__(self, slots: Slots, ended: Callable[[Job, int, float], None]) -> None:
        self.slots, self.ended = slots, ended
        self.stopped = 0
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

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
        with job.log.open("a") as log:
            for place, (module, arguments) in enumerate(job.modules):
                command = [*launcher(job.ranks if place == 0 else 1), "-m", module, *arguments]
                with self._lock:
                    if self.stopped:
                        return 128 + self.stopped
                    # A session of its own: a Ctrl-C at the terminal reaches it once, through us.
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        env=os.environ | environment, start_new_session=True,
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
        self.stopped = number
        for process in list(self._running):
            if process.poll() is None:
                process.send_signal(number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self.stop(number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
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
    """The last line of a log that says something, for a message about what failed."""
    lines = log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines() if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or ["nothing was said"])[-1]
