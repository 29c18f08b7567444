"""Evaluations of the command line for tests: small ones, in this process or in one of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from experiments.evaluate import __main__ as evaluate
from tests import forked
from tests.running import ROOT, environment

DATA = ROOT.parent / "shared" / "data"
#: Seconds: 16 problems in two benchmarks.
SMALL = (
    "model=tiny",
    "suite=smoke",
    "rollout.engine=transformers",
    "verify.workers=1",
    "verify.verifier=number",
    "suite.benchmarks.sums.data.evaluation_size=10",
    "suite.benchmarks.long_sums.data.evaluation_size=6",
    "suite.max_response_tokens=48",
)


def start(*arguments: str, log: Path) -> forked.Forked | subprocess.Popen[bytes]:
    """Starts it in a process of its own, and of a group of its own; its output goes to the file `log`."""
    vllm = "rollout.engine=vllm" in arguments
    return forked.start("experiments.evaluate", *arguments, environment=environment(), out=log, vllm=vllm)


def run(*arguments: str, code: int = 0) -> None:
    """Runs it here and checks the exit code."""
    assert evaluate.main(list(arguments)) == code


def refused(capsys, *arguments: str) -> str:
    """The one message with which it is refused."""
    run(*arguments, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def sample_lines(folder: Path) -> dict[str, list[str]]:
    """Benchmark → the lines of its samples, sorted: the order is that of arrival."""
    return {path.stem: sorted(path.read_text().splitlines()) for path in sorted((folder / "samples").glob("*.jsonl"))}
