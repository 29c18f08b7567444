"""An interrupted run goes on with another number of ranks, and with the same number it is the same bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.running import SMALL, interrupt, lines, run
from upge.train.resharding import model_file, read

pytestmark = pytest.mark.slow

#: Interleaved updates with moments of their own, and prompts that wait for one; several rewards; a critic and a gate
#: that moves; a gate that follows what the first step measured; a memory of prompts and of their responses, by which
#: prompts are drawn.
ALGORITHMS = {
    "relift": (1, 2, ["algo.interleaved_update.size=2", "algo.interleaved_update.gate.threshold=0.5"]),
    "gdpo": (1, 2, ["verify.verifier=number as correct + 0.2*boxed as format", "verify.success=correct"]),
    "amft": (2, 1, ["algo.terms.sft.gate.every=1", "algo.terms.sft.gate.rate=10"]),
    "gac": (1, 2, []),
    # Five prompts for four places, so that most are met again.
    "spo": (1, 2, ["data.train_size=5", "optimizer.lr=1e-3"]),
}


KINDS = ("state/", "interleaved_update/", "critic/", "reward/", "memory/", "sampling/effective_prompts")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_next_step_is_that_of_the_uninterrupted_run(tmp_path, algo):
    before, now, more = ALGORITHMS[algo]
    whole, folder = tmp_path / "whole", tmp_path / "interrupted"
    keys = ["steps=3", "eval.every=-1", "checkpoint.every=1", "checkpoint.keep=0", "rollout.engine=transformers"]
    settings = [*SMALL, *keys, f"algo={algo}", "verify.workers=1", *more]
    run(*settings, f"output={whole}", ranks=before)
    interrupt(whole, folder)
    done = run(*settings, f"output={folder}", ranks=now)
    assert f"from step 2, saved by {before} rank{'s' * (before > 1)}; this run has {now}" in done.stdout
    facts = json.loads((folder / "run.json").read_text())
    assert [(start["world_size"], start["from_step"]) for start in facts["starts"]] == [(before, 0), (now, 2)]
    assert (whole / "prompts.jsonl").read_text() == (folder / "prompts.jsonl").read_text()
    rollouts = [lines(path / "rollouts" / "step_000003.jsonl") for path in (whole, folder)]
    assert [row["response"] for row in rollouts[0]] == [row["response"] for row in rollouts[1]]
    expected, actual = (lines(path / "metrics.jsonl") for path in (whole, folder))
    assert actual[:2] == expected[:2] and len(actual) == 3
    if algo == "relift":
        # The second set of moments is in the checkpoint, and in use again in the last step.
        assert min(sum(row["interleaved_update/updates"] for row in rows) for rows in (actual[:2], actual[2:])) > 0
    elif algo == "gdpo":
        assert {"reward/correct", "reward/format"} <= actual[2].keys()
    elif algo in ("amft", "gac"):
        assert len({row["state/mu"] for row in actual}) == 3
    else:
        assert actual[2]["memory/drift_mean"] > 0 and actual[2]["memory/new_share"] < 1
    assert actual[2].keys() == expected[2].keys()
    same = [key for key in expected[2] if key.startswith(KINDS)]
    for key in ("loss", "grad_norm", "entropy", "learning_rate", "skipped_updates", *same):
        assert actual[2][key] == pytest.approx(expected[2][key], rel=1e-5, abs=1e-7), key
    start, *models = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (Path("experiments/models/tiny"), whole / "final", folder / "final")
    )
    distances = [sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5 for a, b in (models, (start, models[0]))]
    assert distances[0] <= 1e-5 * distances[1], distances


def test_a_memory_goes_on_bit_for_bit(tmp_path):
    """Records, remembered responses and the prompts drawn by them, after a restart on the same number of ranks."""
    whole, folder = tmp_path / "whole", tmp_path / "interrupted"
    keys = ["steps=3", "eval.every=-1", "checkpoint.every=1", "checkpoint.keep=0", "rollout.engine=transformers"]
    settings = [*SMALL, *keys, "algo=spo", "data.train_size=5", "optimizer.lr=1e-3", "verify.workers=1", "group_size=1"]
    run(*settings, f"output={whole}")
    interrupt(whole, folder)
    run(*settings, f"output={folder}")
    expected, actual = (lines(path / "metrics.jsonl") for path in (whole, folder))
    assert len(actual) == 3 and actual[2]["memory/prompts"] == 5 and actual[2]["memory/drift_mean"] > 0
    for before, now in zip(expected, actual, strict=True):
        assert {k: v for k, v in before.items() if k[:5] != "time/"} == {
            k: v for k, v in now.items() if k[:5] != "time/"
        }
    models = [AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (whole, folder)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    files = [model_file(path / "checkpoints" / "step_000003") for path in (whole, folder)]
    prompts = [read(file)["upge"]["memory"]["prompts"] for file in files]
    assert prompts[0]["records"] == prompts[1]["records"] and len(prompts[0]["records"]) == 5
    for key, pair in prompts[0]["responses"].items():
        assert all(map(torch.equal, pair, prompts[1]["responses"][key])), key
