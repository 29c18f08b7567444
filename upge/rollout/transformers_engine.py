"""Sampling with transformers' own `generate`: for machines without vLLM, and a second opinion where vLLM is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upge.rollout.base import Rollout, Sampler, Sampling, rollout_of
from upge.rollout.model import (
    WeightTable,
    check_loaded,
    choose_dtype,
    choose_max_length,
    choose_threads,
    read_config,
)
from upge.rollout.randomness import random_state_kept, response_seed

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

    def _sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling,
                seeds: Sequence[int]) -> list[list[Rollout]]:
        rows = [(index, copy) for index in range(len(prompts)) for copy in range(n)]
        rows.sort(key=lambda row: len(prompts[row[0]]))
        results: list[list[Rollout]] = [[None] * n for _ in prompts]
        with random_state_kept():
            for batch in _batches(rows, [len(prompts[index]) for index, _ in rows], sampling.max_tokens, self._budget):
                rollouts = self._generate([prompts[index] for index, _ in batch], sampling,
                                          [response_seed(seeds[index], copy) for index, copy in batch])
                for (index, copy), rollout in zip(batch, rollouts, strict=True):
                    results[index][copy] = rollout
        return results

    @torch.inference_mode()
    def _generate(self, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int]) -> list[Rollout]:
        from transformers import GenerationConfig, LogitsProcessorList
        width = max(len(prompt) for prompt in prompts)
        pad = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
        padded = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        draw = _Draw(sampling, seeds, self._device)
        sequences = self._model.generate(
            torch.tensor(padded, device=self._device), attention_mask=torch.tensor(mask, device=self._device),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, use_cache=True, max_new_tokens=sampling.max_tokens, pad_token_id=pad,
                eos_token_id=list(sampling.stop_token_ids) or None, disable_compile=True))
        tokens = sequences[:, width:].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        return [_cut(row, values, sampling) for row, values in zip(tokens, logprobs, strict=True)]

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
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self._sampling = sampling
        self._step = 0
        self.logprobs: list[torch.Tensor] = []
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
        self._step += 1
        self.logprobs.append(logprobs.gather(-1, token)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(-1, token, 0.0)


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


def _batches(rows: list, lengths: list[int], max_tokens: int, budget: int) -> Iterator[list]:
    """Cut rows, sorted by prompt length, into batches of at most `budget` tokens, padding included."""
    batch: list = []
    for row, length in zip(rows, lengths, strict=True):
        if batch and (len(batch) + 1) * (length + max_tokens) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _cut(tokens: list[int], logprobs: list[float], sampling: Sampling) -> Rollout:
    """Drop what `generate` appended behind the first stop token."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in sampling.stop_token_ids), len(tokens))
    return rollout_of(tokens[:end], logprobs[:end], sampling)


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
