"""A run whose sampler differs from the trainer on purpose: what is told, what changes, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.test_run_ranks import interrupt
from tests.running import SMALL, lines, run, without_times

KEYS = ["algo=grpo", "steps=2", "checkpoint.every=1", "checkpoint.keep=0", "log_rollouts=1", "verify.workers=1"]
PLAIN = [*SMALL, *KEYS, "rollout.engine=transformers", "optimizer.lr=0", "eval.every=1"]
NOISY = [*PLAIN, "rollout.noise.weight_bits=4", "rollout.noise.top_p=0.9"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same run without and with noise, in which the weights stay as they are; and what it printed."""
    root = tmp_path_factory.mktemp("runs")
    for name, keys in (("plain", PLAIN), ("noisy", NOISY)):
        done = run(*keys, f"output={root / name}")
        (root / f"{name}.txt").write_text(done.stdout + done.stderr)
    return {name: root / name for name in ("plain", "noisy", "plain.txt", "noisy.txt")}


def test_noise_is_in_the_rollouts_and_not_in_the_evaluations(folders):
    plain, noisy = (lines(folders[name] / "metrics.jsonl") for name in ("plain", "noisy"))
    for exact, other in zip(plain, noisy, strict=True):
        assert exact["sampler/logprob_diff_mean"] < 1e-5 < 1e-3 < other["sampler/logprob_diff_mean"]
        assert exact["sampler/kl_k3"] < 1e-9 < 1e-5 < other["sampler/kl_k3"]
    evaluations = [without_times(lines(folders[name] / "evaluations.jsonl")) for name in ("plain", "noisy")]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]


def test_noise_is_told_in_output_metrics_and_report(folders):
    for name in ("plain", "noisy"):
        is_noisy = name == "noisy"
        printed, report = folders[f"{name}.txt"].read_text(), (folders[name] / "report.html").read_text()
        assert ("note: rollout.noise: the sampler of training rollouts differs" in printed) is is_noisy
        assert ("differed from the trainer on purpose: rollout.noise, weight_bits=4" in report) is is_noisy
        for row in lines(folders[name] / "metrics.jsonl"):
            told = {key: value for key, value in row.items() if key.startswith("noise/")}
            expected = {"noise/weight_bits": 4, "noise/bfloat16_logits": 0.0, "noise/top_p": 0.9}
            assert told == (expected if is_noisy else {})


def test_two_ranks_continue_with_the_same_noise(folders, tmp_path):
    interrupt(folders["noisy"], tmp_path / "run")
    run(*NOISY, f"output={tmp_path / 'run'}", ranks=2)
    rows = [lines(path / "rollouts" / "step_000002.jsonl") for path in (folders["noisy"], tmp_path / "run")]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    expected, actual = (lines(path / "metrics.jsonl")[-1] for path in (folders["noisy"], tmp_path / "run"))
    for key in ("reward/mean", "entropy", "sampler/logprob_diff_mean", "noise/weight_bits"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-5), key
