"""Ranks under torchrun: they end with their launcher and with each other, and say how the run really ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import forked
from tests.forked import TORCHRUN
from tests.running import ROOT, SMALL, environment, lines

pytestmark = pytest.mark.slow

#: Seconds within which a run that has lost a rank or its launcher must have ended, on a busy machine.
LIMIT = 60.0
KEYS = (*SMALL, "algo=grpo", "steps=100000", "eval.every=-1", "log_rollouts=0", "checkpoint.every=1000")


class Started:
    """A run on two ranks under torchrun.

    Attributes:
        launcher: torchrun's process.
        out: the run's folder.
        log: everything that is printed.
    """

    def __init__(self, folder: Path, fault: dict[str, object] | None) -> None:
        self.out, self.log = folder / "run", folder / "log"
        module = "experiments.run" if fault is None else "tests.faults.disturbed"
        command = [sys.executable, *TORCHRUN, "2", "-m", module, *KEYS, "verify.workers=1", f"output={self.out}"]
        variables = environment() | {"OMP_NUM_THREADS": "1"} | ({} if fault is None else {"FAULT": json.dumps(fault)})
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, ready: Callable[[], bool], what: str, limit: float = 300.0) -> None:
        """Waits for an event; fails with the log if it does not happen."""
        end = time.monotonic() + limit
        while not ready():
            assert time.monotonic() < end, f"{what} did not happen\n{self.log.read_text()[-5000:]}"
            time.sleep(0.05)

    def has_steps(self) -> bool:
        """Whether the first step is complete."""
        assert self.launcher.poll() is None, self.log.read_text()[-5000:]
        return (self.out / "metrics.jsonl").is_file()

    def family(self) -> list[psutil.Process]:
        """The ranks, and all processes that they have started."""
        return psutil.Process(self.launcher.pid).children(recursive=True)

    def ranks(self) -> dict[int, psutil.Process]:
        """The process of each rank."""
        children = psutil.Process(self.launcher.pid).children()
        return {int(child.environ()["RANK"]): child for child in children}

    def ending(self) -> dict[str, object]:
        """What exit.json says."""
        return json.loads((self.out / "exit.json").read_text())


@contextmanager
def started(folder: Path, fault: dict[str, object] | None = None) -> Iterator[Started]:
    """A run whose first step is complete; all of its processes have ended afterwards."""
    run = Started(folder, fault)
    family: list[psutil.Process] = []
    try:
        run.wait_for(run.has_steps, "the first step")
        family = run.family()
        yield run
    finally:
        for process in {*family, *(run.family() if run.launcher.poll() is None else [])}:
            if process.is_running():
                process.kill()
        run.launcher.kill()
        run.launcher.wait()


def is_over(processes: list[psutil.Process]) -> Callable[[], bool]:
    """Whether all of these processes have ended; one that nobody waits for stays as a zombie."""

    def over() -> bool:
        alive = [process for process in processes if process.is_running()]
        return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)

    return over


def test_everything_ends_with_the_launcher(tmp_path: Path) -> None:
    """SIGKILL, which torchrun cannot pass on."""
    with started(tmp_path) as run:
        family = run.family()
        assert len(family) >= 6, "two ranks, each with a server of verifiers and a worker"
        run.launcher.kill()
        run.launcher.wait()
        run.wait_for(is_over(family), "the end of all processes", LIMIT)


def test_everything_ends_with_a_rank(tmp_path: Path) -> None:
    """A rank that is killed, as for a lack of memory: one message, and no traceback of the other rank."""
    with started(tmp_path) as run:
        family, (_, killed) = run.family(), sorted(run.ranks().items())[1]
        killed.send_signal(signal.SIGKILL)
        run.wait_for(is_over([*family, psutil.Process(run.launcher.pid)]), "the end of all processes", LIMIT)
        assert run.launcher.wait() == 1
        text = run.log.read_text()
        assert text.count("error: rank 1 ") == 1 and f"process {killed.pid}" in text
        assert "experiments/run/" not in text, "a traceback of the other rank"
        assert run.ending()["code"] == 1 and "rank 1" in str(run.ending()["reason"])


def test_an_error_on_one_rank_is_recorded(tmp_path: Path) -> None:
    fault = {"FAULT": json.dumps({"kind": "failing_rank", "step": 1, "rank": 1})}
    arguments = (*KEYS, "verify.workers=1", "rollout.engine=transformers", f"output={tmp_path}/run")
    done = forked.run("tests.faults.disturbed", *arguments, environment=environment() | fault, ranks=2)
    assert done.returncode == 1 and "LookupError: no such thing" in done.stderr
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending == ending | {"code": 1, "reason": "LookupError: no such thing", "step": 1}


def test_a_signal_ends_a_step_of_any_length(tmp_path: Path) -> None:
    """torchrun passes on the signal and kills the ranks 30 s later; its own exit code says nothing."""
    with started(tmp_path, {"kind": "endless_step", "step": 2, "rank": 1}) as run:
        run.wait_for(lambda: len(lines(run.out / "metrics.jsonl")) == 2, "the second step")
        time.sleep(0.5)
        family = run.family()
        os.kill(run.launcher.pid, signal.SIGTERM)
        run.wait_for(is_over([*family, psutil.Process(run.launcher.pid)]), "the end of all processes", LIMIT)
        assert run.ending() == run.ending() | {"code": 143, "step": 2}
        assert (run.out / "checkpoints" / "step_000002").is_dir() and (run.out / "report.html").is_file()
        text = run.log.read_text()
        assert "exit code 143: stopped by signal 15; the state is saved" in text
