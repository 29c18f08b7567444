"""Prompts that stand in a row once: the same log-probs, entropies and gradients as with each sequence whole."""

from __future__ import annotations

import random

import pytest
import torch

from tests.models import unrounded
from tests.upge.train.test_packing import MODELS, TEMPERATURE, VOCABULARY, exact_softmax, make_model, padded_forward
from upge.errors import ModelError
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import Sharing, pack, packed_length

__all__ = ["exact_softmax"]


def groups(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Three prompts with four, one and five responses, of length 0 and 1 among them, and two of the same length."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, VOCABULARY) for _ in range(size)] for size in (7, 3, 5)]
    sizes = [(0, (6, 0, 3, 6)), (1, (4,)), (2, (1, 8, 2, 1, 0))]
    actual = [
        (prompts[name], [rng.randrange(1, VOCABULARY) for _ in range(size)]) for name, own in sizes for size in own
    ]
    rng.shuffle(actual)
    return actual


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_padded_plain_model(name, seed, exact_softmax):
    trajectories = groups(seed)
    plain, network = make_model(name), make_model(name)
    for model in (plain, network):
        unrounded(model)
    policy = PackedPolicy(network, chunk_size=9)
    batch = pack(trajectories)
    assert batch.sharing is not None
    ours = [batch.pad(x) for x in policy(batch, temperature=TEMPERATURE, entropy=True)]
    theirs = padded_forward(plain, trajectories)
    coefficients = torch.linspace(-1, 1, ours[0].numel(), dtype=torch.float64).reshape(batch.shape) / ours[0].numel()
    for logprobs, entropies in (ours, theirs):
        (coefficients * (logprobs + 0.5 * entropies)).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for (label, expected), parameter in zip(plain.named_parameters(), policy.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-10, rtol=1e-10, msg=label)


@pytest.mark.parametrize("name", ["qwen2 tied", "mistral window"])
def test_no_response_sees_another_and_each_sees_its_prompt(name):
    policy, before = PackedPolicy(make_model(name)), groups()
    place = next(i for i, (_, response) in enumerate(before) if len(response) == 8)
    changed = list(before)
    prompt, response = before[place]
    changed[place] = prompt, [(token + 1) % VOCABULARY for token in response]
    a, b = (batch.pad(policy(batch)[0]) for batch in (pack(before), pack(changed)))
    others = torch.arange(len(before)) != place
    assert torch.equal(a[others], b[others]) and float((a[place] - b[place]).detach().abs().max()) > 1e-3
    other_prompt = [(([9, 9, 9, 9, 9] if p == prompt else p), r) for p, r in before]
    batch = pack(other_prompt)
    c = batch.pad(policy(batch)[0])
    same = torch.tensor([p != prompt for p, _ in before])
    assert torch.equal(a[same], c[same])
    assert all(float((a[i] - c[i]).detach().abs().max()) > 1e-6 for i, (p, r) in enumerate(before) if p == prompt and r)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpointing(reentrant):
    batch, gradients = pack(groups()), []
    for checkpointing in (False, True):
        policy = PackedPolicy(make_model("qwen2 tied")).train()
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            policy.model.enable_input_require_grads()
        policy(batch)[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_row_by_hand():
    """Two responses to [1, 2], one of a single token; [8] alone; [1, 2] again, without a response."""
    batch = pack([([1, 2], [3, 4, 5]), ([8], [9, 10]), ([1, 2], [6]), ([1, 2], [])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.lengths == (4, 2, 2, 2) and batch.cu_seqlens.tolist() == [0, 4, 6, 8, 10]
    assert batch.sharing == Sharing((2, 2, 2), (0, 1, 2, 0, 0))
    assert batch.predictors.tolist() == [1, 2, 3, 4, 5, 1] and batch.targets.tolist() == [3, 4, 5, 9, 10, 6]
    row = torch.arange(6.0)[None, None, :, None]
    assert batch.sharing.spread(row).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]
    assert batch.sharing.gathered(batch.sharing.spread(row).transpose(1, 2)).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(10))
def test_random_rows(seed):
    trajectories = groups(seed)
    batch = pack(trajectories)
    whole = sum(packed_length(*pair) for pair in trajectories)
    assert sum(batch.lengths) == whole > batch.input_ids.numel() == sum(batch.sharing.segments)
    ids = batch.sharing.spread(batch.input_ids[:, None, :, None]).flatten()
    places = batch.sharing.spread(batch.position_ids[:, None, :, None]).flatten()
    sequences = sorted(([*p, *r[:-1]] for p, r in trajectories), key=len, reverse=True)
    assert places.tolist() == [place for sequence in sequences for place in range(len(sequence))]
    assert sorted(s.tolist() for s in ids.split(list(batch.lengths))) == sorted(sequences)
    target_ids = batch.pad(batch.targets, fill=-1)
    for row, (_, response) in enumerate(trajectories):
        assert target_ids[row][batch.response_mask[row]].tolist() == response


def test_prompts_in_common_stand_apart_where_that_saves_little_or_is_not_wanted():
    long = [([1, 2], list(range(3, 35))), ([1, 2], list(range(3, 36)))]
    assert pack(long).sharing is None and pack(long[:1]).sharing is None
    assert pack(groups(), share=False).sharing is None
    plain, shared = pack(groups(), share=False), pack(groups())
    policy = PackedPolicy(make_model("qwen2 tied"))
    torch.testing.assert_close(plain.pad(policy(plain)[0]), shared.pad(policy(shared)[0]), atol=1e-12, rtol=0)


def test_a_model_that_loses_the_sharing_is_refused():
    """One whose code hands on the lengths but not how prompts are shared would compute something else."""
    policy, batch = PackedPolicy(make_model("qwen2 tied")), pack(groups())
    trunk = policy.model.base_model
    forward = trunk.layers[0].self_attn.forward
    trunk.layers[0].self_attn.forward = lambda *args, sharing=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ModelError, match="got an input other than the packed row"):
        policy(batch)
