"""Packed rows against the padded plain model, their layout, and the plan of micro-batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.models import unrounded
from upge.errors import ModelError
from upge.train.packed_attention import packed_attention
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack, packed_length

VOCABULARY, TEMPERATURE = 37, 0.8
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
#: Model type and settings; windows are shorter than the longest sequences.
MODELS = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral window": ("mistral", {"sliding_window": 4}),
    # Windows with a rotary base of their own, norms of query and key, and another scale of the scores.
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),  # a layer without positions
    "phi, a head with bias": ("phi", {}),
}


def make_model(name: str, dtype: torch.dtype = torch.float64, attention: str = "eager"):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[name]
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(SMALL | settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    if dtype == torch.float64:
        unrounded(model)
    return model


def make_trajectories(seed: int = 0, count: int = 7) -> list[tuple[list[int], list[int]]]:
    """Some responses are empty and two trajectories have the same length, so that both paths are taken."""
    rng = random.Random(seed)
    sizes = [(4, 7), (6, 5), (1, 0), *((rng.randint(1, 6), rng.randint(0, 12)) for _ in range(count - 3))]
    return [tuple([rng.randrange(1, VOCABULARY) for _ in range(size)] for size in pair) for pair in sizes]


def padded_forward(model, trajectories) -> tuple[Tensor, Tensor]:
    """[B, T] log-probs and entropies from full logits of the padded batch, zero behind each response."""
    longest = max(len(p) + len(r) for p, r in trajectories)
    ids = torch.tensor([[*p, *r] + [0] * (longest - len(p) - len(r)) for p, r in trajectories])
    real = torch.arange(longest) < torch.tensor([[len(p) + len(r)] for p, r in trajectories])
    logp = (model(ids, attention_mask=real.long()).logits / TEMPERATURE).log_softmax(-1)
    shape = len(trajectories), max(len(r) for _, r in trajectories)
    logprobs, entropies = logp.new_zeros(shape), logp.new_zeros(shape)
    for row, (prompt, response) in enumerate(trajectories):
        steps = logp[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
        chosen = steps.gather(1, torch.tensor(response, dtype=torch.long)[:, None])[:, 0]
        logprobs = logprobs.index_put((torch.tensor(row), torch.arange(len(response))), chosen)
        spread = -(steps.exp() * steps).sum(-1)
        entropies = entropies.index_put((torch.tensor(row), torch.arange(len(response))), spread)
    return logprobs, entropies


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention takes its softmax in float32 even for float64 models; here it is taken in float64."""
    rounded = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return rounded(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_padded_plain_model(name, dtype, tolerance, exact_softmax):
    trajectories = make_trajectories()
    plain, policy = make_model(name, dtype), PackedPolicy(make_model(name, dtype), chunk_size=9)
    batch = pack(trajectories)
    ours = [batch.pad(x) for x in policy(batch, temperature=TEMPERATURE, entropy=True)]
    theirs = padded_forward(plain, trajectories)
    coefficients = torch.linspace(-1, 1, ours[0].numel(), dtype=dtype).reshape(batch.shape) / ours[0].numel()
    for logprobs, entropies in (ours, theirs):
        (coefficients * (logprobs + 0.5 * entropies)).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    moved = 0
    for (label, expected), parameter in zip(plain.named_parameters(), policy.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=tolerance, rtol=tolerance, msg=label)
        moved += expected.grad.abs().max() > 100 * tolerance
    assert moved > 10


@pytest.mark.parametrize("name", ["qwen2 tied", "mistral window"])
def test_no_sequence_sees_another(name):
    policy = PackedPolicy(make_model(name))
    trajectories = make_trajectories()
    changed = list(trajectories)
    prompt, response = trajectories[1]
    changed[1] = [(t + 1) % VOCABULARY for t in prompt], [(t + 1) % VOCABULARY for t in response]
    before, after = (b.pad(policy(b)[0]) for b in (pack(trajectories), pack(changed)))
    others = torch.arange(len(trajectories)) != 1
    assert torch.equal(before[others], after[others])
    assert (before[1] - after[1]).abs().max() > 1e-3
    without = [t for i, t in enumerate(trajectories) if i != 1]
    alone = pack(without)
    torch.testing.assert_close(alone.pad(policy(alone)[0]), before[others], atol=1e-12, rtol=0)


def test_gradient_of_one_sequence_does_not_reach_another():
    model = make_model("qwen2 untied")
    trajectories = [([1, 2, 3], [4, 5]), ([6, 7], [8, 9, 10, 11])]
    batch = pack(trajectories)
    logprobs = batch.pad(PackedPolicy(model)(batch)[0])
    (gradient,) = torch.autograd.grad(logprobs[0].sum(), [model.get_input_embeddings().weight])
    touched = gradient.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [1, 2, 3, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_and_changes_nothing(reentrant, monkeypatch):
    batch = pack(make_trajectories())
    gradients, calls = [], []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls[-1] += 1
        return sdpa(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for checkpointing in (False, True):
        calls.append(0)
        policy = PackedPolicy(make_model("qwen2 tied")).train()
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            policy.model.enable_input_require_grads()
        policy(batch)[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert calls[1] == 2 * calls[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_empty_batch_gives_zero_gradients_to_every_parameter():
    policy = PackedPolicy(make_model("qwen2 untied"))
    batch = pack([])
    logprobs, entropies = policy(batch, entropy=True)
    assert batch.pad(logprobs).shape == batch.response_mask.shape == (0, 0)
    (logprobs.sum() + entropies.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("gemma2", {"head_dim": 8}, "gemma2.*final_logit_softcapping = 30.0"),
        ("granite", {"logits_scaling": 8.0}, "granite.*logits_scaling = 8.0"),
        ("bloom", {}, "bloom.*AttentionInterface"),
        ("t5", {}, "t5.*encoder-decoder"),
        ("qwen3_next", {"num_hidden_layers": 4}, "qwen3_next.*AttentionInterface"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(kind, settings, message):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **(SMALL | settings))
    with torch.device("meta"):
        loader = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        model = loader.from_config(config)
    with pytest.raises(ModelError, match=message):
        PackedPolicy(model)


def test_layers_and_scores_that_are_not_supported_are_refused():
    model = make_model("qwen2 tied")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="qwen2.*chunked_attention"):
        PackedPolicy(model)
    row = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="Linear changes its attention scores .softcap"):
        packed_attention(torch.nn.Linear(1, 1), row, row, row, None, sequence_lengths=(3,), softcap=50.0)
    with pytest.raises(ModelError, match="Linear got an input other than the packed row"):
        packed_attention(torch.nn.Linear(1, 1), row, row, row, None, sequence_lengths=(2,))


def test_a_trunk_without_a_head_and_dropout_and_direct_calls_are_refused():
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        PackedPolicy(make_model("qwen2 tied").model)
    policy = PackedPolicy(make_model("qwen2 tied"))
    with pytest.raises(ModelError, match="no sequence lengths.*PackedPolicy"):
        policy.model(torch.ones(1, 4, dtype=torch.long))
    policy.model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match="dropout 0.1"):
        policy.train()(pack(make_trajectories()))


def test_layout_of_a_small_row():
    batch = pack([([1, 2], [3]), ([4], [5, 6, 7]), ([8], [])])
    assert batch.input_ids.tolist() == [[4, 5, 6, 1, 2, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == (3, 2, 1) and batch.shape == (3, 3)
    assert batch.predictors.tolist() == [0, 1, 2, 4]
    assert batch.targets.tolist() == [5, 6, 7, 3]
    assert batch.rows.tolist() == [1, 1, 1, 0] and batch.columns.tolist() == [0, 1, 2, 0]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    padded = batch.pad(values, fill=-1.0)
    assert padded.tolist() == [[4.0, -1.0, -1.0], [1.0, 2.0, 3.0], [-1.0, -1.0, -1.0]]
    assert torch.equal(batch.unpad(padded), values)
    assert batch.response_mask.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    (padded * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert values.grad.tolist() == [3.0, 4.0, 5.0, 0.0]


@pytest.mark.parametrize("seed", range(20))
def test_layout_of_random_rows(seed):
    trajectories = make_trajectories(seed, count=3 + seed)
    batch = pack(trajectories).to("cpu")
    assert sum(batch.lengths) == batch.input_ids.shape[1] == sum(packed_length(*t) for t in trajectories)
    assert list(batch.lengths) == sorted(batch.lengths, reverse=True)
    target_ids = batch.pad(batch.targets, fill=-1)
    for row, (prompt, response) in enumerate(trajectories):
        assert target_ids[row][batch.response_mask[row]].tolist() == response
        places = batch.predictors[batch.rows == row]
        assert batch.position_ids[0, places].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(response)))
        for place, column in zip(places.tolist(), range(len(response)), strict=True):
            seen = batch.input_ids[0, place - batch.position_ids[0, place] : place + 1].tolist()
            assert seen == prompt + response[:column]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="trajectory 1 has an empty prompt"):
        pack([([1], [2]), ([], [3])])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2 tied", "mistral window"])
def test_the_variable_length_kernel_equals_the_loop(name, monkeypatch):
    policy = PackedPolicy(make_model(name, torch.bfloat16).to("cuda"))
    batch = pack(make_trajectories(), "cuda")
    kernel = policy(batch)[0]
    monkeypatch.setattr("upge.train.packed_attention._varlen_takes", lambda query, value: False)
    torch.testing.assert_close(kernel, policy(batch)[0], atol=0.05, rtol=0.05)
