"""A signal ends a step at once. The step is left out, the state before it is saved, and a resumed run loses nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import forked
from tests.running import SMALL, environment, lines, run, without_times

pytestmark = pytest.mark.slow

KEYS = (*SMALL, "steps=3", "algo=grpo", "checkpoint.every=0", "checkpoint.keep=1", "eval.every=2", "verify.workers=1")


def disturbed(out: Path, *keys: str, code: int, ranks: int = 1, **fault: object) -> str:
    """Runs with a fault in forked processes; returns what was printed."""
    variables = environment() | {"FAULT": json.dumps(fault)}
    arguments = (*KEYS, *keys, f"output={out}")
    vllm = "rollout.engine=vllm" in keys
    done = forked.run("tests.faults.disturbed", *arguments, environment=variables, ranks=ranks, vllm=vllm)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def assert_stopped(out: Path, step: int, code: int) -> None:
    """The run has stopped after `step` with its state and report."""
    ending = json.loads((out / "exit.json").read_text())
    assert (ending["code"], ending["step"]) == (code, step) and f"signal {code - 128}" in ending["reason"]
    recorded = lines(out / "metrics.jsonl") if step else []
    assert [row["step"] for row in recorded] == list(range(1, step + 1))
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == [f"step_{step:06d}"]
    assert (out / "report.html").is_file() == (step > 0) and not (out / "final").exists()


def assert_resumes(out: Path, whole: Path, *keys: str, ranks: int = 1) -> None:
    """Continued without a fault, the run equals the undisturbed run `whole`."""
    run(*KEYS, *keys, f"output={out}", ranks=ranks)
    for name in sorted(path.name for path in whole.glob("*.jsonl")):
        assert without_times(lines(out / name)) == without_times(lines(whole / name)), name
    weights = [AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (out, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert json.loads((out / "exit.json").read_text())["code"] == 0


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_what_is_in_progress_is_left_out_and_repeated(tmp_path: Path, engine: str) -> None:
    """The first step, a later one, and an evaluation, which is made when the run goes on; SIGHUP is as SIGTERM."""
    undisturbed, out, key = tmp_path / "whole", tmp_path / "run", f"rollout.engine={engine}"
    run(*KEYS, key, f"output={undisturbed}")
    if engine == "transformers":
        fault = {"kind": "signal_in_sampling", "step": 0, "number": signal.SIGHUP, "after": 0, "limit": 2}
        disturbed(out, key, code=129, **fault)
        assert_stopped(out, 0, 129)
    fault = {"kind": "signal_in_sampling", "step": 1, "number": signal.SIGTERM, "after": 3, "limit": 2}
    printed = disturbed(out, key, code=143, **fault)
    assert "stopped by signal 15; the state is saved" in printed
    assert_stopped(out, 1, 143)
    if engine == "transformers":
        disturbed(out, key, code=143, kind="signal_in_evaluation", number=signal.SIGTERM)
        assert [row["step"] for row in lines(out / "evaluations.jsonl")] == [0]
        assert_stopped(out, 2, 143)
    assert_resumes(out, undisturbed, key)


def test_an_update_ends_between_two_micro_batches(tmp_path: Path) -> None:
    """On both ranks, although only the second gets the signal; nothing of the step remains. So does sampling."""
    keys = ["steps=2", "eval.every=-1", "rollout.engine=transformers", "optimizer.micro_batch_tokens=64"]
    out, undisturbed = tmp_path / "run", tmp_path / "whole"
    run(*KEYS, *keys, f"output={undisturbed}", ranks=2)
    disturbed(out, *keys, code=143, ranks=2, kind="signal_in_update", rank=1, step=1, number=signal.SIGTERM)
    assert_stopped(out, 1, 143)
    fault = {"kind": "signal_in_sampling", "after": 2, "limit": 2, "rank": 1}
    disturbed(out, *keys, code=143, ranks=2, step=1, number=signal.SIGTERM, **fault)
    assert_stopped(out, 1, 143)
    assert_resumes(out, undisturbed, *keys, ranks=2)
