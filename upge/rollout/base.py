"""What a sampler is: the values that go in and come out, and the one class that every engine implements."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from upge.errors import ConfigError, UserError
from upge.models.loading import random_state_kept


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature:    divides the logits; 0 takes the most likely token (greedy), and `top_p` then has no effect.
    top_p:          in (0, 1]; draws from the smallest set of tokens whose probability reaches it, renormalised.
    max_tokens:     the most tokens a response may have, the stop token included.
    stop_token_ids: tokens that end a response, usually the tokenizer's eos. Empty: every response has `max_tokens`.

    Nothing else shapes the distribution: defaults in a model's generation_config.json are ignored.
    Raises ConfigError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"rollout.temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if 0.0 < self.temperature < 0.01:
            raise ConfigError(
                f"rollout.temperature={self.temperature}: below 0.01 the engines round it differently; use 0 for greedy"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.top_p={self.top_p}: must be above 0 and at most 1 (1 keeps every token)")
        if self.max_tokens < 1:
            raise ConfigError(f"rollout.max_response_tokens={self.max_tokens}: must be at least 1")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    token_ids: the response's tokens, the stop token included if there is one.
    logprobs:  natural log of the probability with which each token was drawn, that is after temperature and top_p.
               Greedy rollouts carry the log-probabilities at temperature 1.
    finished:  True if the response ends with a stop token, False if it was cut at `max_tokens`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Request:
    """One response to be drawn: copy `copy` for prompt `index`, from a seed of its own."""

    index: int
    copy: int
    prompt: tuple[int, ...]
    seed: int


#: Called with the prompt's index, the copy's index and the rollout.
Arrived = Callable[[int, int, Rollout], None]


class Sampler(ABC):
    """An inference engine with a copy of the policy's weights of its own.

    name:       "vllm" or "transformers".
    reason:     one sentence saying why this engine is used; for the user to read.
    max_length: the most tokens that a prompt and its response may have together.
    threads:    torch's threads while sampling on a CPU; None leaves the process's own number.
    """

    name: str

    def __init__(self, *, max_length: int, vocabulary: int, reason: str = "", threads: int | None = None) -> None:
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.reason = reason
        self.threads = threads
        self._usable = True

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        arrived: Arrived | None = None,
    ) -> list[list[Rollout]]:
        """Draw `n` responses to each prompt.

        prompts: token ids, one sequence a prompt; may be empty (a rank without work), then nothing happens.
        seeds:   one integer a prompt. A prompt's rollouts depend on its own seed, not on its place in the list:
                 another split of the prompts over calls or ranks gives the same ones, up to rounding where two tokens
                 nearly tie.
        arrived: called once a rollout as `arrived(prompt_index, copy_index, rollout)`, in this thread and as soon as
                 that response is complete, while others are still generated; generation waits for it, so let it only
                 hand the rollout on. What it raises ends the call, and the sampler can be used again.
        Returns a list of `n` rollouts for each prompt, in order. The same weights and the same call give the same
        rollouts, in this process and in a fresh one. The process's own random state is left as it was, whatever
        `arrived` draws from it.
        Raises UserError where a prompt is empty, holds an id outside the vocabulary, or leaves no room for
        `max_tokens` below `max_length`; ValueError where the numbers of prompts and seeds differ.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
        if n < 1:
            raise ValueError(f"n={n}: at least one response a prompt")
        if not self._usable:
            raise RuntimeError(
                "the last load_weights failed half-way: the sampler holds a mixture of old and new "
                "weights; call load_weights again with all of them"
            )
        self._check_prompts(prompts, sampling)
        if not prompts:
            return []
        results: list[list[Rollout | None]] = [[None] * n for _ in prompts]

        def complete(index: int, copy: int, rollout: Rollout) -> None:
            assert results[index][copy] is None, (index, copy)
            results[index][copy] = rollout
            if arrived is not None:
                arrived(index, copy, rollout)

        # The longest prompts first: what does not fit into memory shows at the start, and batches are alike in length.
        requests = [
            Request(index, copy, tuple(prompts[index]), response_seed(seeds[index], copy))
            for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
            for copy in range(n)
        ]
        with _threads_set(self.threads), random_state_kept():
            self._sample(requests, sampling, complete)
        return results

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights by `weights`: pairs of a Hugging Face name and a tensor of any dtype and device.

        A tensor must stay valid until the next pair is asked for, no longer, so a generator may gather and free them
        one by one. Of weights that are tied (the output head and the embedding) one name suffices; of several the
        first counts. Raises ModelError at an unknown name, a wrong shape, a name given twice, or missing names;
        sampling is then refused until a complete set was loaded.
        """
        self._usable = False
        self._load_weights(weights)
        self._usable = True

    def sleep(self) -> None:
        """Free device memory until `wake`, where the engine can; the weights are kept elsewhere."""

    def wake(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free the engine; the sampler cannot be used afterwards."""

    @abstractmethod
    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived) -> None:
        """Call `complete` once for each request, as soon as its response is complete.

        requests: checked, at least one, the longest prompts first; their order must not matter for the results.
        """

    @abstractmethod
    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`load_weights` without the bookkeeping."""

    def _check_prompts(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} has no tokens; give every prompt at least one token")
            if min(prompt) < 0 or max(prompt) >= self.vocabulary:
                odd = next(token for token in prompt if not 0 <= token < self.vocabulary)
                raise UserError(
                    f"prompt {index} holds token id {odd}, the model's vocabulary has ids 0 to "
                    f"{self.vocabulary - 1}; does the tokenizer belong to model.path?"
                )
            if len(prompt) + sampling.max_tokens > self.max_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens and the response may have "
                    f"{sampling.max_tokens}: together more than the model's {self.max_length}; lower "
                    "rollout.max_prompt_tokens or rollout.max_response_tokens"
                )


@contextmanager
def _threads_set(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rollout_of(token_ids: Sequence[int], logprobs: Sequence[float], sampling: Sampling) -> Rollout:
    """The rollout that these tokens make: finished if, and only if, the last one is a stop token."""
    assert len(token_ids) == len(logprobs), (len(token_ids), len(logprobs))
    finished = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    return Rollout(tuple(token_ids), tuple(logprobs), finished)


def response_seed(seed: int, index: int) -> int:
    """A 62-bit seed for response `index` to a prompt with `seed`.

    Hashed, because neighbouring prompts often get neighbouring seeds: with seed + index, response 1 of one prompt would
    draw the same random numbers as response 0 of the next.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
