"""The weights that a run of the command line leaves are those of a plain trainer that repeats it from its rollouts.

All runs have a temperature of 0.7, two mini-batches, two epochs, active gradient clipping, weight decay, warm-up and a
linear schedule. Algorithms, ranks and micro-batches form a covering design: every algorithm once, and each of one and
two ranks with small and with large micro-batches.

Adam divides a gradient by its size, so it turns the rounding of the smallest gradients into full updates. The clipping
norm is so small that such gradients are below Adam's epsilon. With a norm of 0.02, the plain trainer in float32 and in
float64 differ by more than the bound.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from experiments.config import MODELS
from tests.plain_trainer import PlainTrainer, Settings, Stage, distance, read_step, worked_solution
from tests.running import ROOT, environment

START = MODELS / "tiny"
#: Most tokens of a micro-batch: about two trajectories, or a whole mini-batch.
SMALL, LARGE = 150, 16384
#: How far the weights may be apart, relative to the size of the update.
CLOSE, CLOSE_WITH_STAGES = 1e-4, 1e-2
#: With an entropy bonus on rollouts whose tokens are almost certain: 2.5e-3 was seen. A likely cause, not proven, is
#: that log Σ exp z - Σ p·z loses the digits of an entropy near 0 in float32; Adam turns such rounding into updates.
CLOSE_WITH_ENTROPY = 1e-2


@dataclass(frozen=True)
class Run:
    """A run of the command line and what the plain trainer is told about it."""

    settings: Settings
    ranks: int
    micro_batch_tokens: int
    arguments: tuple[str, ...] = ()

    def command(self, algorithm: str) -> list[str]:
        """The arguments of the command line."""
        s = self.settings
        return [
            f"algo={algorithm}",
            f"ranks={self.ranks}",
            f"steps={s.steps}",
            f"rollout.temperature={s.temperature}",
            f"rollout.max_response_tokens={s.max_response_tokens}",
            f"optimizer.lr={s.lr}",
            "optimizer.schedule=linear",
            f"optimizer.warmup_steps={s.warmup_steps}",
            f"optimizer.weight_decay={s.weight_decay}",
            f"optimizer.max_grad_norm={s.max_grad_norm}",
            f"optimizer.mini_batches={s.mini_batches}",
            f"optimizer.epochs={s.epochs}",
            f"optimizer.micro_batch_tokens={self.micro_batch_tokens}",
            f"critic.lr={s.critic_lr}",
            f"critic.warmup_steps={s.critic_warmup_steps}",
            "prompts_per_step=4",
            "data.levels=[3 numbers,4 numbers]",
            "log_rollouts=1",
            "eval.every=-1",
            "checkpoint.every=0",
            "verify.verifier=number",
            *self.arguments,
        ]


def one(algorithm: str, **settings: float) -> Settings:
    """Settings of a run of four steps with one algorithm."""
    return Settings((Stage(algorithm, 4),), **settings)


def bound(settings: Settings) -> float:
    """How far the weights of a run with these settings may be apart."""
    if len(settings.stages) > 1:
        return CLOSE_WITH_STAGES
    return CLOSE_WITH_ENTROPY if settings.entropy else CLOSE


ENTROPY_OF_DEMONSTRATIONS = (
    "{_target_: upge.EntropyBonus, coefficient: 0.05, source: demonstrations, reduction: {_target_: upge.TokenMean}}"
)
RUNS = {
    "grpo": Run(one("grpo"), 1, SMALL),
    "hpt": Run(one("hpt"), 2, LARGE),
    "luffy": Run(one("luffy"), 1, LARGE),
    "luffy with entropy": Run(
        one("luffy", entropy=0.05), 1, LARGE, ("correction=entropy", "correction.entropy.coefficient=0.05")
    ),
    "srft": Run(one("srft"), 2, SMALL),
    "ppo": Run(one("ppo", warmup_steps=1), 2, LARGE),
    "dpo": Run(one("dpo"), 1, SMALL),
    "dapo": Run(one("dapo"), 1, LARGE),
    "relift": Run(
        one("relift", interlude_size=2, interlude_entropy=0.05),
        1,
        LARGE,
        (
            "algo.interleaved_update.size=2",
            f"algo.interleaved_update.algorithm.regularizers.entropy={ENTROPY_OF_DEMONSTRATIONS}",
        ),
    ),
    "sft_then_grpo": Run(
        Settings((Stage("sft", 3), Stage("grpo", 3, lr_factor=0.5)), warmup_steps=1),
        1,
        LARGE,
        ("algo.stages.reinforce.lr_factor=0.5",),
    ),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs, made by one process that imports everything once."""
    path = tmp_path_factory.mktemp("runs")
    words = [word for name, run in RUNS.items() for word in ("--", name, *run.command(name.split()[0]))][1:]
    command = [sys.executable, "-m", "tests.train_all", str(path), *words]
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment() | threads, capture_output=True, text=True, timeout=2000)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.timeout(2100)
@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_those_of_the_plain_trainer(folder, name):
    log = (folder / f"{name}.log").read_text()
    assert log.splitlines()[-1] == "0", log[-3000:]
    settings = RUNS[name].settings
    trainer = PlainTrainer(START, settings)
    plain = trainer.train(folder / name / "rollouts")
    run, start = (load_file(path / "model.safetensors") for path in (folder / name / "final", START))
    assert len(trainer.norms) >= settings.steps, "too few updates to compare"
    clipped = sum(norm > settings.max_grad_norm for norm in trainer.norms)
    assert clipped > len(trainer.norms) / 2, "too few updates in which clipping is active"
    apart = distance(run, plain, start)
    print(f"{name}: {len(trainer.norms)} updates, {clipped} clipped, distance {apart:.2e}")
    assert apart < bound(settings)


@pytest.mark.timeout(2100)
def test_demonstrations_that_are_not_logged_are_those_of_the_data_set(folder):
    """What the plain trainer imitates for relift is what the data set shows where it is logged."""
    tokenizer = AutoTokenizer.from_pretrained(START)
    rows = [r for r in read_step(folder / "luffy" / "rollouts" / "step_000001.jsonl", tokenizer) if r["demo"]]
    assert rows
    for row in rows:
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == worked_solution(row["prompt"])


def test_the_distance_is_relative_to_the_update():
    start, plain, run = ({"w": torch.tensor([x, 0.0])} for x in (1.0, 3.5, 3.0))
    assert math.isclose(distance(run, plain, start), 0.25)
    assert distance(run, run, start) == 0
