"""Tensor parallelism: an inference engine over several ranks, each of which samples responses to its own prompts."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from upge.errors import ConfigError, NonFiniteError
from upge.models.loading import ModelConfig, attention_sizes
from upge.rollout.base import Arrived, Poll, Prefixes, Request, Rollout, Sampler, Sampling, check_finite
from upge.rollout.vllm_process import interrupts_held

KEY = "rollout.tensor_parallel"
#: vLLM pads the vocabulary to a multiple of this.
_VOCABULARY_BLOCK = 64
#: Decoding steps after which the ranks of an engine agree whether to end a call that was interrupted.
_POLL_STEPS = 16


class SharedSampler(Sampler):
    """One rank's part of an engine that several ranks share.

    Tensor parallelism requires the same calls on all ranks of an engine. `sample` gathers the prompts of these ranks,
    every rank samples responses to all of them, and returns those to its own. Each response has its own seed, so
    rollouts do not depend on the number of ranks of an engine, up to rounding where two tokens nearly tie.

    All ranks of an engine must call `sample`, even without prompts, and `load_weights`. A call of `sample` that fails
    on one rank ends on all of them, and the sampler remains usable. It ends

    - before sampling, if an argument is refused;
    - with this response, if `arrived` raises an error;
    - with the next response, if the handler of SIGINT raises an error;
    - within 16 decoding steps, if `interrupted` returns True on one rank.

    The failing rank raises its own error, the others a RuntimeError, Interrupted or NonFiniteError. Only an error
    inside one rank's engine, such as a lack of memory, leaves the others waiting until the launcher stops them.

    Args:
        engine: this rank's part of the engine.
        group: a gloo group of the engine's ranks.
    """

    def __init__(self, engine: Sampler, group: dist.ProcessGroup) -> None:
        self.name, self.reason, self.threads = engine.name, engine.reason, engine.threads
        self.max_length, self.vocabulary = engine.max_length, engine.vocabulary
        self.engine, self._ranks = engine, _Ranks(group)

    def check(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.engine.check(prompts, n, sampling, seeds)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        arrived: Arrived | None = None,
        interrupted: Callable[[], bool] | None = None,
        prefixes: Prefixes | None = None,
    ) -> list[list[Rollout]]:
        with interrupts_held() as deliver:
            calls = self._calls(prompts, n, sampling, seeds, prefixes or {})
            busy = [call for call in calls if call.prompts] or calls
            if any((call.n, call.sampling) != (busy[0].n, busy[0].sampling) for call in busy):
                raise ValueError("the ranks of an engine must sample with the same `n` and `sampling`")
            first = sum(len(call.prompts) for call in calls[: self._ranks.rank])

            def complete(index: int, copy: int, rollout: Rollout) -> None:
                error: BaseException | None = None
                try:
                    deliver()
                    check_finite(index, copy, rollout)
                    if arrived is not None and 0 <= index - first < len(prompts):
                        arrived(index - first, copy, rollout)
                except BaseException as raised:
                    error = raised
                self._ranks.agree(error, (index, copy, rollout.token_ids))

            rollouts = self.engine.sample(
                [prompt for call in calls for prompt in call.prompts],
                busy[0].n,
                busy[0].sampling,
                [seed for call in calls for seed in call.seeds],
                complete,
                None if interrupted is None else self._ranks.agreed(interrupted),
                _joined_prefixes(calls),
            )
        return rollouts[first : first + len(prompts)]

    def _calls(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int], prefixes: Prefixes
    ) -> list[_Call]:
        """The arguments of all ranks of the engine. If those of one are refused, every rank raises an error."""
        error: Exception | None = None
        try:
            self.check(prompts, n, sampling, seeds)
        except Exception as raised:
            error = raised
        refusal = f"{type(error).__name__}: {error}" if error else ""
        own = _Call([tuple(prompt) for prompt in prompts], n, sampling, list(seeds), dict(prefixes), refusal)
        calls = self._ranks.gather(own)
        if error is not None:
            raise error
        for rank, call in enumerate(calls):
            if call.refusal:
                raise RuntimeError(f"{self._ranks.described(rank)} refused the call: {call.refusal}")
        return calls

    def sleep(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        self.engine._sample(requests, sampling, complete, poll)

    def _restart(self) -> None:
        self.engine.restart()

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.engine.load_weights(weights)


@dataclass(frozen=True)
class _Call:
    """The arguments of `sample` on one rank, and why they are refused, if they are."""

    prompts: list[tuple[int, ...]]
    n: int
    sampling: Sampling
    seeds: list[int]
    prefixes: dict[tuple[int, int], Sequence[int]]
    refusal: str


def _joined_prefixes(calls: Sequence[_Call]) -> Prefixes:
    """The prefixes of all ranks, by the prompts' indices in the joined call."""
    joined, first = {}, 0
    for call in calls:
        joined |= {(first + index, copy): prefix for (index, copy), prefix in call.prefixes.items()}
        first += len(call.prompts)
    return joined


class _Ranks:
    """The ranks of an engine."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def described(self, rank: int) -> str:
        return f"rank {dist.get_global_rank(self.group, rank)}, which shares its engine with this rank,"

    def gather(self, call: _Call) -> list[_Call]:
        """The calls of all ranks, in order of rank."""
        calls: list[_Call | None] = [None] * self.size
        dist.all_gather_object(calls, call, group=self.group)
        return [call for call in calls if call is not None]

    def agree(self, error: BaseException | None, response: tuple[int, int, tuple[int, ...]]) -> None:
        """Raise an error on all ranks if one has an error, or if they have sampled different responses.

        It takes a small all-gather for each response. All ranks of an engine complete responses in the same order.
        """
        digest = hashlib.blake2b(repr(response).encode(), digest_size=7).digest()
        kind = 0 if error is None else 2 if isinstance(error, NonFiniteError) else 1
        own = torch.tensor([kind, int.from_bytes(digest, "little")], dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)
        if error is not None:
            raise error
        kinds, digests = zip(*(row.tolist() for row in rows), strict=True)
        failed = next((rank for rank, kind in enumerate(kinds) if kind), None)
        if failed is not None:
            of_kind = NonFiniteError if 2 in kinds else RuntimeError
            raise of_kind(f"{self.described(failed)} ended the call with an error")
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"the {self.size} ranks of an engine have sampled different responses; report this with the versions, "
                f"and set {KEY}=1"
            )

    def agreed(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """A function that returns the same on all ranks: whether `interrupted` returns True on any of them.

        It is called in each decoding step. The ranks communicate only in every `_POLL_STEPS`-th one, because this takes
        time.
        """
        steps = itertools.count(1)

        def on_any_rank() -> bool:
            if next(steps) % _POLL_STEPS:
                return False
            answer = torch.tensor([interrupted()], dtype=torch.int64)
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.group)
            return bool(answer)

        return on_any_rank


def share(engine: Sampler, size: int) -> SharedSampler:
    """This rank's part of an engine as a sampler of its own prompts; an engine has `size` consecutive ranks.

    All ranks of the run call it.
    """
    group, _ = dist.new_subgroups(size, backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "this process is a member of a group"
    return SharedSampler(engine, group)


def check_tensor_parallel(size: int, config: ModelConfig, ranks: int, ranks_here: int) -> None:
    """Raise ConfigError if an engine cannot have `size` ranks.

    vLLM divides the attention heads, the MLP and the vocabulary, and divides or repeats the key heads.

    Args:
        size: `rollout.tensor_parallel`.
        config: the model's configuration.
        ranks: number of ranks of the run.
        ranks_here: number of ranks on one machine.
    """
    problem = _obstacle(size, config, ranks, ranks_here)
    if problem is None:
        return
    possible = [n for n in range(1, ranks_here + 1) if _obstacle(n, config, ranks, ranks_here) is None]
    raise ConfigError(f"{problem}; possible: {', '.join(map(str, possible))}", KEY, size)


def _obstacle(size: int, config: ModelConfig, ranks: int, ranks_here: int) -> str | None:
    """Why an engine cannot have `size` ranks, as a clause, or None."""
    if size < 1:
        return "is not a number of ranks"
    if ranks % size:
        return f"does not divide the number of ranks, {ranks} (start more with gpus=N or torchrun)"
    if ranks_here % size:
        return f"does not divide the {ranks_here} ranks of each machine, and an engine cannot span machines"
    text, (heads, keys, _) = config.get_text_config(), attention_sizes(config)
    inner = getattr(text, "intermediate_size", 0)
    if heads % size:
        return f"does not divide the model's {heads} attention heads"
    if keys % size and size % keys:
        return f"neither divides the model's {keys} key heads nor is a multiple of them"
    if inner % size:
        return f"does not divide the model's intermediate_size={inner}"
    padded = -(-text.vocab_size // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK
    if padded % size:
        return f"does not divide the model's vocabulary of {text.vocab_size} tokens, which vLLM pads to {padded}"
    return None


def ranks_of_run() -> tuple[int, int]:
    """(ranks of the run, ranks on this machine), as the process group and the launcher say."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
