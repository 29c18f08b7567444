"""Compiled norms, rotary embeddings and gated activations against the model as transformers has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.config import MODELS
from tests.elementwise_ranks import PAIRS, traced
from tests.upge.train.test_update import launch
from upge.train import elementwise
from upge.train.activations import checkpoint_activations
from upge.train.elementwise import compile_elementwise
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack

#: A preset of every family, and the norms of a layer.
FAMILIES = {"qwen2.5-math-7b": 2, "llama-3.1-8b": 2, "qwen3-0.6b": 4, "smollm3-3b": 2, "gemma-3-1b-it": 6}
SMALL_SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODES = ("none", "selective", "full")


def config_of(preset: str, layers: int = 2, **sizes: Any) -> Any:
    config = AutoConfig.from_pretrained(MODELS / preset).get_text_config()
    for name, value in {"num_hidden_layers": layers, **sizes}.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def small_model(preset: str, dtype: torch.dtype, **sizes: int) -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config_of(preset, **{**SMALL_SIZES, **sizes}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.to(dtype)


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_compiled", traced)
    torch._dynamo.reset()
    counters.clear()


def results(network: Any, mode: str = "none", pairs: list[Any] = PAIRS) -> dict[str, Tensor]:
    """Log-probs, entropies and all gradients."""
    checkpoint_activations(network, mode)
    logprobs, entropies = PackedPolicy(network).train()(pack(pairs, "cpu"), entropy=True)
    (logprobs.sum() + entropies.square().sum()).backward()
    actual = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"logprobs": logprobs.detach(), "entropies": entropies.detach(), **actual}


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the norm of what is expected."""
    assert set(actual) == set(expected)
    return {n: float((actual[n].double() - e.double()).norm() / e.double().norm()) for n, e in expected.items()}


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_code_of_every_family_is_known(preset: str) -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config_of(preset))
    assert compile_elementwise(network) == {"norm": 2 * FAMILIES[preset] + 1, "rotary": 2, "activation": 2}


def test_other_code_stays_as_it_is() -> None:
    """GPT-2's code is not Llama's; Qwen2's norm and MLP here are not, because they were changed."""
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=11)
    with torch.device("meta"):
        assert not compile_elementwise(AutoModelForCausalLM.from_config(config))
        network = AutoModelForCausalLM.from_config(config_of("qwen2.5-math-7b", hidden_act="relu"))

    class Other(type(network.model.norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.weight * hidden_states

    network.model.norm.__class__ = Other
    assert compile_elementwise(network) == {"norm": 4, "rotary": 2}


@pytest.mark.slow
@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_results_are_those_of_the_plain_model(tracing: None, preset: str, mode: str) -> None:
    plain, ours = small_model(preset, torch.float32), small_model(preset, torch.float32)
    compile_elementwise(ours)
    off = errors(results(ours, mode), results(plain))
    assert counters["stats"]["unique_graphs"] >= 3
    assert max(off.values()) < 2e-5, off


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("preset", ["qwen3-0.6b", "gemma-3-1b-it"])
def test_another_length_does_not_compile_again(tracing: None, preset: str, key_heads: int) -> None:
    """Norms of queries and keys get [1, N, heads, size] in Qwen3 and [1, heads, N, size] in Gemma 3."""
    network = small_model(preset, torch.float32, num_key_value_heads=key_heads)
    compile_elementwise(network)
    results(network)
    graphs = counters["stats"]["unique_graphs"]
    for count in (8, 5, 3):
        network.zero_grad()
        results(network, pairs=PAIRS[:count])
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    # A rank without work.
    network.zero_grad()
    results(network, pairs=[])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.fixture(scope="module")
def under_zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero")
    network = small_model("qwen3-0.6b", torch.float32)
    network.save_pretrained(folder)
    launch("elementwise_ranks", 1, folder, folder / "found.pt")
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "lora"])
def test_under_zero_3(under_zero: dict[str, dict[str, Any]], mode: str) -> None:
    """Weights of norms are released after a layer's forward pass and gathered again for its backward pass."""
    actual = under_zero[mode]
    assert actual["graphs"] >= 3 and actual["released"]
    assert set(actual["compiled"]) == set(actual["plain"]) and len(actual["plain"]) > 20
    for name, expected in actual["plain"].items():
        assert torch.allclose(actual["compiled"][name], expected, rtol=1e-4, atol=1e-6), name
    assert actual["graphs after other lengths"] == actual["graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["qwen2.5-math-7b", "gemma-3-1b-it"])
def test_the_compiler_on_a_cpu(preset: str) -> None:
    """The functions of Llama's code, which Qwen's repeats, and of Gemma's.

    In bfloat16 a kernel rounds once and plain PyTorch after each operation, so ours is not further from float32.
    """
    torch._dynamo.reset()
    exact = results(small_model(preset, torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        ours = small_model(preset, dtype)
        compile_elementwise(ours)
        plain, actual = errors(results(small_model(preset, dtype)), exact), errors(results(ours), exact)
        for name in exact:
            assert actual[name] < (2e-5 if dtype == torch.float32 else 1.3 * plain[name] + 1e-3), name
