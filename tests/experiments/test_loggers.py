"""`log_to`: what each library is called with, runs that continue, failures, and the real libraries offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments import packages
from experiments.run import loggers
from experiments.run.loggers import LOGGERS, STATE, Loggers, Start, check_loggers
from experiments.run.train import Progress, Told
from tests.running import SMALL, command, environment
from upge.config import from_tree
from upge.errors import ConfigError
from upge.train.config import LOG_TO, RunConfig

CONFIG = {"steps": 5, "optimizer": {"lr": 1e-4}}
EVALUATION = {"all": {"greedy": 0.5, "problems": 4}, "levels": {"hard": {"greedy": 0.25}}}
#: Modules in place of trackio and wandb: each call becomes a line of the file that CALLS names.
FAKE = """
import json, os
def told(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([__name__, *call], default=str) + "\\n")
class Settings(dict): pass
class Run:
    def log(self, values, step=None): told("log", values, step)
    def finish(self, **given): told("finish", given)
def init(*given, **named):
    told("init", given, named)
    if os.environ.get("REFUSES") == __name__:
        raise RuntimeError("no login\\nmore")
    return Run()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of calls of the fake modules, which are importable in the test."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("CALLS", str(path))
    for name in ("trackio", "wandb"):
        module = types.ModuleType(name)
        exec(FAKE, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
    return path


def read(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(folder: Path, names: list[str], steps: range, continues: bool = False, code: int = 0) -> list[str]:
    """Logs these steps, with an evaluation at the even ones; returns the notes."""
    notes: list[str] = []
    folder.mkdir(exist_ok=True)
    start = Start(folder, "project", CONFIG, continues, steps.start - 1 if continues else 0)
    opened = Loggers(names, start, notes.append)
    if not continues:
        opened.evaluation({"step": 0, **EVALUATION})
    for step in steps:
        opened.step({"step": step, "loss": step / 2, "text": "x", "gap": None, "nan": float("nan"), "flag": True})
        if step % 2 == 0:
            opened.evaluation({"step": step, **EVALUATION})
    opened.close(code)
    return notes


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_continued_run_is_the_same_and_logs_no_step_twice(name: str, calls: Path, tmp_path: Path) -> None:
    """Interrupted at step 4, continued from the checkpoint of step 2, interrupted again, and continued to the end."""
    folder = tmp_path / "run"
    for steps, continues, code in ((range(1, 5), False, 130), (range(3, 4), True, 143), (range(3, 7), True, 0)):
        assert logged(folder, [name], steps, continues, code) == []
    mine = [call[1:] for call in read(calls) if call[0] == name]
    inits = [call[1:] for call in mine if call[0] == "init"]
    steps = [(sorted(values), step) for kind, values, step in (c for c in mine if c[0] == "log")]
    assert [step for values, step in steps if values == ["loss"]] == [1, 2, 3, 4, 5, 6]
    evaluation = ["eval/greedy", "eval/hard/greedy", "eval/problems"]
    assert [step for values, step in steps if values == evaluation] == [0, 2, 4, 6]
    (given, named), *later = inits
    ids = {one.get("id") or one["name"] for _, one in inits}
    assert len(ids) == 1 and ids == {json.loads((folder / STATE).read_text())["id"]} and ids.pop().startswith("run-")
    assert named["config"] == CONFIG and "project" in (*given, named.get("project"))
    assert [one["resume"] for _, one in inits] == ["allow"] * 3
    if name == "wandb":
        assert named["name"] == "run" and named["dir"] == str(folder)
        assert [call[1] for call in mine if call[0] == "finish"] == [{"exit_code": c} for c in (130, 143, 0)]


def test_a_logger_that_is_added_later_begins_there(calls: Path, tmp_path: Path) -> None:
    logged(tmp_path / "run", ["trackio"], range(1, 3))
    logged(tmp_path / "run", ["trackio", "wandb"], range(3, 4), continues=True)
    steps = [(name, step) for name, kind, values, step in (c for c in read(calls) if c[1] == "log") if "loss" in values]
    assert steps == [("trackio", 1), ("trackio", 2), ("trackio", 3), ("wandb", 3)]


def test_without_loggers_nothing_is_written(tmp_path: Path) -> None:
    assert logged(tmp_path / "run", ["console", "jsonl"], range(1, 3)) == []
    assert not [*(tmp_path / "run").iterdir()]


def test_a_logger_that_fails_ends_and_the_run_goes_on(calls: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(self: object, values: object, step: int) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr(sys.modules["wandb"].Run, "log", refuse)
    (note,) = logged(tmp_path / "run", ["trackio", "wandb"], range(1, 4))
    assert note == "log_to: wandb failed (OSError: the network is gone); the run goes on without it"
    assert [call[3] for call in read(calls) if call[:2] == ["trackio", "log"]] == [0, 1, 2, 2, 3]


def test_a_logger_that_cannot_start_is_refused(calls: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("REFUSES", "wandb")
    with pytest.raises(ConfigError) as refused:
        logged(tmp_path / "run", ["trackio", "wandb"], range(1, 4))
    expected = "log_to: wandb cannot start: RuntimeError: no login; WANDB_MODE=offline logs on this machine alone"
    assert str(refused.value) == expected
    assert [call[1] for call in read(calls) if call[0] == "trackio"] == ["init", "finish"]


def test_a_missing_package_and_an_unknown_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "is_installed", lambda name: name != "wandb")
    with pytest.raises(ConfigError, match="log_to: the package wandb is not installed; run `pip install wandb`"):
        check_loggers(RunConfig(log_to=["tensorboard", "wandb"]))
    check_loggers(RunConfig(log_to=["tensorboard", "console"]))
    with pytest.raises(ConfigError, match="log_to: found 'wandbb'; did you mean 'wandb'"):
        from_tree(RunConfig, {"log_to": ["wandbb"]})
    assert {*LOGGERS} | {"console", "jsonl"} == {*LOG_TO} and {*LOGGERS} <= {*packages.INSTALL}


def test_the_report_is_refreshed_at_each_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.report import page

    written: list[Path] = []
    monkeypatch.setattr(page, "write_report", written.append)
    told = Told(Progress(3, 0, enabled=False), tmp_path, steps=3)
    line = {"step": 2, "samples": 1, "errors": 0, "timeouts": 0, "time": 1.0}
    line["all"] = {"greedy": 0.5, "pass@1": 0.5, "mean@1": 0.5, "problems": 4}
    told.evaluation(line)
    assert written == []
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    told.evaluation(line)
    assert written == [tmp_path]
    told.evaluation(line | {"step": 3})
    assert written == [tmp_path]
    monkeypatch.setattr(page, "write_report", lambda folder: 1 / 0)
    told.evaluation(line)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_logs_and_continues(tmp_path: Path, ranks: int) -> None:
    """The command line, with a fake wandb: an interrupted run and its continuation are one run, logged by one rank."""
    pytest.importorskip("tensorboard")
    (tmp_path / "wandb.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path), environment().get("PYTHONPATH", "")])
    variables = environment() | {"PYTHONPATH": path, "CALLS": str(tmp_path / "calls.jsonl")}
    folder = tmp_path / "run"

    def start(steps: int) -> str:
        settings = ("algo=sft", f"output={folder}", "log_to=[wandb,tensorboard]", f"steps={steps}", "eval.every=1")
        run = command(*SMALL, *settings, ranks=ranks)
        done = subprocess.run(run, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "greedy" not in start(1).partition("Accuracy")[0]
    (folder / "report.html").unlink()
    start(2)
    calls = [call[1:] for call in read(tmp_path / "calls.jsonl")]
    inits = [named for kind, _, named in (c for c in calls if c[0] == "init")]
    assert len(inits) == 2 and len({one["id"] for one in inits}) == 1
    assert inits[0]["config"]["optimizer"]["lr"] and "experiments.run" in inits[0]["config"]["command"]
    assert [step for kind, values, step in (c for c in calls if c[0] == "log") if "loss" in values] == [1, 2]
    assert [step for kind, values, step in (c for c in calls if c[0] == "log") if "eval/greedy" in values] == [0, 1, 2]
    assert [c[1] for c in calls if c[0] == "finish"] == [{"exit_code": 0}] * 2
    shown, written = events(folder), [line["loss"] for line in read(folder / "metrics.jsonl")]
    assert len([*(folder / "tensorboard").iterdir()]) == 2
    assert [one.step for one in shown.Scalars("loss")] == [1, 2]
    assert [one.value for one in shown.Scalars("loss")] == pytest.approx(written, rel=1e-6)
    assert [one.step for one in shown.Scalars("eval/greedy")] == [0, 1, 2]


def events(folder: Path) -> Any:
    """What TensorBoard reads from a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return read


def test_tensorboard_reads_one_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logged(tmp_path / "run", ["tensorboard"], range(1, 6))
    logged(tmp_path / "run", ["tensorboard"], range(3, 7), continues=True)
    shown = events(tmp_path / "run")
    assert [(one.step, one.value) for one in shown.Scalars("loss")] == [(step, step / 2) for step in range(1, 7)]
    assert [one.step for one in shown.Scalars("eval/greedy")] == [0, 2, 4, 6]
    assert b'"lr": 0.0001' in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def in_a_process(folder: Path, name: str, **variables: str) -> None:
    """Logs with the real library, interrupted at step 5 and continued from step 2, each in a process of its own."""
    code = "import sys; from pathlib import Path; from tests.experiments.test_loggers import logged\n"
    code += "first, end, continues = map(int, sys.argv[3:])\n"
    code += "assert not logged(Path(sys.argv[1]), [sys.argv[2]], range(first, end), bool(continues))"
    for part in (("1", "6", "0"), ("3", "7", "1")):
        start = [sys.executable, "-c", code, str(folder), name, *part]
        done = subprocess.run(start, env=environment() | variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_trackio_holds_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    in_a_process(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    code = "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
    code += "(run,) = S.get_runs('project')\n"
    code += "print(json.dumps([run, S.get_logs('project', run), S.get_run_config('project', run)]))"
    variables = environment() | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    run, lines, config = json.loads(done.stdout.splitlines()[-1])
    assert run == json.loads((tmp_path / "run" / STATE).read_text())["id"] and config["optimizer"] == {"lr": 1e-4}
    assert [(one["step"], one["loss"]) for one in lines if "loss" in one] == [(s, s / 2) for s in range(1, 7)]
    assert [one["step"] for one in lines if "eval/greedy" in one] == [0, 2, 4, 6]


@pytest.mark.slow
def test_wandb_offline_holds_one_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    assert wandb.__version__
    in_a_process(tmp_path / "run", "wandb", WANDB_MODE="offline")
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    ids = {json.loads((tmp_path / "run" / STATE).read_text())["id"]}
    assert len(runs) == 2 and {"-".join(path.name.split("-")[3:]) for path in runs} == ids


def test_tensorboard_drops_the_steps_that_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None, flush_secs: int) -> None:
            told.append(("open", folder, purge_step))

        def add_text(self, tag: str, text: str, step: int) -> None:
            told.append((tag, '"lr": 0.0001' in text, step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    logged(tmp_path / "run", ["tensorboard"], range(1, 4))
    logged(tmp_path / "run", ["tensorboard"], range(3, 5), continues=True)
    folder = str(tmp_path / "run" / "tensorboard")
    assert [one[1:] for one in told if one[0] == "open"] == [(folder, None), (folder, 3)]
    assert [one[2] for one in told if one[0] == "loss"] == [1, 2, 3, 3, 4]
    assert ("eval/hard/greedy", 0.25, 2) in told and ("config", True, 0) in told and told[-1] == ("close",)
