"""Numbers that are not finite stop a run before it saves anything, and no reduction hides them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.report.folder import read_run
from experiments.report.series import Series, _with_rest
from tests import forked
from tests.running import SMALL, environment, lines, run
from upge.estimate import TermRecord, summarise
from upge.stateful import MetaGradient
from upge.train.metrics import MetricSums, nonfinite

NAN = math.nan
QUIET = (*SMALL, "eval.every=-1", "verify.workers=1", "checkpoint.every=1")


def ending(out: Path) -> dict:
    return json.loads((out / "exit.json").read_text())


@pytest.mark.parametrize(("engine", "lr"), [("transformers", "1e30"), ("transformers", "1e12")])
def test_a_ruined_policy_is_neither_saved_nor_exported(tmp_path: Path, engine: str, lr: str) -> None:
    """The gradient of the only step is finite, and nothing is sampled after it."""
    out = tmp_path / "run"
    keys = ["algo=grpo", "steps=1", f"rollout.engine={engine}", f"optimizer.lr={lr}", f"output={out}"]
    done = run(*QUIET, *keys, code=3)
    assert "not finite" in done.stdout and "Traceback" not in done.stderr
    assert not (out / "final").exists() and not [*(out / "checkpoints").glob("step_*")]
    assert ending(out) == ending(out) | {"code": 3, "step": 1}


def test_a_good_checkpoint_is_kept(tmp_path: Path) -> None:
    """The second of two stages ruins the weights of both ranks; the checkpoint of the first stage stays."""
    out = tmp_path / "run"
    keys = ["algo=sft_then_grpo", "steps=2", "algo.stages.reinforce.lr_factor=1e36", "rollout.engine=transformers"]
    done = run(*QUIET, *keys, f"output={out}", code=3, ranks=2)
    assert "there is the checkpoint of step 1" in done.stdout
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_000001"]
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [1, 2] and ending(out)["code"] == 3


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_an_engine_recovers_with_good_weights(tmp_path: Path, name: str) -> None:
    file = tmp_path / "found.json"
    variables = environment()
    done = forked.run("tests.faults.engines", name, str(file), environment=variables, vllm=name == "vllm")
    assert done.returncode == 0, done.stderr[-5000:]
    actual = json.loads(file.read_text())
    for kind in ("nan", "huge"):
        assert actual[kind].startswith("NonFiniteError: the sampler's log-probs are not finite"), actual[kind]
        assert "call load_weights" in actual[f"refused after {kind}"]
    if name == "vllm":
        assert actual["failed"] == "EngineError: the vLLM engine failed (ValueError: the engine has died)"
    for kind in [key for key in actual if key.startswith("after ")]:
        assert actual[kind] == actual["before"], kind


@pytest.mark.slow
def test_a_vllm_engine_is_restarted_once(tmp_path: Path) -> None:
    """The run is that of a sound engine; when the engine fails again, the run stops with its state saved."""
    keys = (*SMALL, "algo=grpo", "steps=2", "eval.every=-1", "verify.workers=1", "rollout.engine=vllm")
    actual = {}
    for name, times, code in (("once", 1, 0), ("twice", 2, 1)):
        fault = json.dumps({"kind": "failing_engine", "step": 1, "times": times})
        arguments = (*keys, f"output={tmp_path / name}")
        variables = environment() | {"FAULT": fault}
        actual[name] = forked.run("tests.faults.disturbed", *arguments, environment=variables, vllm=True)
        assert actual[name].returncode == code, actual[name].stderr[-5000:]
        assert (
            "note: the vLLM engine failed (RuntimeError: the engine has died); it is restarted" in actual[name].stdout
        )
    assert ending(tmp_path / "twice") == ending(tmp_path / "twice") | {"code": 1, "step": 1}
    assert "failed (RuntimeError: the engine has died) again" in actual["twice"].stdout
    assert [path.name for path in (tmp_path / "twice" / "checkpoints").glob("step_*")] == ["step_000001"]
    run(*keys, f"output={tmp_path / 'twice'}")
    rows = [lines(tmp_path / name / "metrics.jsonl") for name in ("once", "twice")]
    assert [row["reward/mean"] for row in rows[0]] == [row["reward/mean"] for row in rows[1]]
    assert rows[0][1]["loss"] == rows[1][1]["loss"] and rows[0][1]["sampler/logprob_diff_max"] < 1e-3


# Reductions.


def record(*weights: float) -> TermRecord:
    column = torch.tensor(weights)
    return TermRecord(column, column, 0.0, 1, 0, None, None, {0: float(column.abs().sum())})


def test_sums_of_metrics_keep_nan() -> None:
    parts = [MetricSums(gap_max=0.1, gap_sum=0.1, gap_tokens=1), MetricSums(gap_max=NAN, gap_sum=NAN, gap_tokens=1)]
    for order in (parts, parts[::-1]):
        metrics = MetricSums.total(order).metrics()
        assert math.isnan(metrics["sampler/logprob_diff_max"]) and math.isnan(metrics["sampler/logprob_diff_mean"])
    terms = summarise({"rl": [record(1.0, 2.0, 3.0), record(NAN, 1.0)]})
    hidden = [name for name, value in terms.items() if "weight" in name or "effective" in name if not math.isnan(value)]
    assert not hidden


def test_a_stateful_gate_keeps_nan() -> None:
    gate = MetaGradient("mu", start=0.5, low=0.1, high=0.9)
    assert math.isnan(gate.updated(NAN, dict.fromkeys(gate.wants, 1.0)))


def test_a_metric_that_is_not_finite_is_named() -> None:
    class Report:
        skipped = 0

    metrics = {"step": 3, "loss": 0.1, "state/mu_utility_slope": NAN}
    assert nonfinite(metrics, Report()) == ""
    for value in (NAN, math.inf):
        assert nonfinite(metrics | {"entropy": value}, Report()) == "the metric entropy is not finite"
    Report.skipped = 1
    assert nonfinite(metrics | {"loss": NAN}, Report()) == "", "a skipped update is counted instead"


def test_a_report_names_what_was_not_finite(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    rows = [{"step": 1, "loss": 0.5, "entropy": None}, {"step": 2, "loss": None, "entropy": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("entropy (2 of 2 steps), loss (1 of 2 steps)" in note for note in read_run(tmp_path).notes)


def test_the_rest_of_a_time_that_is_missing_is_missing() -> None:
    parts, total = [Series("time/train", (1, 2), (1.0, 1.0))], Series("time/total", (1, 2), (3.0, NAN))
    (rest,) = _with_rest(parts, total)[1:]
    assert rest.values[0] == 2.0 and math.isnan(rest.values[1])
