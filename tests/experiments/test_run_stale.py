"""Runs with stale and replayed rollouts: exact ages, and continued runs that are the undisturbed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.experiments.test_run_ranks import interrupt
from tests.running import SMALL, lines, run, without_times

KEYS = ["steps=3", "eval.every=-1", "checkpoint.every=1", "checkpoint.keep=0", "log_rollouts=1", "verify.workers=1"]
REPLAYING = [*SMALL, *KEYS, "rollout.engine=transformers", "algo=exgrpo", "algo.replay.start=0"]
SETTINGS = [*REPLAYING, "rollout.lag=1", "optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(*SETTINGS, f"output={folder}")
    return folder


def test_denominators_are_of_the_policy_that_sampled(whole):
    """The first step is on-policy. From the second on the trainer, with the weights of the step before, has the
    sampler's log-probs, and the ratio to them is no longer 1."""
    rows = lines(whole / "metrics.jsonl")
    assert all(row["sampler/logprob_diff_max"] < 1e-4 for row in rows)
    assert "rl/extreme_ratio_share" not in rows[0] and rows[2]["rl/extreme_ratio_share"] > 0
    assert rows[0]["replay/share"] == 0 and rows[2]["replay/share"] > 0 and rows[2]["replay/age"] >= 1
    assert rows[2]["replayed/tokens"] > 0


@pytest.mark.slow
def test_vllm_samples_with_earlier_weights_and_replays(tmp_path):
    """Its log-probs are those of the trainer with the weights of the step before, and not of the present policy."""
    settings = [key for key in SETTINGS if key != "rollout.engine=transformers"]
    run(*settings, "rollout.engine=vllm", f"output={tmp_path / 'run'}")
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(row["sampler/logprob_diff_max"] < 1e-4 for row in rows)
    assert "behavior/kl_k3" not in rows[0] and all(row["behavior/kl_k3"] > 1e-4 for row in rows[1:])
    assert rows[2]["replay/share"] > 0 and rows[2]["replay/age"] >= 1 and rows[2]["replayed/tokens"] > 0


def test_the_weights_of_the_sampler_are_one_step_old(whole, tmp_path):
    """The first two steps sample with the initial weights, as all steps of a run do that learns nothing."""
    run(*REPLAYING, "optimizer.lr=0", f"output={tmp_path / 'run'}")
    for step, is_same in ((1, True), (2, True), (3, False)):
        rows = [lines(path / "rollouts" / f"step_00000{step}.jsonl") for path in (whole, tmp_path / "run")]
        assert (rows[0] == rows[1]) is is_same, step


def test_a_continued_run_is_the_undisturbed_one(whole, tmp_path):
    interrupt(whole, tmp_path / "run")
    run(*SETTINGS, f"output={tmp_path / 'run'}")
    for name in ("metrics.jsonl", "prompts.jsonl"):
        assert without_times(lines(tmp_path / "run" / name)) == without_times(lines(whole / name)), name
    models = [AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (whole, tmp_path / "run")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_two_ranks_continue_as_one(whole, tmp_path):
    """The earlier weights are cut for the two ranks, and both have the buffer."""
    interrupt(whole, tmp_path / "run")
    run(*SETTINGS, f"output={tmp_path / 'run'}", ranks=2)
    assert (whole / "prompts.jsonl").read_text() == (tmp_path / "run" / "prompts.jsonl").read_text()
    expected, actual = (lines(path / "metrics.jsonl")[-1] for path in (whole, tmp_path / "run"))
    assert actual.keys() == expected.keys()
    same = [key for key in expected if key.startswith(("replay/", "reward/", "rl/", "replayed/", "trained/t"))]
    for key in ("loss", "grad_norm", "entropy", *same):
        assert actual[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key
