"""Disk space of a run: what it writes at most at one time, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from experiments.config import MODELS, compose
from experiments.run import disk
from experiments.run.disk import Disk
from experiments.run.dry_run import plan
from experiments.run.memory_check import check_fits, outlook
from experiments.run.workload import GIB, planned
from upge.errors import ConfigError
from upge.train.config import HardwareConfig

PARAMETERS = 887_808  # of tiny
ONE, MODEL = 12 * PARAMETERS, 4 * PARAMETERS


def results(*arguments: str) -> Disk:
    return outlook(compose(list(arguments)), planned(HardwareConfig())).disk


@pytest.mark.parametrize(
    ("arguments", "peak"),
    [
        (["steps=100", "checkpoint.every=50"], 2 * ONE + MODEL),
        (["steps=300", "checkpoint.every=50"], 2 * ONE + MODEL),  # before the third is written the first is removed
        (["steps=300", "checkpoint.every=50", "checkpoint.keep=1"], 2 * ONE),  # the newest stays until then
        (["steps=300", "checkpoint.every=50", "checkpoint.keep=3"], 3 * ONE + MODEL),
        (["steps=300", "checkpoint.every=50", "checkpoint.keep=0"], 6 * ONE + MODEL),
        (["steps=310", "checkpoint.every=50", "checkpoint.keep=0"], 7 * ONE + MODEL),  # one more after the last step
        (["steps=10", "checkpoint.every=50"], ONE + MODEL),
        (["steps=100", "checkpoint.every=0"], ONE + MODEL),  # if it is stopped
        (["steps=100", "eval.keep_best=true"], 2 * ONE + 3 * MODEL),
        (["steps=100", "algo=relift"], 2 * (ONE + 8 * PARAMETERS) + MODEL),  # a second set of moments
        (["steps=100", "algo=ppo"], 4 * ONE + MODEL),  # a critic of the policy's size; tiny ties its embeddings
    ],
)
def test_the_fullest_moment_by_hand(arguments, peak):
    assert results(*arguments).peak == peak


def test_the_papers_model_needs_two_checkpoints_of_85_gib_and_its_weights():
    composed = compose(["recipe=hpt-qwen2.5-math-7b", f"model.path={MODELS / 'qwen2.5-math-7b'}"])
    seven = outlook(composed, planned(composed.config.hardware)).disk
    assert seven.checkpoint == 12 * 7_615_616_512 and seven.peak == 2 * seven.checkpoint + 2 * 7_615_616_512


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of every disk."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=size, total=2**50))

    return set_free


def test_a_full_disk_is_refused_at_the_start_and_in_a_dry_run(free, tmp_path):
    command = [f"output={tmp_path / 'run'}", "checkpoint.keep=3", "checkpoint.every=10"]
    free(3 * ONE + MODEL)
    assert check_fits(compose(command)) == ()
    free(3 * ONE + MODEL - 1)
    for refuse in (check_fits, plan):
        with pytest.raises(ConfigError, match="output: ") as caught:
            refuse(compose(command))
        message = str(caught.value)
        assert str(tmp_path / "run") in message and "up to 3 checkpoints" in message
        assert "checkpoint.keep=1 instead of 3" in message and "checkpoint.every=0 instead of 10" in message


def test_a_folder_that_is_not_on_a_disk_is_refused():
    with pytest.raises(ConfigError, match=r"^output: /proc/\S* is not on a disk, so it cannot hold a run; give"):
        check_fits(compose(["output=/proc/self/run"]))


@pytest.mark.parametrize("fix", ["checkpoint.keep=1", "checkpoint.every=0"])
def test_what_is_refused_fits_after_the_fix_that_is_named(free, fix, tmp_path):
    free(2 * ONE)
    command = [f"output={tmp_path / 'run'}", "checkpoint.keep=3", "checkpoint.every=10"]
    with pytest.raises(ConfigError):
        check_fits(compose(command))
    assert check_fits(compose([*command, fix])) == ()


def test_what_a_run_has_written_already_counts_as_free_and_as_a_checkpoint(free, tmp_path):
    old = tmp_path / "run" / "checkpoints" / "step_000010"
    old.mkdir(parents=True)
    (old / "states.pt").write_bytes(bytes(ONE))
    free(ONE + MODEL)
    command = [f"output={tmp_path / 'run'}", "steps=20", "checkpoint.every=0"]
    assert results(*command).peak == 2 * ONE + MODEL
    assert check_fits(compose(command)) == ()
    free(ONE + MODEL - 1)
    with pytest.raises(ConfigError, match="output"):
        check_fits(compose(command))


def test_another_machines_disk_is_a_note(free, tmp_path):
    free(GIB)
    command = [f"output={tmp_path / 'run'}", "hardware.gpus=8", "hardware.memory=79", "model.dtype=bfloat16"]
    text = plan(compose([*command, f"model={MODELS / 'qwen2.5-math-1.5b'}"]))
    assert "note: output: " in text and "1.0 GiB are free here; the run's machine needs as much" in text
    assert "disk, GiB:" in text and "at most, with 2 checkpoints at one time" in text
