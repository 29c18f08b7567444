"""Kills a run at random times, again and again, and compares what it leaves with an undisturbed run.

`pytest -m soak tests/faults/test_soak.py` runs it for about ten minutes; it is not part of `.ci/run`. The variable SOAK
is the number of kills of each run (8), SOAK_SEED chooses the times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.running import ROOT, SMALL, command, environment, lines, run, without_times

KILLS, SEED = int(os.environ.get("SOAK", "8")), int(os.environ.get("SOAK_SEED", "0"))
ALGORITHMS = {
    "hpt": ["algo=hpt"],
    "grpo, two updates": ["algo=grpo", "correction=[tis,kl_k3]", "optimizer.mini_batches=2"],
    "a stateful gate and a critic": ["algo=amft", "algo.terms.sft.gate.every=2"],
    "two stages": ["algo=sft_then_grpo"],
}
STEPS = 12


def killed(arguments: list[str], seconds: float) -> bool:
    """Starts a run and kills it with all its processes after some seconds; True if it ended by itself before."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment() | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    assert process.returncode == 0, err[-3000:]
    return True


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run(name: str, tmp_path: Path) -> None:
    settings = [*SMALL, *ALGORITHMS[name], f"steps={STEPS}", "checkpoint.every=1", "eval.every=4", "log_rollouts=2"]
    settings += ["rollout.engine=transformers"]
    began = time.monotonic()
    run(*settings, f"output={tmp_path / 'whole'}", timeout=1200)
    # As long as the whole run, so that on a machine of any speed steps, checkpoints and evaluations are hit as well.
    longest, began = time.monotonic() - began, time.monotonic()
    random_times, hit = random.Random(f"{SEED}/{name}"), set[int]()
    arguments = [*settings, f"output={tmp_path / 'killed'}"]
    for kill in range(KILLS):
        if killed(arguments, random_times.uniform(1.0, longest)):
            break
        metrics = tmp_path / "killed" / "metrics.jsonl"
        hit.add(len(metrics.read_text().splitlines()) if metrics.is_file() else 0)
        print(f"kill {kill + 1} after {time.monotonic() - began:.0f} s, at step {max(hit)}", flush=True)
    else:
        run(*arguments, timeout=1200)
    assert max(hit, default=0) > 0, "no kill hit a step; give another SOAK_SEED or more kills"
    for file in ("metrics.jsonl", "evaluations.jsonl", "prompts.jsonl"):
        ours, plain = (without_times(lines(tmp_path / folder / file)) for folder in ("killed", "whole"))
        assert ours == plain, f"{file} after kills at steps {sorted(hit)}"
    for folder in ("rollouts", "tokens"):
        ours, plain = ({p.name: p.read_bytes() for p in (tmp_path / f / folder).iterdir()} for f in ("killed", "whole"))
        assert ours == plain, folder
    weights = [(tmp_path / folder / "final" / "model.safetensors").read_bytes() for folder in ("killed", "whole")]
    assert weights[0] == weights[1]
    left = [path for path in (tmp_path / "killed").rglob("*.partial")]
    assert not left, left
