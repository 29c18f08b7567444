"""This project's trainer as a child: the unchanged `Trainer` of `experiments.run`, which waits after its steps.

TRL's child shares the configuration and prompts (`Job`), the rewards (`RewardPool`) and the evaluation of weights
(`WeightEvaluator`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments import files
from experiments.bench.trainers import Connection, StepControl, serve
from experiments.cli import quiet
from experiments.config import Composed, compose
from experiments.run.prepare import Prepared, prepare, verifier_pool, with_local_models
from upge import rollout
from upge.evaluation.evaluator import training_accuracy
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.deepspeed_module import StepResult
from upge.train.distributed import World, connect
from upge.train.engine import Engine
from upge.train.learner import Models
from upge.train.parts import Parts
from upge.train.trainer import Trainer
from upge.verify import Item, Verdict, VerifierPool


class RewardPool:
    """Rewards by the run's verifiers, or, in a comparison or always, by a checksum of the response.

    A weak model's responses may all be wrong, and then there is no gradient to compare. Half of all texts have an odd
    checksum, so nearly every prompt whose responses differ has a signal.
    """

    def __init__(self, pool: VerifierPool, always_by_checksum: bool = False) -> None:
        self._pool, self._by_checksum = pool, always_by_checksum

    def submit(self, item: Item) -> Future[Verdict]:
        """Like `VerifierPool.submit`."""
        if not self._by_checksum:
            return self._pool.submit(item)
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(float(zlib.crc32(item.response.encode()) & 1)))
        return verdict

    def by_checksum(self) -> AbstractContextManager[object]:
        """A context manager in which all rewards come from checksums."""
        return patch.object(self, "_by_checksum", True)


@dataclass(frozen=True)
class Job:
    """A run with its arguments, on one process."""

    composed: Composed
    prepared: Prepared

    @classmethod
    def load(cls, arguments: Iterable[str]) -> Job:
        """Read and check the arguments as `python -m experiments.run ARGUMENTS` does."""
        composed = with_local_models(compose(list(arguments)))
        return cls(composed, prepare(composed))

    def pool(self) -> VerifierPool:
        """The verifier pool, with its processes started."""
        limits = self.composed.config.verify
        pool = verifier_pool(self.prepared.verifiers, limits)
        pool.score([Item(r"\boxed{\frac{2}{4}}", "1/2")] * limits.workers)
        return pool

    def sampler(self, engine: str) -> rollout.Sampler:
        """The inference engine as `experiments.run` starts it."""
        config = self.composed.config
        return rollout.load(
            engine, config.model.path, dtype=config.model.dtype, seed=config.seed, overrides=config.model.overrides,
            max_length=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            memory_fraction=config.rollout.memory_fraction,
        )  # fmt: skip


class WeightEvaluator:
    """Evaluates given weights on the run's evaluation problems, with its own transformers sampler."""

    def __init__(self, job: Job, pool: VerifierPool) -> None:
        self._job, self._pool, self._sampler = job, pool, None

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Evaluate weights.

        Returns:
            `greedy`, `pass` (at least one of k samples right) and `mean` (of k samples), as shares of the problems. The
            seeds are always the same, so equal weights have equal accuracies.
        """
        config, prepared = self._job.composed.config, self._job.prepared
        if self._sampler is None:
            self._sampler = VerifiedSampler(self._job.sampler("transformers"), self._pool, prepared.prompting)
        self._sampler.engine.load_weights(weights)
        world = World(0, 1, torch.device("cpu"))
        accuracy: dict[str, Any] = training_accuracy(config, prepared.evaluation, self._sampler, world)["all"]
        k = config.eval.samples
        return {"greedy": accuracy["greedy"], "pass": accuracy[f"pass@{k}"], "mean": accuracy[f"mean@{k}"]}


def train(job: dict[str, Any], connection: Connection) -> None:
    """Train until stopped.

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
        metadata = {"command": "experiments.bench", "started": files.now(), "from_step": 0}
        prepared.folder.start(loaded.composed.tree, metadata, False)
        with parts.stop.noted():
            trainer.run()


def _step_metrics(metrics: Mapping[str, float], rows: int) -> dict[str, float]:
    """A step's metrics: the tokens of all its responses, the seconds of its parts, reward and share without signal."""
    return {
        "tokens": round(metrics.get("response_length", 0.0) * rows),
        "rollout": metrics["time/rollout"],
        "verify": metrics["time/verify"],
        "refresh": metrics["time/sync"],
        "reward": metrics.get("reward/mean", 0.0),
        "no_signal": metrics["gate/no_signal_prompts"],
    }


@contextmanager
def _compared(path: str, policy: Engine, sampler: rollout.Sampler, rewards: RewardPool) -> Iterator[dict[str, Any]]:
    """A context manager in which a step records its prompts and responses, and saves its gradient without an update."""
    recorded: dict[str, Any] = {}
    draw = sampler.sample

    def sample(prompts: Any, *rest: Any) -> list[list[rollout.Rollout]]:
        groups = draw(prompts, *rest)
        recorded["prompts"] = [list(prompt) for prompt in prompts]
        recorded["responses"] = [[list(one.token_ids) for one in group] for group in groups]
        return groups

    def step(lr: float, limit: float = 0.0) -> StepResult:
        names = (name for name, _ in policy.network.named_parameters())
        gradient = dict(zip(names, policy.take_gradient(), strict=True))
        torch.save(gradient, path)
        recorded["norm"] = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
        return StepResult(True, recorded["norm"])

    with rewards.by_checksum(), patch.object(sampler, "sample", sample), patch.object(policy, "step", step):
        yield recorded


if __name__ == "__main__":
    serve(train)
