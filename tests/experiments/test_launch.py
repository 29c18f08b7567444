"""Several GPUs from one command, and what a machine with GPUs says if they are not used."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config import compose
from experiments.run import launch, workload
from experiments.run.dry_run import with_known_models
from upge.errors import ConfigError
from upge.models import loading
from upge.train.distributed import World
from upge.train.folder import FORMAT, RunFolder


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs of 80 GB, and a process that no launcher started."""

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_gpus_starts_torchrun(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    launch.on_gpus(["algo=hpt", "gpus=4", "output=a b"], False)
    ((program, line, environment),) = started
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    torchrun += ["--shutdown-timeout", "600"]
    assert program == sys.executable and line == [*torchrun, "-m", "experiments.run", "algo=hpt", "output=a b"]
    assert environment["PYTHONSAFEPATH"] == "1", "a user's own experiments/ must not hide ours"


def test_a_rank_of_torchrun_starts_nothing(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *call: pytest.fail("a launcher inside a launcher"))
    monkeypatch.setenv("RANK", "3")
    assert launch.on_gpus(["gpus=4", "steps=1"], False) == ["steps=1"]


def test_one_gpu_needs_no_launcher(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *call: pytest.fail("one process is enough"))
    assert launch.on_gpus(["gpus=1"], False) == []


def test_a_dry_run_plans_for_them() -> None:
    assert launch.on_gpus(["gpus=64", "algo=hpt"], True) == ["algo=hpt", "hardware.gpus=64"]


@pytest.mark.parametrize(
    ("text", "message"), [("0", "'0' is not a number"), ("all", "'all' is not"), ("9", "has 8 GPUs")]
)
def test_wrong_numbers(eight_gpus: None, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"gpus: .*{message}"):
        launch.on_gpus([f"gpus={text}"], False)


def test_gpus_on_a_machine_without() -> None:
    with pytest.raises(ConfigError, match="gpus: 2, but this machine has 0 GPUs; for ranks on the CPU start torchrun"):
        launch.on_gpus(["gpus=2"], False)


def composed(*arguments: str) -> Any:
    made = compose(["algo=grpo", "rollout.engine=vllm", *arguments])
    return with_known_models(made)[0]


def test_a_model_that_needs_several_gpus_says_how_many(eight_gpus: None) -> None:
    with pytest.raises(ConfigError) as caught:
        launch.check_gpus(composed("model=qwen2.5-math-7b"), ["model=qwen2.5-math-7b"])
    message = str(caught.value)
    count = int(message.partition("it needs ")[2].split()[0])
    assert 2 <= count <= 8 and f"gpus={count}`" in message and f"--nproc_per_node {count} " in message
    # It is the smallest: with one fewer the planner refuses.
    for gpus, fits in ((count, True), (count - 1, False)):
        assert launch._fits(composed("model=qwen2.5-math-7b"), gpus) == fits


def test_a_model_that_fits_on_one_only_gets_a_note(eight_gpus: None) -> None:
    (note,) = launch.check_gpus(composed("model=qwen2.5-math-1.5b"), [])
    assert note == "this run uses one of 8 GPUs; gpus=8 uses all of them"


def test_a_model_that_fits_nowhere_gets_the_planners_message(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="weights, gradients and AdamW take 71.1 GiB; take more GPUs"):
        launch.check_gpus(composed("model=llama-3.1-8b"), [])


class TwoMachines(World):
    """Two ranks whose folders have the same name on two machines."""

    def gather(self, value: Any) -> list[Any]:
        return [("first", True), ("second", value[1])]

    def broadcast(self, value: Any) -> Any:
        return "2026-11-29T00:00:00+00:00"


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_is_not_shared_is_refused(shared: bool, tmp_path: Path) -> None:
    if shared:
        (tmp_path / "run.json").write_text(json.dumps({"started": "2026-11-29T00:00:00+00:00", "format": FORMAT}))
    world = TwoMachines(1, 2, torch.device("cpu"))
    if shared:
        launch.check_shared(RunFolder(tmp_path), world)
    else:
        with pytest.raises(ConfigError, match=f"output: {tmp_path} on first is another folder than on second"):
            launch.check_shared(RunFolder(tmp_path), world)


@pytest.mark.parametrize("visible", [None, "", "0"])
def test_a_gpu_that_torch_cannot_use_is_refused(
    visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver must not become a run on the CPU; without visible devices the CPU is meant."""
    device, driver = tmp_path / "nvidiactl", tmp_path / "version"
    device.touch()
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 2024")
    monkeypatch.setattr(loading, "_NVIDIA_DEVICE", device)
    monkeypatch.setattr(loading, "_NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if visible == "":
        assert not loading.has_cuda()
        return
    with pytest.raises(ConfigError, match=r"NVIDIA GPU \(driver 550.54.15\) that torch .* cannot use"):
        workload.present()
