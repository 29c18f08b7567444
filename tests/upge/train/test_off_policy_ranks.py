"""How far off-policy an update is, as the trainer measures it: by the formulas, for any cut and one rank or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_random_model
from tests.off_policy_ranks import batch
from tests.upge.train.test_off_policy import expected
from tests.upge.train.test_update import launch, padded_logprobs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("ranks", "budget"), [(1, 10_000), (1, 60), (2, 45)])
def test_it_is_the_same_for_any_cut(model: Path, tmp_path: Path, ranks: int, budget: int) -> None:
    """Groups 0 and 1 have no signal (tests/models.py), so their rollouts are not run."""
    launch("off_policy_ranks", ranks, model, tmp_path / "metrics.json", budget)
    metrics, given = json.loads((tmp_path / "metrics.json").read_text()), batch()
    assert (metrics["micro_batches"] > 1) == (budget < 10_000)
    logprobs, _ = padded_logprobs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64), given.trajectories)
    rows = [i for i, t in enumerate(given.trajectories) if t.group > 1 and not t.is_demonstration]
    lengths = [len(t.response_ids) for t in given.trajectories]
    for pair in ("sampler", "behavior"):
        old = getattr(given.columns, f"{pair}_logprobs")
        log_ratio = [(logprobs[i] - old[i])[: lengths[i]].detach().numpy() for i in rows]
        for name, value in expected(log_ratio).items():
            assert metrics[f"{pair}/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), (pair, name)
    assert 0 < metrics["rl/masked_mass"] < 1 and metrics["rl/masked_mass"] != metrics["rl/masked_share"]
