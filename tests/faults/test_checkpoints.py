"""Checkpoints: damage is never trained on, nothing in them is executed, and full disks name the last one."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.run.ending import ExitRecord
from tests.faults.runs import SHORT, STEPS, attempt, interrupted, refused
from tests.running import lines
from upge.errors import StorageError, is_out_of_memory
from upge.train import files
from upge.train.checkpoint import MANIFEST, problem, seal
from upge.train.distributed import World
from upge.train.folder import RunFolder
from upge.train.stopping import Ending

ALONE = World(0, 1, torch.device("cpu"))
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three steps on two ranks with a checkpoint of each; one record of it was damaged later."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = attempt(*STEPS, f"output={folder}", ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def flip(path: Path, place: float = 0.5) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


# The manifest.


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    """The second checkpoint of the run, next to the first one."""
    copied(whole / "checkpoints" / "step_000001", tmp_path)
    return copied(whole / "checkpoints" / "step_000002", tmp_path)


def test_a_whole_checkpoint_has_a_manifest_of_every_file(checkpoint):
    assert problem(checkpoint, 2, ALONE) == ""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["step"] == 2 and manifest["ranks"] == 2
    names = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    assert names == manifest["files"].keys() and len(names) == 6
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


DAMAGE = {
    "a bit": (lambda c: flip(c / SHARD), f"{SHARD} is not what was written in step 2"),
    "the last byte": (lambda c: flip(c / SHARD, 1 - 1e-9), f"{SHARD} is not what was written"),
    "a cut file": (lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes()[:-1]), f"the size of {SHARD}"),
    "an empty file": (lambda c: (c / SHARD).write_bytes(b""), f"the size of {SHARD}"),
    "a missing file": (lambda c: (c / SHARD).unlink(), f"{SHARD} is missing"),
    "another step's file": (
        lambda c: shutil.copy(c.parent / "step_000001" / SHARD, c / SHARD),
        f"{SHARD} is not what was written in step 2",
    ),
    "another rank's file": (
        lambda c: shutil.copy(c / SHARD.replace("rank_1", "rank_0"), c / SHARD),
        f"{SHARD} is not ",
    ),
    "another step's checkpoint": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "step_000001", c)),
        "manifest.json is of step 1",
    ),
    "one more file": (lambda c: shutil.copy(c / SHARD, c / "zero_pp_rank_0_mp_rank_01.pt"), "is not in manifest.json"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "manifest.json is missing"),
    "half a manifest": (lambda c: (c / MANIFEST).write_bytes((c / MANIFEST).read_bytes()[:99]), "manifest.json"),
    "a list as manifest": (lambda c: (c / MANIFEST).write_text("[1]"), "manifest.json"),
    "a manifest of nothing": (lambda c: (c / MANIFEST).write_text('{"files": {}}'), "manifest.json"),
    "a manifest of texts": (
        lambda c: (c / MANIFEST).write_text(
            json.dumps({"format": 2, "step": 2, "files": dict.fromkeys(names(c), "x")})
        ),
        "is not that in manifest.json",
    ),
}


def names(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("*.pt"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(checkpoint, kind):
    damage, message = DAMAGE[kind]
    damage(checkpoint)
    assert message in problem(checkpoint, 2, ALONE)


# A run that is continued.

#: Everything that a continuation may change, at once.
OTHERWISE = (
    *("optimizer.micro_batch_tokens=200", "model.gradient_checkpointing=full", "checkpoint.keep=1", "log_rollouts=1"),
    *("deepspeed.offload=optimizer", "deepspeed.config={zero_optimization: {sub_group_size: 10000}}"),
)


def test_a_damaged_checkpoint_is_refused_by_all_ranks_and_the_one_before_is_offered_and_taken(whole, tmp_path):
    """Also with other settings that do not change the gradient, and with a damaged record."""
    folder = interrupted(whole, tmp_path / "run", step=2)
    flip(folder / "checkpoints" / "step_000002" / SHARD)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    message = refused(*STEPS, f"output={folder}", ranks=2)
    assert f"step_000002: {SHARD} is not what was written in step 2" in message
    assert "step_000001 is whole: resume=step_000001 continues from it" in message
    assert all(path.read_bytes() == content for path, content in before.items())

    metrics = folder / "metrics.jsonl"
    metrics.write_text("not json\n" + metrics.read_text())
    done = attempt(*STEPS, *OTHERWISE, "resume=step_000001", f"output={folder}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "from step 1, saved by 2 ranks" in done.stdout and f"{metrics}:1: " in done.stderr
    first, *rows = metrics.read_text().splitlines()
    assert first == "not json"
    for actual, expected in zip(map(json.loads, rows), lines(whole / "metrics.jsonl"), strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "sft/tokens"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-5), key
    assert RunFolder(folder).checkpoint_steps() == [3]
    assert not problem(folder / "checkpoints" / "step_000003", 3, ALONE)


def test_a_checkpoint_that_does_not_exist(whole, tmp_path):
    folder = RunFolder(interrupted(whole, tmp_path / "run", step=2))
    assert folder.resume_step("step_000001") == 1 and folder.resume_step("auto") == 2
    message = refused(*STEPS, "resume=step_000007", f"output={folder.path}")
    assert "'step_000007', which is not a checkpoint" in message and "step_000001, step_000002" in message
    assert "give auto, never" in refused(*STEPS, "resume=always", f"output={folder.path}")


class Planted:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(("name", "zipped"), [(SHARD.replace("1", "0"), True), ("moments_rank_0.pt", False)])
def test_nothing_in_a_checkpoint_is_executed(whole, tmp_path, name, zipped):
    """A hostile file, listed in the manifest with its right hash."""
    folder = interrupted(whole, tmp_path / "run", step=1)
    checkpoint, target = folder / "checkpoints" / "step_000001", tmp_path / "executed"
    if zipped:
        torch.save({"optimizer_state_dict": Planted(target), "in_use": "main", "idle": {}}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Planted(target)))
    target.unlink(missing_ok=True)
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, 1, ALONE)
    message = refused(*STEPS, f"output={folder}")
    assert "step_000001: the checkpoint cannot be read" in message and ("execute" in message) == zipped
    assert not target.exists()


# Limits of the disk.


def test_a_limit_on_the_size_of_files_names_the_last_checkpoint(whole, tmp_path):
    """Two ranks, of which each writes a shard of 5 MB."""
    folder = interrupted(whole, tmp_path / "run", step=2)
    message = refused(*STEPS, f"output={folder}", ranks=2, limits=("fsize=2000000",))
    assert "optim_states.pt cannot be written: " in message
    assert f"continues from the last checkpoint, {folder / 'checkpoints' / 'step_000002'}" in message
    assert RunFolder(folder).checkpoint_steps() == [1, 2] and not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(("limit", "file"), [(3_000_000, "final.partial"), (1000, "config.yaml")])
def test_a_limit_at_the_end_or_the_start(tmp_path, limit, file):
    out = tmp_path / "run"
    message = refused(*SHORT, "steps=1", "checkpoint.every=0", f"output={out}", limits=(f"fsize={limit}",))
    assert f"{out / file} cannot be written: the limit on the size of files" in message
    assert not (out / "final").exists()


def test_a_disk_without_room_for_the_next_checkpoint(whole, tmp_path):
    folder = interrupted(whole, tmp_path / "run", step=2)
    message = refused(*STEPS, f"output={folder}", limits=("free=9000000",))
    assert "the checkpoint of step 3 needs 0.01 GiB, but only 0.01 GiB are free" in message
    assert f"continues from the last checkpoint, {folder / 'checkpoints' / 'step_000002'}" in message
    assert lines(folder / "metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError(122, "Disk quota exceeded"), "the disk quota is used up"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the disk may be full"),
    ],
)
def test_every_writer_says_why(tmp_path, error, reason):
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be written: .*{reason}"), files.disk_errors(tmp_path):
        raise error
    with pytest.raises(KeyError), files.disk_errors(tmp_path):
        raise KeyError("a bug")


def test_a_full_disk_of_its_own(tmp_path, monkeypatch):
    """What torch and safetensors say where there is really no room."""
    import subprocess
    import sys

    program = f"""
import ctypes, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from upge.errors import StorageError
from upge.train.files import append, disk_errors, write_atomically
folder = Path({str(tmp_path)!r})
if ctypes.CDLL(None).mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=1m"):
    sys.exit(77)
big = torch.zeros(10**6)
writers = [
    lambda path: torch.save({{"a": big}}, path), lambda path: save_file({{"a": big}}, path),
    lambda path: write_atomically(path, "x" * 2**21), lambda path: append(path, "x" * 2**21),
]
for number, write in enumerate(writers):
    try:
        with disk_errors(folder):
            write(folder / str(number))
    except StorageError as error:
        print(number, error)
    for path in folder.iterdir():
        path.unlink()
"""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", program],
        capture_output=True,
        text=True,
    )
    if done.returncode and "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("no file system can be mounted here")
    actual = done.stdout.splitlines()
    assert done.returncode == 0 and len(actual) == 4, done.stderr
    assert all("cannot be written: the" in line and "full" in line for line in actual), actual


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_record_that_cannot_be_written_changes_nothing(tmp_path, code):
    record = ExitRecord(tmp_path)
    record.begin(ALONE)
    (tmp_path / "exit.json.partial").mkdir()  # in the way, as a full disk would be
    record.write(Ending(code, "done"))
    assert not (tmp_path / "exit.json").exists()


# Memory.


def test_a_full_memory_names_the_micro_batch_and_what_to_lower(tmp_path):
    out = tmp_path / "run"
    greedy = "algo.terms.sft.estimator.likelihood={_target_: tests.faults.parts.Greedy, first: 1}"
    keys = [greedy, "steps=3", "checkpoint.every=1", "optimizer.micro_batch_tokens=500"]
    message = refused(*SHORT, *keys, f"output={out}")
    assert "out of memory in a micro-batch of " in message and " tokens in " in message
    assert "lower optimizer.micro_batch_tokens (now 500)" in message and "model.gradient_checkpointing=full" in message
    assert f"continues from the last checkpoint, {out / 'checkpoints' / 'step_000001'}" in message


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(SimpleNamespace())
