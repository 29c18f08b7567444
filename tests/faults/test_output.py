"""Output that cannot be written never ends a program: closed streams, pipes without a reader, full disks, ASCII."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, SMALL, environment, lines

#: Writes to both streams, before and after a first failure, and then says on descriptor 3 that it has come to its end.
PROGRAM = """
import os, subprocess, sys
from experiments.output import prepare_output
prepare_output()
prepare_output()
for number in range(3):
    print("a → b", "\\ud800", flush=True)
    print("x" * 100_000, file=sys.stderr, flush=True)
subprocess.run(["echo", "from a child"], check=True)
os.write(int(sys.argv[1]), b"the end")
"""
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def without_reader() -> int:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("state", ["closed", "no reader", "full", "ASCII"])
@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_program_goes_on(tmp_path: Path, state: str, stream: int, options: tuple[str, ...]) -> None:
    files = {number: (tmp_path / str(number)).open("wb") for number in (1, 2)}
    broken = {"no reader": without_reader, "full": lambda: os.open("/dev/full", os.O_WRONLY)}
    descriptor = broken[state]() if state in broken else os.dup(files[stream].fileno())
    reader, writer = os.pipe()

    def prepare() -> None:
        os.dup2(descriptor, stream)
        if state == "closed":
            os.close(stream)

    variables = environment() | (ASCII if state == "ASCII" else {})
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM, str(writer)],
        cwd=ROOT,
        env=variables,
        stdout=files[1],
        stderr=files[2],
        pass_fds=[writer],
        preexec_fn=prepare,
    )
    os.close(writer)
    os.close(descriptor)
    for file in files.values():
        file.close()
    assert done.returncode == 0
    with os.fdopen(reader, "rb") as ending:
        assert ending.read() == b"the end"
    text = {number: (tmp_path / str(number)).read_bytes() for number in (1, 2)}
    assert b"Error" not in text[1] + text[2] and b"Exception" not in text[1] + text[2]
    if state == "ASCII":
        assert text[1].count(rb"a \u2192 b \ud800") == 3


@pytest.mark.parametrize("command", [("cli", "--help"), ("cli", "describe", "algo=hpt"), ("run", "--dry-run")])
def test_a_command_does_not_need_a_reader(command: tuple[str, ...]) -> None:
    """As in `upge describe algo=hpt | head -1`, in an ASCII locale."""
    module, *arguments = command
    writer = without_reader()
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=ROOT,
        env=environment() | ASCII,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_run_goes_on_without_its_output(tmp_path: Path) -> None:
    """Standard output is closed and standard error is a pipe without a reader."""
    out, writer = tmp_path / "run", without_reader()
    keys = ["algo=sft", "steps=2", "eval.every=1", "rollout.engine=transformers", f"output={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *SMALL, *keys],
        cwd=ROOT,
        env=environment() | ASCII,
        stderr=writer,
        preexec_fn=lambda: os.close(1),
    )
    os.close(writer)
    assert done.returncode == 0
    assert len(lines(out / "metrics.jsonl")) == 2 and (out / "report.html").is_file() and (out / "final").is_dir()
