"""A process that is killed between two checkpoints loses nothing: memory, replay and earlier weights are in them."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.running import SMALL, environment, lines, run, without_times

pytestmark = pytest.mark.slow

#: Checkpoints after steps 3 and 6. The kill hits step 5 or 6, so that the run continues from step 3.
STEPS, EVERY = 7, 3
KEYS = [*SMALL, f"steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=0", "eval.every=-1"]
KEYS += ["verify.workers=1", "rollout.engine=transformers", "optimizer.lr=1e-3", "log_rollouts=1"]
ALGORITHMS = {
    # Five prompts for four places, so that most are met again.
    "memory": ["algo=spo", "data.train_size=5"],
    "replay": ["algo=exgrpo", "algo.replay.start=0", "data.train_size=5"],
    "lag": ["algo=grpo", "rollout.lag=2"],
    "a gate with measurements of the first step": ["algo=gac"],
}


def recorded(folder: Path) -> int:
    """The steps that a run has recorded."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def killed(folder: Path, *arguments: str, after: int, seconds: float) -> None:
    """Starts a run and kills it with all its processes some seconds after it has recorded step `after`."""
    out = folder.with_suffix(".txt")
    process = forked.start("tests.undrawn", *arguments, f"output={folder}", environment=environment(), out=out)
    try:
        end = time.monotonic() + 300
        while recorded(folder) < after:
            assert process.poll() is None and time.monotonic() < end, out.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(seconds)
        assert process.poll() is None, "the run ended before the kill"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_killed_run_continues_as_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    settings, whole, folder = [*KEYS, *ALGORITHMS[name]], tmp_path / "whole", tmp_path / "killed"
    run(*settings, f"output={whole}")
    moment = random.Random(f"{os.environ.get('SOAK_SEED', '0')}/{name}")
    killed(folder, *settings, after=moment.choice([EVERY + 1, EVERY + 2]), seconds=moment.uniform(0.0, 0.2))
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == [f"step_{EVERY:06d}"]
    assert EVERY < recorded(folder) < STEPS and not (folder / "final").exists()
    run(*settings, f"output={folder}")
    for file in ("metrics.jsonl", "prompts.jsonl"):
        assert without_times(lines(folder / file)) == without_times(lines(whole / file)), file
    rows = [{path.name: path.read_bytes() for path in (f / "rollouts").iterdir()} for f in (folder, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    weights = [load_file(path / "final" / "model.safetensors") for path in (folder, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
