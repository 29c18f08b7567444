"""Runs and evaluations whose verifier is broken say so, stop in time, and continue once it is corrected."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.run.__main__ import main
from tests.evaluating import SMALL as SMALL_EVALUATION
from tests.evaluating import run as evaluate
from tests.running import SMALL, lines, run, without_times
from tests.upge.train.test_collect import WRONG, FakeModel, algorithm, collector, examples
from upge.config import from_tree
from upge.train.config import RunConfig
from upge.train.metrics import Recorder
from upge.train.sample import Trajectory
from upge.train.verdicts import StepVerdicts
from upge.verify import Verdict, VerifierError

PATIENT = ("verify.workers=1", "verify.time_limit=100")
TINY = (*SMALL, *PATIENT, "model=tiny", "rollout.engine=transformers", "eval.every=-1", "log_rollouts=0")
#: Works unless the file `broken` lies beside it; `half` fails on every response with an even number of characters.
REWARDS = """
from pathlib import Path
def sometimes(response, answer, prompt=None):
    if (Path(__file__).parent / "broken").exists():
        return 1 / 0
    return float(answer in response)
def crashes(response, answer, prompt=None):
    return 1 / 0
def half(response, answer, prompt=None):
    return None if len(response) % 2 == 0 else 1.0
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module `fault_rewards` on the import path."""
    (tmp_path / "fault_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_one_broken_verifier_of_several_is_counted_and_named(rewards: Path) -> None:
    """The reward of the others still counts; where they decide on success, it is known."""
    out = rewards / "run"
    text = "verify.verifier=number as correct + 0.2*fault_rewards.crashes as style"
    settings = [*TINY, "steps=1", "algo=gdpo", text, "verify.success=correct", "log_rollouts=1", f"output={out}"]
    done = run(*settings, code=2)
    assert "16 of 16 verdicts failed (16 errors; the first: fault_rewards.crashes: ZeroDivisionError" in done.stderr
    done = run(*settings, "stop.verifier_errors=1")
    assert done.stderr.count("Traceback") == 1 and "return 1 / 0\n" in done.stderr
    (metrics,) = lines(out / "metrics.jsonl")
    assert (metrics["verify/errors"], metrics["reward/style"]) == (16, 0.0)
    assert metrics["reward/correct"] == metrics["pass_rate"] == metrics["reward/mean"]
    rows = lines(out / "rollouts" / "step_000001.jsonl")
    assert all(row["status"] == "error" and row["rewards"]["style"] == 0.0 for row in rows)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_verifier_stops_the_run_before_the_update(ranks: int, rewards: Path) -> None:
    out = rewards / "run"
    settings = [*TINY, "steps=2", "verify.verifier=fault_rewards.crashes", f"output={out}"]
    done = run(*settings, code=2, ranks=ranks)
    assert done.stderr.count("Traceback") == 1 and "return 1 / 0\n" in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert message.startswith("error: stop.verifier_errors: step 1: 16 of 16 verdicts failed (16 errors; the first: ")
    assert "ZeroDivisionError: division by zero" in message and "continues it" in done.stdout
    assert not (out / "metrics.jsonl").exists() and not (out / "final").exists()
    rows = lines(out / "rollouts" / "step_000001.jsonl")
    assert len(rows) == 16 and {row["detail"] for row in rows} == {"ZeroDivisionError: division by zero"}
    assert {row["status"] for row in rows} == {"error"}


def test_a_run_continues_once_the_verifier_is_corrected(rewards: Path) -> None:
    """It equals a run without the interruption: no update was made with the failed verdicts."""
    settings = [*TINY, "steps=2", "verify.verifier=fault_rewards.sometimes"]
    run(*settings, f"output={rewards / 'whole'}")
    (rewards / "broken").touch()
    run(*settings, f"output={rewards / 'stopped'}", code=2)
    (rewards / "broken").unlink()
    done = run(*settings, "stop.verifier_errors=0.6", "verify.time_limit=99", f"output={rewards / 'stopped'}")
    assert "continuing" in done.stdout and "from step 0" in done.stdout
    whole, stopped = (without_times(lines(rewards / name / "metrics.jsonl")) for name in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 2


def test_errors_below_the_limit_are_counted_and_recorded_in_every_step(rewards: Path) -> None:
    out = rewards / "run"
    settings = ["steps=3", "verify.verifier=fault_rewards.half", "stop.verifier_errors=1", f"output={out}"]
    done = run(*TINY, *settings)
    metrics = lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3] and sum(row["verify/errors"] for row in metrics) > 0
    for row in metrics:
        file = out / "rollouts" / f"step_{row['step']:06d}.jsonl"
        failed = [line for line in lines(file) if line["status"] == "error"] if file.exists() else []
        assert len(failed) == row["verify/errors"]
        assert all("the verifier returned None" in line["detail"] for line in failed)
    assert done.stderr.count("the verifier returned None") == 1


def test_an_evaluation_counts_and_tells_errors(rewards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, name = rewards / "eval", "fault_rewards.crashes"
    chosen = ["suite.skip=[long_sums]", "suite.benchmarks.sums.samples=1", f"suite.benchmarks.sums.verifier={name}"]
    evaluate(*SMALL_EVALUATION, *PATIENT, *chosen, f"output={out}")
    captured = capsys.readouterr()
    assert captured.err.count("Traceback") == 1 and "return 1 / 0" in captured.err
    assert "note: sums: the verifier failed on 10 and exceeded its time on 0 of 10 responses" in captured.out
    scores = json.loads((out / "scores.json").read_text())
    assert scores["benchmarks"]["sums"]["errors"] == 10
    assert {row["detail"] for row in lines(out / "samples" / "sums.jsonl")} == {"ZeroDivisionError: division by zero"}


def test_an_evaluation_during_training_counts_and_tells_errors(rewards: Path) -> None:
    out = rewards / "run"
    settings = ["steps=0", "eval.every=0", "verify.verifier=fault_rewards.crashes", f"output={out}"]
    done = run(*TINY, *settings)
    (line,) = lines(out / "evaluations.jsonl")
    assert (line["errors"], line["timeouts"]) == (18, 0)
    assert "18 verifier errors and 0 timeouts count as wrong" in done.stdout and done.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ("verify.workers=1000000000", "verify.workers: found 1000000000"),
        ("verify.workers=1000", "this machine has"),
        ("verify.time_limit=1e300", "verify.time_limit: found 1e+300"),
        ("verify.memory_limit=1e300", "verify.memory_limit: found 1e+300"),
        ("verify.environment=[NO_SUCH_NAME]", "verify.environment: found 'NO_SUCH_NAME'"),
        ("verify.environment=NO_SUCH_NAME", "verify.environment: found 'NO_SUCH_NAME'"),
        ("stop.verifier_errors=1.5", "stop.verifier_errors: found 1.5"),
        ("stop.verifier_errors=-1", "stop.verifier_errors: found -1"),
    ],
)
def test_bounds_of_the_settings(
    setting: str, fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.__main__.connect", lambda: pytest.fail("the input was not refused"))
    monkeypatch.setattr("upge.verify.pool.os.cpu_count", lambda: 8)
    assert main([*TINY, setting, f"output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fragment in error, error
    assert not (tmp_path / "run").exists()


def rollout(status: str) -> Trajectory:
    return Trajectory(0, 0, (1,), (2,), 0.0, False, (-1.0,), True, status, detail=f"the reason of {status}")


@pytest.mark.parametrize(
    ("ok", "errors", "timeouts", "limit", "stops"),
    [
        (2, 2, 0, 0.5, False),
        (2, 3, 0, 0.5, True),
        (2, 2, 1, 0.5, True),
        (0, 0, 4, 0.5, True),
        (0, 4, 0, 1.0, False),
        (0, 0, 0, 0.0, False),
        (100, 1, 0, 0.0, True),
    ],
)
def test_the_share_that_stops_a_run(ok: int, errors: int, timeouts: int, limit: float, stops: bool) -> None:
    rollouts = [rollout("ok")] * ok + [rollout("timeout")] * timeouts + [rollout("error")] * errors
    verdicts = StepVerdicts.of(rollouts)
    count = {"verify/timeouts": timeouts, "verify/errors": errors} if rollouts else {}
    assert verdicts.metrics() == count and (verdicts + verdicts).count == 2 * len(rollouts)
    expected = pytest.raises(VerifierError) if stops else contextlib.nullcontext()
    with expected as caught:
        verdicts.check(limit, 7)
    if stops:
        assert f"step 7: {errors + timeouts} of {len(rollouts)} verdicts failed" in str(caught.value)
        assert f"the reason of {'error' if errors else 'timeout'}" in str(caught.value)


class Broken(FakeModel):
    """Its verifier fails on every response to a prompt that the model never solves."""

    def decode(self, responses) -> list[str]:
        return [f"{response[0]} {response[-1]}" for response in responses]

    def submit(self, item) -> Future[Verdict]:
        prompt, reward = map(int, item.response.split())
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(0.0, "error", "broken") if prompt % 3 == WRONG else Verdict(float(reward)))
        return verdict


def test_failures_on_redrawn_prompts_count_and_are_recorded() -> None:
    """Such prompts have no signal, so dynamic sampling replaces them, and the step's trajectories hide the failures."""
    model, data = Broken(), examples(30)
    actual, metrics, verdicts, _ = collector(algorithm("rollouts", rounds=10), data, model).collect(0)
    wrong = [i for prompts in model.rounds for i in prompts if i % 3 == WRONG]
    assert {t.status for t in actual} == {"ok"} and wrong
    assert verdicts.count == 2 * metrics["sampling/prompts"] and verdicts.first_error == "broken"
    assert [t.example for t in verdicts.failed] == [i for i in wrong for _ in range(2)]
    written: dict[tuple[str, int], list] = {}
    folder = SimpleNamespace(write_rows=lambda name, step, rows: written.update({(name, step): list(rows)}))
    recorder = Recorder(from_tree(RunConfig, {}), data, model, folder)
    recorder.record_failed(1, actual, verdicts.failed)
    (rows,) = written.values()
    assert [*written] == [("rollouts", 1)] and {(row["detail"], row["index"]) for row in rows} == {("broken", -1)}
    assert len(rows) == 2 * len(wrong)
