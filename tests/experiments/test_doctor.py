"""The check-up of a machine: it passes here on one rank and several, and each verdict depends on what it checks."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

import algorithms
from experiments.doctor import gradients, machine
from experiments.doctor.__main__ import _start_ranks, help_text, main, print_rows
from experiments.doctor.machine import Facts, Needs
from experiments.doctor.rows import Row, Verdict
from tests import forked
from tests.running import environment

ROOT = Path(__file__).parents[2]
GIB = 2**30
MACHINE = [
    *("GPU, driver", "GPU memory", "packages", "memory", "disk: output", "disk: hub cache", "disk: temporary files"),
    *("/dev/shm", "compiler"),
]
SAMPLER = ["log-probs", "sleep", "update", "refresh", "sampling"]
EVERY = [*MACHINE, "all-reduce", "model", "attention", "output head", "gradients", *SAMPLER]
#: A machine with two GPUs on which everything is fine.
GOOD = Facts(
    host="node-0",
    local_ranks=2,
    gpu="NVIDIA H100 80GB HBM3",
    gpu_total=80 * GIB,
    gpu_free=79 * GIB,
    has_driver=True,
    driver="580.65.06",
    cuda="13.0",
    versions={"torch": "2.14.0", "vllm": "0.33.0"},
    unfit=(),
    memory_total=512 * GIB,
    memory_free=500 * GIB,
    shared_memory=16 * GIB,
    compiler="/usr/bin/cc",
    has_headers=True,
    disks={name: ("/data", 400 * GIB) for name in ("output", "hub cache", "temporary files")},
)
NEEDS = Needs(30 * GIB, 0.4, 40 * GIB, {"output": 200 * GIB, "hub cache": 15 * GIB})


def read(folder: Path) -> dict[str, dict]:
    """Name → row of a doctor.json."""
    rows = json.loads((folder / "doctor.json").read_text())["rows"]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def problems(rows: dict[str, dict]) -> list[str]:
    assert all(bool(row["advice"]) == (row["verdict"] == "problem") and row["measured"] for row in rows.values())
    return [name for name, row in rows.items() if row["verdict"] == "problem"]


def check_up(folder: Path, *arguments: str, ranks: int = 1) -> dict[str, dict]:
    """The rows of a check-up that finds no problem."""
    environ = environment() | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    given = ("experiments.doctor", f"output={folder}", *arguments)
    vllm = "rollout.engine=vllm" in arguments
    done = forked.run(*given, environment=environ, ranks=ranks, vllm=vllm, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("no problems; wrote ") == 1
    rows = read(folder)
    assert not problems(rows)
    return rows


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_no_problem_on_the_cpu(tmp_path, ranks):
    rows = check_up(tmp_path / "out", "prompts=2", "group_size=3", "rollout.engine=transformers", ranks=ranks)
    assert list(rows) == EVERY
    assert rows["all-reduce"]["details"]["ranks"] == ranks
    assert ("bus_bandwidth" in rows["all-reduce"]["details"]) == (ranks > 1)
    assert 0 < rows["gradients"]["details"]["errors"]["grpo"] < 1e-4
    assert {*rows["gradients"]["details"]["errors"]} == {*gradients.checked()}
    assert rows["sampling"]["details"]["tokens"] == ranks * 2 * 3 * 32
    assert rows["refresh"]["details"]["mean_of_old_weights"] > 100 * rows["refresh"]["details"]["mean"]
    record = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert record["ranks"] == ranks and record["versions"]["torch"] and record["seconds"]["sampler"] > 0


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_problem_with_vllm(tmp_path, ranks):
    rows = check_up(tmp_path, "checks=sampler", "prompts=1", "rollout.engine=vllm", ranks=ranks)
    assert list(rows) == ["model", *SAMPLER]
    assert rows["sampling"]["details"]["engine"] == "vllm"


@pytest.mark.slow
def test_random_weights_of_a_shape(tmp_path):
    """A folder that has only a config.json, large enough that a smaller model stands for it in the gradients."""
    config = json.loads((ROOT / "experiments/models/qwen2.5-math-7b/config.json").read_text())
    config |= {"num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 512, "vocab_size": 80_000}
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(config))
    model = (f"model={tmp_path / 'shape'}", "model.dtype=float32", "prompts=1", "group_size=2")
    rows = check_up(tmp_path / "out", *model, "checks=gradients,sampler", "rollout.engine=transformers")
    assert "random weights: " in rows["model"]["measured"]
    assert "a random model with 2 such layers" in rows["gradients"]["measured"]
    assert not list((tmp_path / "shape").glob("*.safetensors"))


# Broken things.

#: What is broken → the rows that must be problems.
EXPECTED = {
    "wrong_sum": ["all-reduce"],
    "sequences_mixed": ["attention"],
    "temperature_dropped": ["output head"],
    "entropy_slope_dropped": ["output head"],
    "gradient_doubled": ["gradients"],
    "weights_ignored": ["refresh"],
    "logprob_wrong": ["log-probs", "refresh"],
    "updates_ignored": ["refresh"],
    "engine_gone": ["sampler"],
    "disk_full": ["disk: output"],
    "old_driver": ["ranks", "GPU, driver"],
    "no_model": ["model"],
}


def broken(folder: Path, *names: str, ranks: int = 1, code: int = 0) -> str:
    environ = environment() | {"OMP_NUM_THREADS": "1"}
    done = forked.run("tests.doctor_ranks", str(folder), *names, environment=environ, ranks=ranks, timeout=400)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The check-ups of everything that is broken on one rank."""
    path = tmp_path_factory.mktemp("broken")
    broken(path, *EXPECTED)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_broken_is_a_problem(folder, name):
    rows = read(folder / name)
    assert problems(rows) == EXPECTED[name]
    assert (folder / f"{name}.code").read_text() == "1"


@pytest.mark.slow
def test_messages_of_broken_things(folder):
    assert "every rollout would be off-policy" in read(folder / "weights_ignored")["refresh"]["advice"]
    assert "updates do not change the model" in read(folder / "updates_ignored")["refresh"]["advice"]
    errors = read(folder / "gradient_doubled")["gradients"]["details"]["errors"]
    assert {*errors} == {*gradients.checked()} and all(e == pytest.approx(1.0, abs=0.01) for e in errors.values())


def test_after_an_error_the_other_checks_still_run(folder):
    rows = read(folder / "engine_gone")
    assert list(rows) == [*MACHINE, "model", "attention", "output head", "sampler"]
    assert rows["sampler"]["measured"] == "RuntimeError: the engine is gone"
    assert rows["sampler"]["details"]["message"].endswith("more lines")
    rows = read(folder / "no_model")
    assert "no/such-model" in rows["model"]["measured"]
    assert rows["kernels"]["verdict"] == rows["gradients"]["verdict"] == "not here"


def test_an_old_driver_is_reported_and_not_replaced_by_the_cpu(folder):
    rows = read(folder / "old_driver")
    assert "set CUDA_VISIBLE_DEVICES= to run on the CPU" in rows["ranks"]["measured"]
    assert "driver 470.82" in rows["GPU, driver"]["measured"]
    assert "needs driver 580 or newer" in rows["GPU, driver"]["advice"]
    assert rows["kernels"]["measured"] == "the ranks are not connected" and "all-reduce" not in rows


def test_errors_on_one_rank_and_wrong_sums_on_two(tmp_path):
    text = broken(tmp_path, "last_rank_fails", "wrong_sum", ranks=2)
    rows = read(tmp_path / "last_rank_fails")
    assert problems(rows) == ["kernels (rank 1)"] and "all-reduce" in rows
    assert "rank 1: kernels: RuntimeError: no kernel image" in text
    assert problems(read(tmp_path / "wrong_sum")) == ["all-reduce"]


def test_a_rank_that_waits_is_a_problem(tmp_path):
    """The process of rank 0 ends itself, with what was found before in doctor.json."""
    broken(tmp_path, "last_rank_waits", ranks=2, code=1)
    rows = read(tmp_path / "last_rank_waits")
    assert problems(rows) == ["kernels"] and rows["kernels"]["measured"] == "it did not end within 5 s"
    assert rows["all-reduce"]["verdict"] == "ok"


def test_every_algorithm_is_compared():
    assert {name.split(":")[0] for name in gradients.shipped()} == {
        name for name in algorithms.names() if not getattr(algorithms.load(name), "supports", None)
    }


# The rows of a machine, from facts.


def changed(**changes: object) -> list[Facts]:
    return [GOOD, dataclasses.replace(GOOD, **changes)]


def of(facts: list[Facts], needs: Needs = NEEDS) -> dict[str, Row]:
    return {row.name: row for row in machine.rows(facts, needs)}


def test_a_good_machine_has_no_problem():
    rows = of([GOOD, GOOD])
    assert list(rows) == MACHINE and all(row.verdict is Verdict.OK for row in rows.values())
    assert rows["GPU, driver"].measured == "NVIDIA H100 80GB HBM3 (2 ranks); driver 580.65.06, torch for CUDA 13.0"


@pytest.mark.parametrize(
    ("name", "changes", "advice"),
    [
        ("GPU, driver", {"gpu": "", "driver": "535.1"}, "CUDA 13.0 needs driver 580 or newer"),
        ("GPU, driver", {"gpu": "", "cuda": ""}, "install torch's CUDA build"),
        ("GPU, driver", {"gpu": ""}, "check CUDA_VISIBLE_DEVICES"),
        ("GPU memory", {"gpu_free": 61 * GIB}, "other processes hold 19 GiB"),
        ("packages", {"versions": {"torch": "2.14.0", "vllm": "0.32.0"}}, "other versions of vllm"),
        ("memory", {"memory_free": 79 * GIB}, "give node-0 more memory"),
        ("/dev/shm", {"shared_memory": 64 * 2**20}, "--shm-size=16g"),
        ("/dev/shm", {"shared_memory": None}, "--shm-size=16g"),
        ("compiler", {"compiler": ""}, "Triton needs both"),
        ("compiler", {"has_headers": False}, "python3-dev"),
        ("disk: output", {"disks": GOOD.disks | {"output": ("/small", 199 * GIB)}}, "checkpoint.keep"),
        ("disk: hub cache", {"disks": GOOD.disks | {"hub cache": ("/small", 14 * GIB)}}, "set HF_HOME"),
    ],
)
def test_a_fault_of_one_rank_is_a_problem(name, changes, advice):
    rows = of(changed(**changes))
    assert rows[name].verdict is Verdict.PROBLEM and advice in rows[name].advice
    others = {other for other, row in rows.items() if row.verdict is Verdict.PROBLEM} - {name}
    assert not others


def test_packages_outside_their_ranges(monkeypatch):
    requirements = ["torch>=99", 'rich>=14; extra == "report"', 'pytest>=99; extra == "dev"', "not-installed>=1"]
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: requirements)
    (unfit,) = machine.unfit_packages()
    assert unfit.startswith("torch ") and unfit.endswith(" (needs >=99)")
    row = of([dataclasses.replace(GOOD, unfit=(unfit,))])["packages"]
    assert row.verdict is Verdict.PROBLEM and unfit in row.advice


def test_a_machine_without_gpus():
    bare = dataclasses.replace(GOOD, gpu="", has_driver=False, driver="", compiler="", shared_memory=None)
    rows = of([bare])
    expected = {"GPU, driver", "GPU memory", "/dev/shm", "compiler"}
    assert {name for name, row in rows.items() if row.verdict is Verdict.NOT_HERE} == expected
    assert not [row for row in rows.values() if row.verdict is Verdict.PROBLEM]


# The command.


def test_the_table_fits_and_says_what_to_do():
    console = Console(width=80, file=io.StringIO())
    print_rows([Row("a", Verdict.OK, "x " * 80), Row("b", Verdict.PROBLEM, "bad", "do [this]")], console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "b: do [this]" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checks=kernel", "checks: found ['kernel']; did you mean 'kernels'?"),
        ("checks=[]", "checks: found []; give some of machine"),
        ("prompts=0", "prompts: found 0"),
        ("gpus=two", "gpus: 'two' is not a number of GPUs"),
        ("optimizer.lr=1", "optimizer.lr: unknown key"),
        ("model.overrides.rope=1", "model.overrides.rope: Qwen2Config has no such key"),
        ("steps", "'steps' is not of the form key=value"),
    ],
)
def test_bad_input(argument, message, capsys):
    assert main([argument]) == 2
    assert message in capsys.readouterr().err


def test_gpus_starts_torchrun(monkeypatch):
    started: list = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    _start_ranks(["model=tiny", "gpus=2"])
    ((_, line, _),) = started
    assert line[line.index("--nproc_per_node") + 1] == "2"
    assert line[-3:] == ["-m", "experiments.doctor", "model=tiny"]


def test_help_names_every_key():
    text = help_text()
    for name in ("checks", "random", "time_limit", "model.overrides", "rollout.engine", "checkpoint.keep"):
        assert f"\n  {name}=" in text
    assert max(map(len, text.splitlines())) <= 120
