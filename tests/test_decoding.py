"""The sampler's cache and attention against transformers' own, step by step, as rows leave the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from upge.rollout import decoding

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
TOKENS = 150  # more than the cache grows by at once


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(
            vocab_size=32, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)).eval()


def logits_of_all_steps(model, cache, make_steps) -> list[torch.Tensor]:
    """The logits of the prompts and of every step; a row leaves after the fifth, another after the eightieth."""
    def forward(ids, mask, positions):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]

    with torch.inference_mode():
        found = [forward(PROMPTS, MASK, (MASK.cumsum(1) - 1).clamp(min=0))]
        steps = make_steps(cache, forward)
        rows = torch.arange(3)
        for number in range(TOKENS):
            leaving = {5: [0, 2], 80: [1]}.get(number)
            if leaving:
                steps.keep(torch.tensor(leaving))
                rows = rows[leaving]
            token = (7 * number + 3 * rows[:, None]) % 32
            found.append(steps(token).clone())
    return found


@pytest.mark.parametrize("kind", ["run", "replayed"])
def test_the_same_logits_as_transformers(model, kind, monkeypatch):
    plain = logits_of_all_steps(model, DynamicCache(config=model.config),
                                lambda cache, forward: decoding.Steps(cache, MASK, forward))
    # Without a GPU what would be recorded is run; as there, the first call is made twice.
    calls = []

    def record(function, example):
        function(example)
        calls.append(len(example))
        return function

    monkeypatch.setattr(decoding, "record", record)
    decoding.prepare(model)
    try:
        assert model.config._attn_implementation == decoding.IMPLEMENTATION
        make = {
            "run": lambda cache, forward: decoding.steps_of(model, cache, MASK, TOKENS, forward),
            "replayed": lambda cache, forward: decoding.ReplayedSteps(cache, MASK, TOKENS, forward),
        }[kind]
        ours = logits_of_all_steps(model, decoding.growing_cache(model.config), make)
    finally:
        model.set_attn_implementation("sdpa")
    assert len(plain) == len(ours) == TOKENS + 1
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert calls == ([3, 2, 1] if kind == "replayed" else [])


def test_layers_with_a_window_stay_transformers_own():
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    first, second = decoding.growing_cache(config).layers
    assert type(first).__name__ == "GrowingLayer" and type(second).__name__ == "DynamicSlidingWindowLayer"
