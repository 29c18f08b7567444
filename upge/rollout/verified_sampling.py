"""Sampling with verification: complete responses are verified while others are still generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from upge.errors import Interrupted
from upge.rollout.base import Prefixes, Rollout, Sampler, Sampling
from upge.verify import Item, Member, Reward, Verdict, VerifierPool
from upge.views import PASS_THRESHOLD

if TYPE_CHECKING:
    from upge.data import Example, Prompting


#: Seconds between the calls of `interrupted` while waiting for verdicts.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class PendingRollout:
    """A complete response whose verdict may still be pending.

    Attributes:
        index: index of the example in the call.
        copy: number of the response among those to this example, from 0.
        rollout: the response's sampled tokens.
        text: the text that the verifier reads, which includes a prefix that the response continues.
        verdict: the verdict, which may be pending.
    """

    index: int
    copy: int
    rollout: Rollout
    text: str
    verdict: Future[Verdict]


@dataclass(frozen=True)
class VerifiedRollouts:
    """Rollouts with their verdicts.

    Attributes:
        groups: for each example its rollouts with their verdicts.
        sampling_seconds: until the last response was complete.
        verifying_seconds: further seconds until the last verdict.
    """

    groups: list[list[tuple[Rollout, Verdict]]]
    sampling_seconds: float
    verifying_seconds: float

    @property
    def first_error(self) -> str:
        """The traceback of the first error among the verdicts, or its reason; empty without an error."""
        verdicts = (verdict for group in self.groups for _, verdict in group)
        return next((verdict.error for verdict in verdicts if verdict.error), "")


class FirstError:
    """Reports the first error of verifiers and ignores later ones, which are counted and recorded elsewhere.

    Args:
        say: prints a text of several lines; by default to standard error.
    """

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        self._say, self._is_told = say or _to_stderr, False

    def __call__(self, error: str) -> None:
        """Report an error, unless there was one before or the text is empty."""
        if error and not self._is_told:
            self._is_told = True
            what = "a verifier failed on a response, which gets the smallest reward; later errors are only counted"
            self._say(f"{what}:\n{error}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class VerifiedSampler:
    """Samples responses to examples and verifies each of them as soon as it is complete.

    Attributes:
        engine: samples the responses.
        pool: the verifiers. A problem that names no verifier takes the first.
        prompting: decodes the responses.
        first_error: reports the first error of a verifier. The caller passes it the errors, on one rank only.
        interrupted: called between decoding steps and while waiting for verdicts; True ends the call with
            `Interrupted`.
        pass_threshold: a response counts as correct if its reward exceeds this.
        rewards: the reward of each verifier that problems name.
        success: in a sum of verifiers, the name of the reward that is compared with `pass_threshold`; empty = the sum.
    """

    engine: Sampler
    pool: VerifierPool
    prompting: Prompting
    first_error: FirstError = field(default_factory=FirstError)
    interrupted: Callable[[], bool] | None = None
    pass_threshold: float = PASS_THRESHOLD
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    success: str = ""

    def passed(self, verdict: Verdict) -> bool:
        """Whether a response with this verdict counts as correct."""
        return verdict.reward_of(self.success) > self.pass_threshold

    def sample(
        self,
        examples: Sequence[Example],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        prefixes: Prefixes | None = None,
    ) -> VerifiedRollouts:
        """Draw `n` responses to each example and wait for all verdicts.

        If sampling or verification fails, pending verifications are cancelled.

        Args:
            examples: may be empty.
            n, sampling, seeds, prefixes: as for `Sampler.sample`. The verifier reads a prefix and what follows it.
        """
        pending: dict[tuple[int, int], Future[Verdict]] = {}

        def arrived(response: PendingRollout) -> None:
            pending[response.index, response.copy] = response.verdict

        began = time.perf_counter()
        try:
            groups = self.stream(examples, n, sampling, seeds, arrived, prefixes)
            sampled = time.perf_counter()
            self._await(list(pending.values()))
            verified = [
                [(rollout, pending[index, copy].result()) for copy, rollout in enumerate(group)]
                for index, group in enumerate(groups)
            ]
        except BaseException:
            for verdict in pending.values():
                verdict.cancel()
            raise
        return VerifiedRollouts(verified, sampled - began, time.perf_counter() - sampled)

    def _await(self, verdicts: Sequence[Future[Verdict]]) -> None:
        """Wait for all verdicts.

        Raises:
            Interrupted: `interrupted` asks for it.
        """
        while wait(verdicts, timeout=None if self.interrupted is None else _POLL_SECONDS).not_done:
            if self.interrupted is not None and self.interrupted():
                raise Interrupted("verification was interrupted")

    def stream(
        self,
        examples: Sequence[Example],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        arrived: Callable[[PendingRollout], None],
        prefixes: Prefixes | None = None,
    ) -> list[list[Rollout]]:
        """Draw `n` responses to each example and hand each one over as soon as it is complete.

        Args:
            examples, n, sampling, seeds, prefixes: as for `sample`.
            arrived: called in this thread for each response, once it has been submitted for verification. Generation
                waits for it.

        Returns:
            For each example its `n` rollouts.
        """

        groups = [object() for _ in examples]

        def complete(index: int, copy: int, rollout: Rollout) -> None:
            problem = examples[index].problem
            ids = (*(prefixes or {}).get((index, copy), ()), *rollout.token_ids)
            (text,) = self.prompting.decode([ids])
            item = Item(text, problem.answer, problem.prompt, problem.verifier, problem.row, len(ids))
            item = item._replace(is_truncated=not rollout.finished, member=Member(groups[index], n, copy))
            verdict = self.pool.submit(item)
            arrived(PendingRollout(index, copy, rollout, text, verdict))

        prompts = [example.prompt_ids for example in examples]
        more = {"prefixes": prefixes} if prefixes else {}
        return self.engine.sample(prompts, n, sampling, seeds, complete, self.interrupted, **more)
