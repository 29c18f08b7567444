"""The calls of the update on a GPU at the widths of 7B, with shapes and dtypes and without arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.config import MODELS
from upge.logprobs import Coefficients
from upge.train import packed_attention
from upge.train.activations import checkpoint_activations
from upge.train.packed_policy import Objective, PackedPolicy
from upge.train.packing import PackedBatch, pack

#: Responses of four rollouts to one prompt, and one long demonstration.
LENGTHS = (300, 301, 302, 303, 4000)


def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
    return Coefficients(logprobs.sum(), torch.ones_like(logprobs), torch.ones_like(entropies))


@pytest.fixture(params=["qwen2.5-math-7b", "llama-3.1-8b"])
def policy(request: pytest.FixtureRequest) -> PackedPolicy:
    """Two layers of a preset, in bfloat16 and with gradient checkpointing, on the device of the fixture `device`."""
    config = AutoConfig.from_pretrained(MODELS / request.param)
    config.num_hidden_layers = 2
    assert config.num_key_value_heads < config.num_attention_heads
    with torch.device(request.getfixturevalue("device")):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    checkpoint_activations(network, "full")
    return PackedPolicy(network).train()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Tensors without data and no compilation; (packed tokens, query heads, key heads) of each call of the kernel."""
    import torch.nn.attention.varlen as kernel

    calls: list[tuple[int, int, int]] = []
    original = kernel.varlen_attn

    def counted(query: Tensor, key: Tensor, *arguments: object, **settings: object) -> Tensor:
        assert query.dtype == key.dtype == torch.bfloat16
        calls.append((query.shape[0], query.shape[1], key.shape[1]))
        return original(query, key, *arguments, **settings)

    monkeypatch.setattr(kernel, "varlen_attn", counted)
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"):
        yield calls


def packed() -> PackedBatch:
    prompt = list(range(500))
    return pack([(prompt, list(range(length))) for length in LENGTHS], device="cpu")


@pytest.mark.parametrize("device", ["cuda"])
def test_forward_on_cuda(fake: list[tuple[int, int, int]], policy: PackedPolicy, device: str) -> None:
    batch = packed()
    assert batch.sharing is not None and len(batch.input_ids[0]) < sum(LENGTHS) + 5 * 500
    loss, logprobs, entropies = policy(batch.to(device), 0.7, objective=Objective(coefficients, entropy_gradient=True))
    config = policy.model.config
    whole = sum(length + 500 - 1 for length in LENGTHS)
    assert fake == [(whole, config.num_attention_heads, config.num_key_value_heads)] * 2
    assert logprobs.shape == entropies.shape == (sum(LENGTHS),) and logprobs.is_cuda and loss.shape == ()
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("device", ["meta"])
def test_backward(
    fake: list[tuple[int, int, int]], policy: PackedPolicy, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd needs a device, so this one is `meta`, with the kernel chosen as on CUDA."""
    monkeypatch.setattr(packed_attention, "_varlen_takes", lambda query, value: True)
    loss, *_ = policy(packed().to(device), 0.7, objective=Objective(coefficients, entropy_gradient=True))
    loss.backward()
    assert len(fake) == 4, "two layers, computed once more in the backward pass"
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert parameter.grad.dtype == torch.bfloat16, name
