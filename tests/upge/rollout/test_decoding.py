"""The sampler's cache and attention against transformers' own, step by step, as rows leave the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from upge.rollout import decoding
from upge.rollout.decoding import growing_kv_cache

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
TOKENS = 150  # more than the cache grows by at once


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=32,
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.2,
            )
        ).eval()


def logits_of_all_steps(model, cache, make_steps) -> list[torch.Tensor]:
    """The logits of the prompts and of every step; a row leaves after the fifth, another after the eightieth."""

    def forward(ids, mask, positions):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]

    with torch.inference_mode():
        actual = [forward(PROMPTS, MASK, (MASK.cumsum(1) - 1).clamp(min=0))]
        steps = make_steps(cache, forward)
        rows = torch.arange(3)
        for number in range(TOKENS):
            leaving = {5: [0, 2], 80: [1]}.get(number)
            if leaving:
                steps.keep(torch.tensor(leaving))
                rows = rows[leaving]
            token = (7 * number + 3 * rows[:, None]) % 32
            actual.append(steps(token).clone())
    return actual


@pytest.mark.parametrize("kind", ["run", "replayed"])
def test_the_same_logits_as_transformers(model, kind, monkeypatch):
    plain = logits_of_all_steps(
        model, DynamicCache(config=model.config), lambda cache, forward: decoding.Steps(cache, MASK, forward)
    )
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
        ours = logits_of_all_steps(model, growing_kv_cache(model.config, 4 + TOKENS), make)
    finally:
        model.set_attn_implementation("sdpa")
    assert len(plain) == len(ours) == TOKENS + 1
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert calls == ([3, 2, 1] if kind == "replayed" else [])


def test_layers_with_a_window_stay_transformers_own():
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    first, second = growing_kv_cache(config, 8).layers
    assert type(first).__name__ == "GrowingLayer" and type(second).__name__ == "DynamicSlidingWindowLayer"


def test_what_cannot_be_recorded_is_run(monkeypatch):
    def refused():
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refused)
    with pytest.warns(UserWarning, match=r"cannot be recorded \(operation not permitted when stream is capturing\)"):
        again = decoding.record(calls.append, torch.tensor([1]))
    again(torch.tensor([2]))
    assert [call.item() for call in calls] == [1, 2]


@pytest.mark.parametrize("masks", [None, 1, 6])
def test_grouped_attention_is_sdpa(masks):
    """Without a mask, with one for all heads, and with one for each, where heads of the same keys see other tokens."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator)
    key, value = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(2))
    mask = None if masks is None else torch.rand(3, masks, 1, 5, generator=generator) > 0.4
    if mask is not None:
        mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    actual, _ = decoding.attention(module, query, key, value, mask, scaling=0.3)
    keys, values = (x.repeat_interleave(3, dim=1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_rows_of_a_cache_that_change_places():
    cache = growing_kv_cache(Qwen2Config(num_hidden_layers=1), 8)
    first, new = torch.arange(2.0).reshape(2, 1, 1, 1), torch.full((2, 1, 1, 1), 9.0)
    cache.update(first, first, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    keys, _ = cache.update(new, new, 0)
    assert keys[:, 0, :, 0].tolist() == [[1, 9], [0, 9]]


@pytest.mark.parametrize("kind", ["plain", "under the kinds of layers"])
def test_a_rotary_embedding_that_looks_at_positions_is_not_recorded(kind):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    rope = dynamic if kind == "plain" else {"sliding_attention": {"rope_type": "default"}, "full_attention": dynamic}
    assert decoding._looks_at_positions(rope) and not decoding._looks_at_positions({"rope_type": "yarn"})
