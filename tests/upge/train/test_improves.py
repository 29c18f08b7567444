"""Training does what it is for: a run with the whole machinery of a critic makes the shipped model better."""

from __future__ import annotations

import pytest

from tests.running import lines, run


@pytest.mark.slow
def test_a_critic_and_clipped_ratios_improve_the_shipped_model(tmp_path):
    """Sums of four to six numbers, mean of samples at temperature 1: 0.41, 0.43, 0.41 before, 0.78, 0.73, 0.76 after,
    with seeds 0, 1, 2. The standard error of 384 samples is 0.025."""
    folder = tmp_path / "run"
    run(
        "algo=ppo",
        "steps=30",
        "prompts_per_step=16",
        "group_size=4",
        "data.levels=[4 numbers,5 numbers,6 numbers]",
        "data.train_size=240",
        "data.evaluation_size=48",
        "rollout.engine=transformers",
        "eval.every=0",
        "log_rollouts=0",
        f"output={folder}",
    )
    before, after = (line["all"]["mean@8"] for line in lines(folder / "evaluations.jsonl"))
    assert after > before + 0.15
