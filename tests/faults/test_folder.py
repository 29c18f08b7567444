"""The folder of a run: one writer at a time, what a continuation may change, and files that cannot be read."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from experiments.compare.load import load as load_evaluations
from experiments.evaluate.folder import EvaluationFolder
from experiments.report.folder import read_run
from experiments.run.__main__ import help_text
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import load as load_sweep
from tests.faults.runs import SHORT, refused
from tests.running import ROOT
from upge.errors import ConfigError, DataError, UserError
from upge.train.config import RunConfig
from upge.train.folder import FORMAT, FREE_KEYS, RunFolder

# One writer.


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, ranks):
    """The first one holds the lock of a folder in which it has written nothing yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        message = refused(*SHORT, "steps=1", f"output={folder}", ranks=ranks)
    assert f"another run is using {folder}" in message
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_the_lock_ends_with_its_process_and_not_with_those_that_it_forked(tmp_path):
    folder = RunFolder(tmp_path / "run")
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with folder.locked():
            if os.fork() == 0:  # such as a worker that outlives a killed run
                os.write(writer, b"%d" % os.getpid())
            signal.pause()
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(ConfigError, match="another run is using"), folder.locked():
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with folder.locked():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_start_that_fails_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    with pytest.raises(UserError), folder.locked():
        raise UserError("no such model")
    assert not (tmp_path / "new").exists()
    folder.path.mkdir(parents=True)
    with folder.locked():
        (folder.path / "config.yaml").write_text("steps: 1\n")
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", ".lock"}


def test_a_lock_of_a_folder_that_was_removed_is_not_taken_for_that_of_a_new_one(tmp_path, monkeypatch):
    """Its holder removes the folder after another process has opened the file."""
    folder, real = RunFolder(tmp_path / "run"), fcntl.flock

    def flock(file, operation):
        real(file, operation)
        (folder.path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="another run is using"), folder.locked():
        pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="no locks"), RunFolder(tmp_path / "run").locked():
        pass


# What a continuation may change.


def tree(**changed: object) -> dict:
    from experiments.config import compose

    return compose([f"{key}={value}" for key, value in changed.items()]).tree


FREE = {
    "optimizer.micro_batch_tokens": 99,
    "model.gradient_checkpointing": "full",
    "rollout.memory_fraction": 0.2,
    "rollout.max_sequences": 8,
    "rollout.max_batched_tokens": 4096,
    "verify.workers": 1,
    "eval.every": 7,
    "checkpoint.every": 3,
    "checkpoint.keep": 4,
    "deepspeed.offload": "optimizer",
    "deepspeed.config": "{zero_optimization: {sub_group_size: 1000}}",
    "stop.nonfinite_updates": 2,
    "log_rollouts": 0,
}
FIXED = {
    "optimizer.lr": 0.5,
    "optimizer.mini_batches": 2,
    "model.dtype": "bfloat16",
    "rollout.temperature": 0.5,
    "rollout.max_prompt_tokens": 99,
    "verify.verifier": "number",
    "eval.samples": 3,
    "data.seed": 5,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("begun") / "run")
    folder.start(tree(), {"command": "c", "started": "now", "from_step": 0}, continues=False)
    return folder


@pytest.mark.parametrize("key", FREE)
def test_what_never_changes_the_gradient_may_change(begun, key):
    assert begun.open(tree(**{key: FREE[key]}), "auto")


@pytest.mark.parametrize("key", FIXED)
def test_everything_else_may_not(begun, key):
    with pytest.raises(ConfigError, match=f"another {key}"):
        begun.open(tree(**{key: FIXED[key]}), "auto")


def test_help_and_documentation_name_what_may_change():
    sections = {name for name, kind in RunConfig.__annotations__.items() if kind.endswith("Config")}
    names = [f"{key}.*" if key in sections else key for key in FREE_KEYS]
    text, page = " ".join(help_text(everything=True).split()), (ROOT / "docs" / "running.md").read_text()
    assert ", ".join(names) in text
    assert not [name for name in names if f"`{name}`" not in page]


# Files that cannot be read.

BROKEN = {
    "nothing": b"",
    "half": b'{"format": 2, "sta',
    "no text": b"\xff\xfe\x00\x80",
    "a list": b"[1, 2]",
    "a number": b"7",
    "depth": b"[" * 3000,
    "an alias": b"*here",
}


def run_folder(path: Path) -> RunFolder:
    path.mkdir()
    (path / "config.yaml").write_text("steps: 1\n")
    (path / "run.json").write_text(json.dumps({"format": FORMAT}))
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return RunFolder(path)


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "best/evaluation.json"])
def test_a_broken_file_of_a_run_is_named(tmp_path, name, content):
    folder = run_folder(tmp_path / "run")
    (folder.path / name).parent.mkdir(exist_ok=True)
    (folder.path / name).write_bytes(BROKEN[content])
    with pytest.raises(ConfigError, match=rf"{folder.path / name}.*; (restore|remove)"):
        folder.open({"steps": 1}, "auto")


@pytest.mark.parametrize("text", ["steps: many\nseed: 1\n", "seed: 1\n"])
def test_a_finished_run_whose_configuration_lacks_its_steps(tmp_path, text):
    folder = run_folder(tmp_path / "run")
    (folder.path / "config.yaml").write_text(text)
    (folder.path / "run.json").write_text(json.dumps({"format": FORMAT, "finished_step": 1}))
    with pytest.raises(ConfigError, match="config.yaml: found steps"):
        folder.open({"steps": 5, "seed": 1}, "auto")


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_broken_file_of_an_evaluation_is_named(tmp_path, name, content):
    (tmp_path / "config.yaml").write_text("suite: {skip: []}\n")
    (tmp_path / name).write_bytes(BROKEN[content])
    with pytest.raises(ConfigError, match=str(tmp_path / name)):
        EvaluationFolder(tmp_path).open({"suite": {"skip": []}}, "auto")


@pytest.mark.parametrize("content", BROKEN)
def test_broken_scores_are_named(tmp_path, content):
    (tmp_path / "scores.json").write_bytes(BROKEN[content])
    with pytest.raises(DataError, match="scores.json"):
        load_evaluations([str(tmp_path)])


@pytest.mark.parametrize("content", BROKEN)
def test_a_report_of_a_broken_configuration_names_it(tmp_path, content):
    folder = run_folder(tmp_path / "run")
    (folder.path / "config.yaml").write_bytes(BROKEN[content])
    if content in ("nothing", "no text"):
        pytest.skip("an empty configuration is a configuration")
    with pytest.raises(DataError, match="config.yaml"):
        read_run(folder.path)


def sweep_folder(path: Path) -> SweepFolder:
    return SweepFolder(load_sweep(["grid.algo=[sft]", "seeds=0..0", "steps=1", f"output={path}"]))


RECORDS = {name: BROKEN[name] for name in ("half", "a list", "depth")} | {
    "no settings": b"{}",
    "settings of another kind": b'{"run": 3, "evaluate": {}}',
}


@pytest.mark.parametrize("content", RECORDS)
def test_a_broken_record_of_a_sweep_is_named(tmp_path, content):
    sweep = sweep_folder(tmp_path / "s")
    (planned,) = sweep.sweep.runs
    sweep.begin(planned)
    sweep.run(planned).mkdir(parents=True)
    record = next((tmp_path / "s" / "settings").rglob("*.json"))
    record.write_bytes(RECORDS[content])
    with pytest.raises(ConfigError, match=str(record)):
        sweep.check()
    with pytest.raises(ConfigError, match=str(record)):
        sweep.begin(planned)
    other = sweep_folder(tmp_path / "t")
    assert other.adopt(other.sweep.runs[0]) is None, "a neighbouring sweep's files do no harm"
