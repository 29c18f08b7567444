"""What all children share: configuration and prompts, rewards, and the evaluation of weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.config import Composed, compose
from experiments.run.prepare import Prepared, prepare, with_local_models
from upge import rollout
from upge.evaluation.evaluator import training_accuracy
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.distributed import World
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

    @contextmanager
    def by_checksum(self) -> Iterator[None]:
        """A context manager in which all rewards come from checksums."""
        before, self._by_checksum = self._by_checksum, True
        try:
            yield
        finally:
            self._by_checksum = before


@dataclass(frozen=True)
class Job:
    """A run with its arguments, on one process."""

    composed: Composed
    prepared: Prepared

    @classmethod
    def load(cls, arguments: Iterable[str]) -> Job:
        """Reads and checks the arguments as `python -m experiments.run ARGUMENTS` does."""
        composed = with_local_models(compose(list(arguments)))
        return cls(composed, prepare(composed))

    def pool(self) -> VerifierPool:
        """The verifier pool, with its processes started."""
        limits = self.composed.config.verify
        pool = VerifierPool(self.prepared.verifiers, limits.workers, limits.time_limit, limits.memory_limit)
        pool.score([Item(r"\boxed{\frac{2}{4}}", "1/2")] * limits.workers)
        return pool

    def sampler(self, engine: str) -> rollout.Sampler:
        """The inference engine as `experiments.run` starts it."""
        config = self.composed.config
        return rollout.load(
            engine,
            config.model.path,
            dtype=config.model.dtype,
            max_length=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            memory_fraction=config.rollout.memory_fraction,
            seed=config.seed,
            overrides=config.model.overrides,
        )


class WeightEvaluator:
    """Evaluates given weights on the run's evaluation problems, with its own transformers sampler."""

    def __init__(self, job: Job, pool: VerifierPool) -> None:
        self._job, self._pool, self._sampler = job, pool, None

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Evaluates weights.

        Returns:
            `greedy`, `pass` (at least one of k samples right) and `mean` (of k samples), as shares of the problems. The
            seeds are always the same, so equal weights have equal accuracies.
        """
        prompting = self._job.prepared.prompting
        if self._sampler is None:
            self._sampler = VerifiedSampler(self._job.sampler("transformers"), self._pool, prompting)
        self._sampler.engine.load_weights(weights)
        config, world = self._job.composed.config, World(0, 1, torch.device("cpu"))
        accuracy: dict[str, Any] = training_accuracy(config, self._job.prepared.evaluation, self._sampler, world)["all"]
        k = config.eval.samples
        return {"greedy": accuracy["greedy"], "pass": accuracy[f"pass@{k}"], "mean": accuracy[f"mean@{k}"]}
