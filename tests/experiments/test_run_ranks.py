"""An interrupted run goes on with another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.running import SMALL, lines, run

#: Interleaved updates with moments of their own, and prompts that wait for one; several rewards; a critic and a gate
#: that moves.
ALGORITHMS = {
    "relift": (1, 2, ["algo.interleaved_update.size=2", "algo.interleaved_update.gate.threshold=0.5"]),
    "gdpo": (1, 2, ["verify.verifier=number as correct + 0.2*boxed as format", "verify.success=correct"]),
    "amft": (2, 1, ["algo.terms.sft.gate.every=1", "algo.terms.sft.gate.rate=10"]),
}


def interrupt(whole: Path, folder: Path) -> None:
    """Copies a finished run of three steps and makes it one that stopped in the third."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000003")
    shutil.rmtree(folder / "final")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"finished_step": None}))


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
    else:
        assert len({row["state/mu"] for row in actual}) == 3
    assert actual[2].keys() == expected[2].keys()
    same = [key for key in expected[2] if key.startswith(("state/", "interleaved_update/", "critic/", "reward/"))]
    for key in ("loss", "grad_norm", "entropy", "learning_rate", "skipped_updates", *same):
        assert actual[2][key] == pytest.approx(expected[2][key], rel=1e-5, abs=1e-7), key
    start, *models = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (Path("experiments/models/tiny"), whole / "final", folder / "final")
    )
    distances = [sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5 for a, b in (models, (start, models[0]))]
    assert distances[0] <= 1e-5 * distances[1], distances
