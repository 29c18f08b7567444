"""The base class of all inference engines, with its inputs and outputs."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from upge.errors import ConfigError, EngineError, Interrupted, NonFiniteError, UserError
from upge.models.loading import ModelConfig, WeightTable, choose_max_length, choose_threads, random_state_kept


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Nothing else affects the distribution: a model's generation_config.json is ignored.

    Attributes:
        temperature: divides the logits. 0 takes the most likely token (greedy), and `top_p` then has no effect.
        top_p: in (0, 1]. Tokens are drawn from the smallest set whose probability reaches `top_p`, renormalized.
        max_tokens: maximum number of tokens of a response, including the stop token.
        stop_token_ids: tokens that end a response, usually the tokenizer's end of sequence. If empty, every response
            has `max_tokens` tokens.
        bfloat16_logits: round the logits to bfloat16 before everything else. Only the transformers engine supports it.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    bfloat16_logits: bool = False

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

    Attributes:
        token_ids: the response's tokens, including the stop token if there is one.
        logprobs: natural log of the probability with which each token was drawn, after temperature and top_p, and
            renormalized over the tokens that top_p keeps. Greedy rollouts have the log-probabilities at temperature 1.
        finished: True if the response ends with a stop token, False if it was cut at `max_tokens`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        index, copy: the index of its prompt, and its number among the responses to this prompt, from 0.
        prompt: the token ids before it: the prompt's, then those of a prefix that it continues.
        max_tokens: maximum number of tokens to sample.
    """

    index: int
    copy: int
    prompt: tuple[int, ...]
    seed: int
    max_tokens: int


#: (prompt's index, copy's index) → tokens that this response continues.
Prefixes = Mapping[tuple[int, int], Sequence[int]]


#: Called with the prompt's index, the copy's index and the rollout.
Arrived = Callable[[int, int, Rollout], None]
#: Called before each decoding step; raises `Interrupted` to end the call.
Poll = Callable[[], None]


class Sampler(ABC):
    """An inference engine with its own copy of the policy's weights.

    Attributes:
        name: "vllm" or "transformers".
        reason: why this engine is used, as a sentence for the user.
        max_length: maximum number of tokens of a prompt and its response together.
        vocabulary: number of token ids.
        threads: torch's threads while sampling on a CPU; None keeps those of the process.
    """

    name: str
    #: Whether the last call of `sample` left the engine in a state in which it must not sample again.
    _is_broken = False

    def __init__(
        self, config: ModelConfig, table: WeightTable, length: int | None, threads: int | None, device: str, reason: str
    ) -> None:
        self.max_length, self.vocabulary = choose_max_length(length, config), config.get_text_config().vocab_size
        self.threads, self.reason = choose_threads(threads, table, device), reason
        self._table, self._usable = table, True

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
        """Sample `n` responses to each prompt.

        The same weights and the same call give the same rollouts, in this process and in another. The random state of
        the process is restored, even if `arrived` draws from it.

        Args:
            prompts: token ids, one sequence per prompt; may be empty, as on a rank without work.
            n, sampling: responses per prompt, and the settings of sampling.
            seeds: one integer per prompt. A prompt's rollouts depend on its own seed and not on its place in the list,
                so another division of the prompts among calls or ranks gives the same rollouts, up to rounding where
                two tokens nearly tie.
            arrived: called in this thread as soon as a response is complete, while others are still generated.
                Generation waits for it, so it must be fast. An error that it raises ends the call; the sampler remains
                usable.
            interrupted: called before each decoding step; True ends the call, and the sampler remains usable.
            prefixes: the tokens that some responses continue. They count towards `max_tokens` and must be fewer. A
                rollout holds only the tokens after them.

        Returns:
            For each prompt, in order, its `n` rollouts.

        Raises:
            UserError: a prompt is empty, has an id outside the vocabulary, or exceeds `max_length` with `max_tokens`;
                or a prefix has such an id.
            ValueError: the numbers of prompts and seeds differ, `n` is below 1, or a prefix is too long.
            RuntimeError: the engine sleeps, has failed before, or the last `load_weights` failed.
            Interrupted: `interrupted` returned True.
            NonFiniteError: a log-prob is NaN or infinite. The engine's cache may hold NaN, so it must be restarted.
            EngineError: the engine failed, and must be restarted.
        """
        self.check(prompts, n, sampling, seeds)
        if not prompts:
            return []
        self._check_prefixes(prefixes or {}, sampling)
        results: list[dict[int, Rollout]] = [{} for _ in prompts]

        def complete(index: int, copy: int, rollout: Rollout) -> None:
            assert copy not in results[index], (index, copy)
            results[index][copy] = rollout
            if arrived is not None:
                arrived(index, copy, rollout)
            check_finite(index, copy, rollout)

        def poll() -> None:
            if interrupted is not None and interrupted():
                raise Interrupted("sampling was interrupted")

        def request(index: int, copy: int) -> Request:
            prefix = tuple((prefixes or {}).get((index, copy), ()))
            limit = sampling.max_tokens - len(prefix)
            return Request(index, copy, (*prompts[index], *prefix), response_seed(seeds[index], copy), limit)

        requests = [request(index, copy) for index in range(len(prompts)) for copy in range(n)]
        # The longest prompts first: a lack of memory shows at the start, and batches have similar lengths.
        requests.sort(key=lambda request: -len(request.prompt))
        try:
            with _threads_set(self.threads), random_state_kept():
                self._sample(requests, sampling, complete, poll)
        except (EngineError, NonFiniteError):
            self._usable, self._is_broken = False, True
            raise
        return [[rollouts[copy] for copy in range(n)] for rollouts in results]

    def check(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> None:
        """Raise the errors of `sample` for these arguments."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
        if n < 1:
            raise ValueError(f"n={n}: give at least one response per prompt")
        if not self._usable:
            raise RuntimeError(
                "the sampler has no complete weights, because it sleeps, it has failed, or the last load_weights "
                "failed midway; call load_weights with all of them"
            )
        self._check_prompts(prompts, sampling)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights and wake the engine. If this fails, sampling is refused until a complete set is loaded.

        Args:
            weights: pairs of a Hugging Face name and a tensor of any dtype and device. A tensor must remain valid only
                until the next pair is requested, so a generator may gather and free tensors one by one. For tied
                weights (output head and embedding) one name suffices; if several are given, the first counts.

        Raises:
            ModelError: a name is unknown or given twice, a shape is wrong, or weights are missing.
        """
        self._usable = False
        if self._is_broken:
            self.restart()
        self._load_weights(weights)
        self._usable = True

    def restart(self) -> None:
        """Start the engine anew; it has no weights until the next `load_weights`.

        `load_weights` restarts an engine that has failed. With several ranks, call this on all of them at the same time
        instead.
        """
        self._usable = False
        self._restart()
        self._is_broken = False

    def sleep(self) -> None:
        """Free device memory until the next `load_weights`, if the engine can; it may lose its weights."""

    def close(self) -> None:
        """Free the engine. The sampler cannot be used afterwards."""

    def _restart(self) -> None:
        """Start the engine anew, if a failure may have damaged its state."""

    @abstractmethod
    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        """Sample a response to each request and call `complete(index, copy, rollout)` as soon as it is complete.

        It calls `poll` before each decoding step, and `complete` or `poll` may raise an error. There is at least one
        request, all are valid, and the longest prompts come first. Results must not depend on their order.
        """

    @abstractmethod
    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, as `load_weights` documents."""

    def _check_prompts(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} has no tokens; give every prompt at least one token")
            self._check_tokens(f"prompt {index}", prompt)
            if len(prompt) + sampling.max_tokens > self.max_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens and the response may have "
                    f"{sampling.max_tokens}: together more than the model's {self.max_length}; lower "
                    "rollout.max_prompt_tokens or rollout.max_response_tokens"
                )

    def _check_prefixes(self, prefixes: Prefixes, sampling: Sampling) -> None:
        for (index, copy), prefix in prefixes.items():
            what = f"the prefix of response {copy} to prompt {index}"
            self._check_tokens(what, prefix)
            if len(prefix) >= sampling.max_tokens:
                raise ValueError(
                    f"{what} has {len(prefix)} tokens, and the response with it may have {sampling.max_tokens}; give "
                    "fewer, so that at least one token is sampled"
                )

    def _check_tokens(self, what: str, tokens: Sequence[int]) -> None:
        odd = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if odd is not None:
            raise UserError(
                f"{what} holds token id {odd}, the model's vocabulary has ids 0 to {self.vocabulary - 1}; does the "
                "tokenizer belong to model.path?"
            )


@contextmanager
def _threads_set(threads: int | None) -> Iterator[None]:
    """Set torch's number of threads in the block; None keeps it."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_finite(index: int, copy: int, rollout: Rollout) -> None:
    """Raise NonFiniteError if a log-prob of the rollout is NaN or infinite."""
    if not math.isfinite(sum(rollout.logprobs)):
        raise NonFiniteError(
            f"the sampler's log-probs are not finite (response {copy} to prompt {index}); the weights are corrupt, or "
            "the precision is too low"
        )


def rollout_of(token_ids: Sequence[int], logprobs: Sequence[float], sampling: Sampling) -> Rollout:
    """The rollout of these tokens. It is finished if and only if the last one is a stop token."""
    assert len(token_ids) == len(logprobs), (len(token_ids), len(logprobs))
    finished = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    return Rollout(tuple(token_ids), tuple(logprobs), finished)


def response_seed(seed: int, index: int) -> int:
    """A 62-bit seed for response `index` to a prompt with `seed`.

    It is a hash, because consecutive prompts often have consecutive seeds: with seed + index, response 1 to one prompt
    would draw the same random numbers as response 0 to the next.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
