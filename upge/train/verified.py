"""Responses and what they are worth: sampling and verification side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from upge.data import Example, Prompting
from upge.rollout import Rollout, Sampler, Sampling
from upge.verify import Item, Verdict, VerifierPool


@dataclass(frozen=True)
class Responder:
    """Samples responses to examples and has each verified as soon as it is complete, while others are still generated.

    Fields:
        sampler: the engine.
        pool: the verifiers; an example's problem names its own, or else takes the pool's first.
        prompting: makes text of tokens.
    """

    sampler: Sampler
    pool: VerifierPool
    prompting: Prompting

    def respond(self, examples: Sequence[Example], n: int, sampling: Sampling, seeds: Sequence[int]) -> Responses:
        """`n` responses to each example with their verdicts; arguments as for `Sampler.sample`."""
        pending: dict[tuple[int, int], Future[Verdict]] = {}

        def arrived(index: int, copy: int, rollout: Rollout) -> None:
            problem = examples[index].problem
            (text,) = self.prompting.decode([rollout.token_ids])
            item = Item(text, problem.answer, problem.prompt, problem.verifier)
            pending[index, copy] = self.pool.submit(item)

        began = time.perf_counter()
        try:
            groups = self.sampler.sample([e.prompt_ids for e in examples], n, sampling, seeds, arrived)
            sampled = time.perf_counter()
            answered = [
                [(rollout, pending[index, copy].result()) for copy, rollout in enumerate(group)]
                for index, group in enumerate(groups)
            ]
        except BaseException:
            for future in pending.values():  # what nobody waits for any longer must not keep a worker
                future.cancel()
            raise
        return Responses(answered, sampled - began, time.perf_counter() - sampled)


@dataclass(frozen=True)
class Responses:
    """What came back.

    Fields:
        groups: per example its rollouts with their verdicts.
        sampling: seconds until the last response was complete.
        verifying: seconds that verification took beyond that.
    """

    groups: list[list[tuple[Rollout, Verdict]]]
    sampling: float
    verifying: float
