"""Running many commands at once: slots, failures, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import cli
from experiments.sweep.execute import NOT_STARTED, Job, JobPool, Slots, last_message
from upge.errors import ConfigError


def test_slots_share_gpus_and_cores():
    assert Slots.of(0, 1, 0, 8) == Slots(((),) * 8, 1)
    assert Slots.of(2, 1, 0, 8) == Slots(((), ()), 4)
    assert Slots.of(0, 2, 5, 64).gpus == ((0, 1), (2, 3))
    assert Slots.of(1, 2, 5, 64) == Slots(((0, 1),), 32)
    assert Slots.of(3, 2, 5, 64).gpus == ((0, 1), (2, 3))
    assert Slots.of(5, 1, 2, 16) == Slots(((0,), (1,), (0,), (1,), (0,)), 3)
    assert Slots.of(0, 1, 2, 4).environments[1] == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(ConfigError, match="gpus_per_run: 8 requested, but there are 2"):
        Slots.of(0, 8, 2, 64)


def test_only_the_gpus_that_are_shown_are_given_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 7")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in Slots.of(0, 1, 3, 6).environments] == ["4", "5", "7"]


def test_several_ranks_are_started_by_torchrun():
    assert cli.launcher(1) == [sys.executable]
    assert "--nproc_per_node 4" in " ".join(cli.launcher(4)) and "torch.distributed.run" in cli.launcher(4)


@pytest.fixture
def say(tmp_path, monkeypatch):
    """Modules that print, fail, or wait for a signal."""
    (tmp_path / "good.py").write_text("import os, sys; print('hello', os.environ['OMP_NUM_THREADS'], *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("import sys; print('error: no such thing'); print('bye'); sys.exit(2)")
    (tmp_path / "slow.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('waiting', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, *modules: Job(name, tuple((m, (name,)) for m in modules), tmp_path / f"{name}.log")


def test_a_job_that_fails_ends_there_and_hinders_no_other(say):
    ended = []
    pool = JobPool(Slots(((), ()), 3), lambda job, code, seconds: ended.append((job.name, code)))
    jobs = [say("a", "good", "good"), say("b", "bad", "good"), say("c", "good")]
    assert pool.run(jobs) == {"a": 0, "b": 2, "c": 0} == dict(ended)
    assert [line for line in jobs[0].log.read_text().split("\n") if "$" not in line] == ["hello 3 a", "hello 3 a", ""]
    assert last_message(jobs[1].log) == "error: no such thing" and "hello" not in jobs[1].log.read_text()


def test_a_signal_reaches_what_runs_and_nothing_else_begins(say):
    pool = JobPool(Slots(((),), 1), lambda *_: None)
    first, second = say("first", "slow"), say("second", "good")

    def stop():
        while not (first.log.is_file() and "waiting" in first.log.read_text()):
            time.sleep(0.05)
        pool.stop(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert pool.run([first, second]) == {"first": 143, "second": NOT_STARTED}
    assert pool.stopped == signal.SIGTERM and not second.log.exists()


def test_a_signal_while_a_job_is_being_started_reaches_it(say, monkeypatch):
    """The handler runs in another thread than the one that starts jobs, at any moment."""

    pool, popen = JobPool(Slots(((),), 1), lambda *_: None), subprocess.Popen

    def slowly(*arguments, **more):
        threading.Thread(target=pool.stop, args=(signal.SIGTERM,), daemon=True).start()
        time.sleep(0.5)
        return popen(*arguments, **more)

    monkeypatch.setattr(subprocess, "Popen", slowly)
    start = time.monotonic()
    assert pool.run([say("first", "slow")])["first"] == 143 and time.monotonic() - start < 30


def test_the_last_words_are_those_of_the_last_command(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("$ python -m a\nerror: before\n$ python -m b\nTraceback\nOSError: now\n")
    assert last_message(log) == "OSError: now"
    log.write_text("$ python -m a\n")
    assert last_message(log) == "no output" == last_message(tmp_path / "none.log")
