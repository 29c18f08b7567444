"""On a GPU as on the CPU: samples, whole runs, and half precision. Skipped where there is no CUDA device."""

from __future__ import annotations

import pytest

from tests.rollout_ranks import COPIES, PROMPTS, SAMPLINGS, SEEDS, make_model
from tests.running import SMALL, lines, run
from upge import rollout

pytestmark = pytest.mark.gpu
TWO_STEPS = (*SMALL, "steps=2", "seed=3")


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_samples(tmp_path, name):
    """The random numbers are drawn on the CPU, so float32 draws the same tokens."""
    make_model(tmp_path / "model", True, 0)
    actual = {}
    for device in ("cpu", "cuda"):
        sampler = rollout.load("transformers", tmp_path / "model", dtype="float32", device=device)
        groups = sampler.sample(PROMPTS, COPIES, SAMPLINGS[name], SEEDS)
        actual[device] = [each for group in groups for each in group]
        sampler.close()
    for cpu, cuda in zip(actual["cpu"], actual["cuda"], strict=True):
        assert cpu.token_ids == cuda.token_ids and cpu.finished == cuda.finished
        assert cpu.logprobs == pytest.approx(cuda.logprobs, abs=1e-3)


@pytest.mark.parametrize("algo", ["hpt", "grpo", "srft"])
def test_the_first_step_of_a_run(tmp_path, monkeypatch, algo):
    """The same rollouts and rewards, and the same gradient: everything up to the first update."""
    first = {}
    for device, shown in (("cuda", None), ("cpu", "")):
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        run(*TWO_STEPS, f"algo={algo}", "rollout.engine=transformers", f"output={tmp_path / device}")
        first[device] = lines(tmp_path / device / "metrics.jsonl")[0]
    for key in ("reward/mean", "response_length", "trained/tokens"):
        assert first["cuda"][key] == pytest.approx(first["cpu"][key]), key
    for key in ("grad_norm", "entropy"):
        assert first["cuda"][key] == pytest.approx(first["cpu"][key], rel=1e-3), key
    assert first["cuda"]["sampler/logprob_diff_max"] < 1e-3


def test_half_precision(tmp_path):
    """The variable-length kernel, the sampler and the updates in bfloat16: log-probs agree as far as it reaches."""
    run(*TWO_STEPS, "algo=hpt", "model.dtype=bfloat16", "rollout.engine=transformers", f"output={tmp_path / 'run'}")
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(0 < row["grad_norm"] < 100 for row in rows)
    assert all(row["sampler/logprob_diff_mean"] < 0.05 for row in rows)
