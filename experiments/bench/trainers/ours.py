"""This project's trainer as a child: the unchanged `Trainer` of `experiments.run`, which waits after its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments import results
from experiments.bench.trainers.control import StepControl, serve
from experiments.bench.trainers.job import Job, RewardPool, WeightEvaluator
from experiments.bench.trainers.link import Connection
from experiments.cli import quiet
from upge.evaluation.evaluator import training_accuracy
from upge.rollout import Rollout, Sampler
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.distributed import connect
from upge.train.engine import Engine, StepResult
from upge.train.learner import Models
from upge.train.trainer import Parts, Trainer


def train(job: dict[str, Any], connection: Connection) -> None:
    """Trains until it is stopped.

    Args:
        job: `arguments` are the keys of a run, `checksum` says whether rewards come from checksums of the texts.
        connection: the connection to the bench.
    """
    quiet()
    loaded = Job.load(job["arguments"])
    config, prepared = loaded.composed.config, loaded.prepared
    world = connect()
    with loaded.pool() as pool:
        policy = Engine(config.model, config.optimizer, world, config.rollout.temperature)
        sampler, evaluator = loaded.sampler(config.rollout.engine), WeightEvaluator(loaded, pool)
        rewards = RewardPool(pool, job["checksum"])
        control = StepControl(
            connection,
            lambda: evaluator(policy.named_weights()),
            lambda command: _compared(command["gradient"], policy, sampler, rewards),
        )
        verified = VerifiedSampler(sampler, rewards, prepared.prompting)
        # The evaluation before training has no problems; it only signals that everything is loaded.
        parts = Parts(
            config, loaded.composed.algorithm, prepared.train, prepared.weights, prepared.prompting, Models(policy),
            verified, lambda: training_accuracy(config, (), verified, world), prepared.folder, world,
        )  # fmt: skip
        rows = config.prompts_per_step * config.group_size
        trainer = Trainer(
            parts, lambda metrics: control.stepped(_step_metrics(metrics, rows)), lambda _: control.begin()
        )
        facts = {"command": "experiments.bench", "started": results.now(), "from_step": 0}
        prepared.folder.start(loaded.composed.tree, facts, False)
        trainer.run()


def _step_metrics(metrics: Mapping[str, float], rows: int) -> dict[str, float]:
    """A step's metrics: the tokens of all its responses, the seconds of its parts, reward and share without signal."""
    return {
        "tokens": round(metrics.get("response_length", 0.0) * rows),
        "rollout": metrics["time/rollout"],
        "verify": metrics["time/verify"],
        "refresh": metrics["time/sync"],
        "reward": metrics.get("reward/mean", 0.0),
        "silent": metrics["gate/no_signal_prompts"],
    }


@contextmanager
def _compared(path: str, policy: Engine, sampler: Sampler, rewards: RewardPool) -> Iterator[dict[str, Any]]:
    """A context manager in which a step records its prompts and responses, and saves its gradient without an update."""
    recorded: dict[str, Any] = {}
    draw = sampler.sample

    def sample(prompts: Any, *rest: Any) -> list[list[Rollout]]:
        groups = draw(prompts, *rest)
        recorded["prompts"] = [list(prompt) for prompt in prompts]
        recorded["responses"] = [[list(rollout.token_ids) for rollout in group] for group in groups]
        return groups

    def step(lr: float, limit: float = 0.0) -> StepResult:
        gradient = _named(policy, policy.take_gradient())
        torch.save(gradient, path)
        recorded["norm"] = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
        return StepResult(True, recorded["norm"])

    with rewards.by_checksum(), patch.object(sampler, "sample", sample), patch.object(policy, "step", step):
        yield recorded


def _named(policy: Engine, gradient: list[Tensor]) -> dict[str, Tensor]:
    """The flat gradients by the parameters' Hugging Face names."""
    return {name: part for (name, _), part in zip(policy.network.named_parameters(), gradient, strict=True)}


if __name__ == "__main__":
    serve(train)
