"""Ctrl-C while a command starts, and where its last line stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from experiments import cli
from tests import forked
from tests.running import environment

#: Sends SIGINT to its own process when a module is about to be imported.
HOOK = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("program", [["-m", "experiments.run"], ["-m", "experiments.sweep"], ["upge", "run"]])
def test_ctrl_c_during_the_first_imports(program: list[str], tmp_path: Path) -> None:
    """Python still imports the command's module: nothing of it can catch the signal."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    # The console script, as an installation writes it.
    (tmp_path / "upge").write_text("import sys\nfrom experiments.cli import main\nsys.exit(main())\n")
    variables = environment() | {"INTERRUPT_AT": "torch"}
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, *program, "output=new"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped by signal 2\n", "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", ["experiments.config", "upge.evaluation.evaluator", "upge.train.trainer"])
def test_ctrl_c_while_a_run_starts(module: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(f"{HOOK}\nfrom experiments.run.__main__ import main\nsys.exit(main())\n")
    variables = environment() | {"INTERRUPT_AT": module}
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(tmp_path)])
    arguments = ["data.train_size=16", "eval.every=-1", "rollout.engine=transformers", f"output={tmp_path / 'new'}"]
    done = forked.run("interrupted", *arguments, environment=variables)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "stopped by signal 2", done.stderr
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (8, 0), (9, 1)])
def test_a_package_that_only_one_machine_lacks_is_named(
    rank: int, local_rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank of each machine prints it, and torchrun's summary gets it from every rank."""
    file = tmp_path / "error.json"
    variables = {"RANK": rank, "LOCAL_RANK": local_rank, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": file}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("upge.train.launcher.end_with_launcher", lambda: None)

    def command(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    assert cli.run_command(command, []) == 2
    message = "the package peft is not installed; run `pip install 'upge[train]'`"
    printed = f"error: {message}\nexit code 2: {message}\n" if local_rank == 0 else ""
    assert capsys.readouterr().err == printed
    assert json.loads(file.read_text())["message"]["message"] == f"exit code 2: {message}"


def test_an_error_begins_a_line_below_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(total=3, mininterval=60, file=sys.stderr)
    bar.update()
    cli.print_error("steps: found -1")
    bar.close()
    assert capsys.readouterr().err.splitlines()[-1] == "error: steps: found -1"
    cli.print_error("without a bar")
    assert capsys.readouterr().err == "error: without a bar\n"
