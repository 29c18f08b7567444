"""This project's trainer as a child: `experiments.run`'s `Trainer` as it is, stopped after every step by its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments import provenance
from experiments.bench.trainers.job import Examiner, Job, Judge
from experiments.bench.trainers.link import Line
from experiments.bench.trainers.turns import Turns, serve
from experiments.startup import quiet
from upge.evaluation.evaluator import training_accuracy
from upge.rollout import Rollout, Sampler
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.distributed import connect
from upge.train.engine import Engine, StepResult
from upge.train.learner import Models
from upge.train.trainer import Parts, Trainer


def train(job: dict[str, Any], line: Line) -> None:
    """Trains until told to stop.

    job: `arguments` are the keys of a run, `checksum` says whether rewards are by the texts' checksums.
    """
    quiet()
    loaded = Job.load(job["arguments"])
    config, prepared = loaded.composed.config, loaded.prepared
    world = connect()
    with loaded.pool() as pool:
        policy = Engine(config.model, config.optimizer, world, config.rollout.temperature)
        sampler, examiner = loaded.sampler(config.rollout.engine), Examiner(loaded, pool)
        judge = Judge(pool, job["checksum"])
        turns = Turns(
            line,
            lambda: examiner(policy.named_weights()),
            lambda word: _compared(word["gradient"], policy, sampler, judge),
        )
        verified = VerifiedSampler(sampler, judge, prepared.prompting)
        # The evaluation before training has no problems: it only signals that everything is loaded.
        parts = Parts(
            config, loaded.composed.algorithm, prepared.train, prepared.weights, prepared.prompting, Models(policy),
            verified, lambda: training_accuracy(config, (), verified, world), prepared.folder, world,
        )  # fmt: skip
        rows = config.prompts_per_step * config.group_size
        trainer = Trainer(parts, lambda metrics: turns.stepped(_figures(metrics, rows)), lambda _: turns.begin())
        facts = {"command": "experiments.bench", "started": provenance.now(), "from_step": 0}
        prepared.folder.start(loaded.composed.tree, facts, False)
        trainer.run()


def _figures(metrics: Mapping[str, float], rows: int) -> dict[str, float]:
    """Of a step: tokens of all its responses, seconds of its parts, and what it was like."""
    return {
        "tokens": round(metrics.get("response_length", 0.0) * rows),
        "rollout": metrics["time/rollout"],
        "verify": metrics["time/verify"],
        "refresh": metrics["time/sync"],
        "reward": metrics.get("reward/mean", 0.0),
        "silent": metrics["gate/no_signal_prompts"],
    }


@contextmanager
def _compared(path: str, policy: Engine, sampler: Sampler, judge: Judge) -> Iterator[dict[str, Any]]:
    """Within it a step tells its prompts and responses, and puts the gradient into the file instead of applying it."""
    found: dict[str, Any] = {}
    draw = sampler.sample

    def sample(prompts: Any, *rest: Any) -> list[list[Rollout]]:
        groups = draw(prompts, *rest)
        found["prompts"] = [list(prompt) for prompt in prompts]
        found["responses"] = [[list(rollout.token_ids) for rollout in group] for group in groups]
        return groups

    def step(lr: float, limit: float = 0.0) -> StepResult:
        gradient = _named(policy, policy.take_gradient())
        torch.save(gradient, path)
        found["norm"] = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
        return StepResult(True, found["norm"])

    with judge.by_checksum(), patch.object(sampler, "sample", sample), patch.object(policy, "step", step):
        yield found


def _named(policy: Engine, gradient: list[Tensor]) -> dict[str, Tensor]:
    """The flat gradient of each parameter by its Hugging Face name."""
    return {name: part for (name, _), part in zip(policy.network.named_parameters(), gradient, strict=True)}


if __name__ == "__main__":
    serve(train)
