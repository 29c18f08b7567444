"""Sampling with transformers' own `generate`: for machines without vLLM, and a second opinion where vLLM is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upge.rollout.base import Arrived, Request, Sampler, Sampling, rollout_of
from upge.rollout.model import (
    WeightTable,
    check_loaded,
    choose_dtype,
    choose_max_length,
    choose_threads,
    read_config,
)
from upge.rollout.randomness import random_state_kept

# Tokens (prompt and response, padding included) in a batch: the size of its cache. 2,048 rows of 64 on a GPU.
TOKEN_BUDGET = {"cpu": 32768, "cuda": 131072}


class TransformersSampler(Sampler):
    """A copy of the model in evaluation mode, driven by left-padded `generate` in batches of similar prompt length.

    The rule between `generate` and transformers' continuous batching (`generate_batch`): always `generate`. On a CPU
    `generate_batch` was measured at a quarter of its speed (0.7k against 2.6k to 3.0k tokens/s), and it draws from the
    process's random state, not from a seed for each response. On a GPU neither was measured; vLLM is meant for it.

    Tokens are drawn by inverting the cumulative distribution at one uniform number a token, from a generator of the
    response's own: a response depends neither on its neighbours in the batch nor on the process's random state.

    token_budget: the most tokens in a batch, padding included; a single longer sequence is a batch of its own.
    """

    name = "transformers"

    def __init__(self, model_path: str | Path, *, dtype: str = "auto", max_length: int | None = None,
                 device: str = "cpu", token_budget: int | None = None, threads: int | None = None,
                 reason: str = "", overrides: Mapping[str, Any] | None = None) -> None:
        config = read_config(model_path, overrides)
        self._device = torch.device(device)
        self._budget = token_budget or TOKEN_BUDGET[self._device.type]
        self._model = _load_model(str(model_path), config, choose_dtype(dtype, self._device.type)).to(self._device)
        self._table = WeightTable.of_model(self._model)
        threads = choose_threads(threads, self._table, self._device.type)
        super().__init__(max_length=choose_max_length(max_length, config),
                         vocabulary=config.get_text_config().vocab_size, reason=reason, threads=threads)

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived) -> None:
        for batch in _batches(requests, sampling.max_tokens, self._budget):
            self._generate(batch, sampling, complete)

    @torch.inference_mode()
    def _generate(self, batch: list[Request], sampling: Sampling, complete: Arrived) -> None:
        from transformers import GenerationConfig, LogitsProcessorList
        width = max(len(request.prompt) for request in batch)
        pad = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
        padded = [[pad] * (width - len(request.prompt)) + list(request.prompt) for request in batch]
        mask = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in batch]

        def ended(row: int, tokens: list[int], logprobs: list[float]) -> None:
            # What `arrived` makes of it shall not be an inference tensor, which no gradient may touch.
            with torch.inference_mode(False):
                complete(batch[row].index, batch[row].copy, rollout_of(tokens, logprobs, sampling))

        draw = _Draw(sampling, [request.seed for request in batch], self._device, ended)
        self._model.generate(
            torch.tensor(padded, device=self._device), attention_mask=torch.tensor(mask, device=self._device),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, use_cache=True, max_new_tokens=sampling.max_tokens, pad_token_id=pad,
                eos_token_id=list(sampling.stop_token_ids) or None, disable_compile=True))

    @torch.no_grad()
    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, tensor in self._table.checked(weights):
            parameters[name].copy_(tensor)

    def close(self) -> None:
        self._usable = False
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _Draw:
    """A logits processor that draws the token itself, keeps its log-probability and leaves `generate` no choice.

    Called with token ids [B, t] and logits [B, V]; returns scores [B, V] that are -inf except at the drawn token.
    ended: called as `ended(row, tokens, logprobs)` at the step in which a row draws a stop token or its last token.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device,
                 ended: Callable[[int, list[int], list[float]], None]) -> None:
        self._sampling = sampling
        self._ended = ended
        self._step = 0
        self._tokens = torch.zeros(len(seeds), sampling.max_tokens, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(len(seeds), sampling.max_tokens, device=device)
        self._stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        self._open = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self._uniform = None
        if sampling.temperature > 0:
            # On the CPU, whatever the device: the same numbers everywhere, one short call a response.
            rows = [torch.rand(sampling.max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                    for seed in seeds]
            self._uniform = torch.stack(rows).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = distribution(scores, self._sampling)
        if self._uniform is None:
            token = logprobs.argmax(dim=-1, keepdim=True)
        else:
            cumulative = logprobs.double().exp().cumsum(dim=-1)
            # Scaled by just under the total, so that rounding cannot step over the last token of non-zero probability.
            target = self._uniform[:, self._step, None] * cumulative[:, -1:] * (1 - 1e-12)
            token = torch.searchsorted(cumulative, target, right=True)
        self._tokens[:, self._step] = token[:, 0]
        self._logprobs[:, self._step] = logprobs.gather(-1, token)[:, 0]
        self._step += 1
        self._tell(token[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(-1, token, 0.0)

    def _tell(self, token: torch.Tensor) -> None:
        """Hand on the rows whose response ends with this token [B]."""
        last = self._step == self._sampling.max_tokens
        ending = self._open if last else self._open & torch.isin(token, self._stops)
        self._open = self._open & ~ending
        for row in ending.nonzero()[:, 0].tolist():
            self._ended(row, self._tokens[row, :self._step].tolist(), self._logprobs[row, :self._step].tolist())


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [B, V] of the sampling distribution, float32; at temperature 0 those of temperature 1."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.log_softmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), float("-inf"))
    return logits.log_softmax(dim=-1)


def _batches(requests: Sequence[Request], max_tokens: int, budget: int) -> Iterator[list[Request]]:
    """Cut requests, the longest prompts first, into batches of at most `budget` tokens, padding included."""
    batch: list[Request] = []
    for request in requests:
        if batch and (len(batch) + 1) * (len(batch[0].prompt) + max_tokens) > budget:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _load_model(path: str, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with random_state_kept():
            model, found = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True
            )
    finally:
        if bars:
            logging.enable_progress_bar()
    check_loaded(path, found)
    # `generate` fills what is not asked for from here: a model's own top_k or repetition_penalty would leak in.
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)
