"""Sampling with transformers: for small models, for machines without vLLM, and to compare with vLLM."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from upge.models import loading
from upge.models.loading import ModelConfig, WeightTable, random_state_kept
from upge.rollout import decoding
from upge.rollout.base import Arrived, Poll, Request, Sampler, Sampling, rollout_of

# Tokens (prompt and response, including padding) in a batch, which is the size of its cache. On a GPU, 512 rows of 512.
TOKEN_BUDGET = {"cpu": 32768, "cuda": 262144}
# Share of a batch's rows that must have ended before they are dropped. Dropping copies the cache of the other rows and,
# on a GPU, records the step again.
_WORTH_DROPPING = {"cpu": 1 / 8, "cuda": 1 / 2}


class TransformersSampler(Sampler):
    """Samples with a copy of the model in evaluation mode, in left-padded batches of similar prompt length.

    Finished responses are dropped from their batch, and the prompt of a group is computed once. transformers' own
    `generate` does neither, and only a logits processor can change how it draws. Its continuous batching
    (`generate_batch`) reached a quarter of the speed of `generate` on a CPU (0.7k instead of 2.6k to 3.0k tokens/s).
    It also draws from the random state of the process instead of a seed per response. On a GPU, use vLLM if it is
    installed.

    Tokens are drawn by inverting the cumulative distribution at one uniform number per token, from a generator per
    response, so a response depends neither on the others in its batch nor on the random state of the process.

    Args:
        model_path, dtype, max_length, threads, overrides: see `upge.rollout.load`.
        device: "cpu" or "cuda".
        token_budget: maximum number of tokens in a batch, including padding. A single longer sequence is a batch of its
            own.
        reason: why this engine is used.
    """

    name = "transformers"

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
        reason: str = "",
        overrides: Mapping[str, object] | None = None,
    ) -> None:
        config = loading.read_config(model_path, overrides)
        self._device = torch.device(device)
        self._budget = token_budget or TOKEN_BUDGET[self._device.type]
        weights_dtype = loading.choose_dtype(dtype, self._device.type)
        self._model = _load_model(str(model_path), config, weights_dtype, self._device)
        decoding.prepare(self._model)
        # Compute logits only at the last position. Those of all positions of a batch would be the largest tensor.
        has_logits_to_keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if has_logits_to_keep else {}
        table = WeightTable.of_model(self._model)
        super().__init__(config, table, max_length, threads, self._device.type, reason)

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        for batch in _batches(requests, self._budget):
            self._generate(batch, sampling, complete, poll)

    @torch.inference_mode()
    def _generate(self, batch: list[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        poll()
        most = max(request.max_tokens for request in batch)
        longest = max(len(request.prompt) for request in batch) + most
        cache = decoding.growing_kv_cache(self._model.config, longest)
        draw = _Draw(batch, sampling, self._device, complete)
        with _plain_linear():
            logits, mask = self._prefilled([request.prompt for request in batch], cache)
            token = draw(logits)
            steps = decoding.steps_of(self._model, cache, mask, most, partial(self._forward, cache))
            while not draw.is_done:
                poll()
                kept = draw.leaving()
                if kept is not None:
                    steps.keep(kept)
                    token = token[kept]
                token = draw(steps(token))

    def _prefilled(self, prompts: list[tuple[int, ...]], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the cache with the prompts. A prompt that occurs several times is computed once.

        Returns:
            The logits [B, V] after each prompt, and the mask [B, T] with 1 for tokens and 0 for padding.
        """
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in distinct], device=self._device)
        lengths = torch.tensor(list(map(len, distinct)), device=self._device)
        mask = (torch.arange(width, device=self._device) >= width - lengths[:, None]).long()
        logits = self._forward(cache, ids, mask, (mask.cumsum(dim=-1) - 1).clamp(min=0))
        if len(distinct) < len(prompts):
            places = {prompt: place for place, prompt in enumerate(distinct)}
            copies = torch.tensor([places[prompt] for prompt in prompts], device=self._device)
            cache.batch_select_indices(copies)
            logits, mask = logits[copies], mask[copies]
        return logits, mask

    def _forward(
        self, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The logits [b, V] after the last of the tokens [b, t], which follow the tokens in the cache."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._model(**inputs, past_key_values=cache, use_cache=True, **self._last_only).logits[:, -1]

    @torch.no_grad()
    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, tensor in self._table.checked(weights):
            parameters[name].copy_(tensor)

    def close(self) -> None:
        self._usable = False
        vars(self).pop("_model", None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _plain_linear() -> Iterator[None]:
    """Restore torch's own linear layers in the block.

    DeepSpeed's ZeRO-3 replaces them in the whole process by an autograd function, which takes a fifth of the time of a
    small model.
    """
    replaced = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.nn.functional.linear = replaced


class _Draw:
    """Draws the tokens of a batch step by step, and passes on each response when it ends.

    `device` is that of the logits. `complete` is called in the step in which a response ends.
    """

    def __init__(self, batch: Sequence[Request], sampling: Sampling, device: torch.device, complete: Arrived) -> None:
        self._batch, self._sampling, self._complete = batch, sampling, complete
        self._step = 0
        self._tokens = torch.zeros(len(batch), sampling.max_tokens, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(len(batch), sampling.max_tokens, device=device)
        self._limits = torch.tensor([request.max_tokens for request in batch], device=device)
        self._stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        # The rows of the batch that the model still runs, and which of them have not ended.
        self._rows = torch.arange(len(batch), device=device)
        self._open = torch.ones(len(batch), dtype=torch.bool, device=device)
        self._uniform = None
        if sampling.temperature > 0:
            # On the CPU for every device: the same numbers everywhere, and one short call per response.
            generators = (torch.Generator().manual_seed(request.seed) for request in batch)
            rows = [torch.rand(sampling.max_tokens, dtype=torch.float64, generator=own) for own in generators]
            self._uniform = torch.stack(rows).to(device)

    @property
    def is_done(self) -> bool:
        """Whether all responses have ended."""
        return not bool(self._open.any())

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token [b, 1] of each row that the model runs, from logits [b, V]."""
        logprobs = distribution(logits, self._sampling)
        if self._uniform is None:
            token = logprobs.argmax(dim=-1, keepdim=True)
        else:
            cumulative = logprobs.double().exp().cumsum(dim=-1)
            # Scaled to just below the total, so that rounding cannot step over the last token of non-zero probability.
            target = self._uniform[self._rows, self._step, None] * cumulative[:, -1:] * (1 - 1e-12)
            # NaN is above every number, so its search ends behind the last token.
            token = torch.searchsorted(cumulative, target, right=True).clamp(max=logprobs.shape[-1] - 1)
        drawn = logprobs.gather(-1, token)[:, 0]
        self._tokens[self._rows, self._step] = token[:, 0]
        self._logprobs[self._rows, self._step] = drawn
        self._step += 1
        self._pass_on(token[:, 0], drawn)
        return token

    def leaving(self) -> torch.Tensor | None:
        """The indices [b'] of the rows to continue with, or None if too few have ended for dropping to pay off."""
        if int((~self._open).sum()) < _WORTH_DROPPING[self._rows.device.type] * len(self._rows):
            return None
        kept = self._open.nonzero()[:, 0]
        self._rows, self._open = self._rows[kept], self._open[kept]
        return kept

    def _pass_on(self, token: torch.Tensor, logprob: torch.Tensor) -> None:
        """Pass on the rows whose response ends with this token [b], or with a `logprob` [b] that is not finite."""
        last = self._limits[self._rows] == self._step
        ending = self._open & (last | torch.isin(token, self._stops) | ~logprob.isfinite())
        self._open = self._open & ~ending
        for row in self._rows[ending].tolist():
            tokens, logprobs = self._tokens[row, : self._step].tolist(), self._logprobs[row, : self._step].tolist()
            request = self._batch[row]
            # Tensors that `arrived` creates must not be inference tensors, which autograd does not accept.
            with torch.inference_mode(False):
                self._complete(request.index, request.copy, rollout_of(tokens, logprobs, self._sampling))


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [B, V] of the sampling distribution in float32; at temperature 0, those of temperature 1."""
    logits = (logits.bfloat16() if sampling.bfloat16_logits else logits).float()
    if sampling.temperature == 0:
        return logits.log_softmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), float("-inf"))
    return logits.log_softmax(dim=-1)


def _batches(requests: Sequence[Request], budget: int) -> Iterator[list[Request]]:
    """Cut requests, the longest prompts first, into batches of at most `budget` tokens, including padding."""
    batch: list[Request] = []
    for request in requests:
        # A response with a prefix may be followed by one without, which samples more tokens.
        most = max((other.max_tokens for other in batch), default=0)
        if batch and (len(batch) + 1) * (len(batch[0].prompt) + max(most, request.max_tokens)) > budget:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _load_model(path: str, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with loading.progress_bars_hidden(), random_state_kept():
        # Any: the annotation does not know that `output_loading_info` makes it a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    model, loading_info = loaded
    loading.check_loaded(path, loading_info)
    loading.check_finite(path, model.named_parameters())
    return model.eval().requires_grad_(False).to(device)
