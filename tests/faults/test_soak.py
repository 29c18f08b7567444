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
#: Longer than a start.
STEPS, LONGEST = 12, 30.0


def steps(folder: Path) -> int:
    """The steps that a run has recorded."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def killed(arguments: list[str], seconds: float, folder: Path, after_a_step: bool) -> bool:
    """Starts a run and kills it with all its processes after some seconds; True if it ended by itself before.

    With `after_a_step` the seconds count from the first step that the run records, so that the kill hits a step, a
    checkpoint or an evaluation; otherwise it may hit the start.
    """
    last = steps(folder)
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment() | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # A run that continues first removes the steps after its checkpoint.
    while after_a_step and (now := steps(folder)) <= last and process.poll() is None:
        last = now
        time.sleep(0.05)
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
    run(*settings, f"output={tmp_path / 'whole'}", timeout=1200)
    random_times, hit, folder = random.Random(f"{SEED}/{name}"), set[int](), tmp_path / "killed"
    arguments = [*settings, f"output={folder}"]
    for kill in range(KILLS):
        after_a_step = kill % 2 == 1
        seconds = random_times.uniform(0.0, 2.0) if after_a_step else random_times.uniform(1.0, LONGEST)
        if killed(arguments, seconds, folder, after_a_step):
            break
        hit.add(steps(folder))
        print(f"kill {kill + 1} at step {steps(folder)}", flush=True)
    else:
        run(*arguments, timeout=1200)
    assert max(hit) > 0, "no kill hit a step; raise SOAK"
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
