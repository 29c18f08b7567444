"""Checkpointing of activations: equal gradients, fewer bytes, and no product of matrices computed twice."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from experiments.config import compose
from tests.models import save_random_model, trajectories, unrounded
from tests.running import SMALL, lines, run
from upge.errors import ConfigError
from upge.train.activations import checkpoint_activations
from upge.train.adapter import Adapter
from upge.train.config import LoraConfig
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack

PAIRS = [(t.prompt_ids, t.response_ids) for t in trajectories()[:6]]
MODES = ("none", "selective", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


def measured(folder, mode: str, lora: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients in float64, and the operations of a forward and a backward pass."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    unrounded(network)
    policy = PackedPolicy(network).train()
    if lora:
        for name, parameter in Adapter(network, LoraConfig(rank=3)).parameters():
            if ".lora_B." in name:
                torch.nn.init.constant_(parameter, 0.01)
    checkpoint_activations(network, mode, lora)
    with FlopCounterMode(display=False) as counter:
        logprobs, entropies = policy(pack(PAIRS, "cpu"), entropy=True)
        (logprobs.sum() + entropies.square().sum()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}, counter.get_total_flops()


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_gradients_are_equal_and_only_full_computes_products_again(folder, lora):
    (expected, least), *others = (measured(folder, mode, lora) for mode in MODES)
    for actual, _ in others:
        assert set(actual) == set(expected)
        for name, gradient in expected.items():
            assert torch.allclose(actual[name], gradient, rtol=1e-10, atol=1e-12), name
    assert float(sum(g.abs().sum() for g in expected.values())) > 1
    (_, selective), (_, full) = others
    # Of the adapters' products, B times what A gives is computed again, except the last, which no gradient needs.
    tokens = pack(PAIRS, "cpu").input_ids.numel()
    widths = sum(len(g) for name, g in expected.items() if ".lora_B." in name and "down_proj" not in name)
    assert selective - least == 2 * tokens * 3 * widths and full > 1.15 * selective


def test_a_pass_without_gradient_keeps_nothing(folder):
    network = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint_activations(network, "selective")
    with torch.no_grad():
        result = PackedPolicy(network).train()(pack(PAIRS, "cpu"))
    assert not any(type(thing).__name__ == "_VersionWrapper" for thing in gc.get_objects()) and len(result) == 2


def test_true_and_false_are_full_and_none():
    for text, mode in (("true", "full"), ("false", "none"), ("True", "full"), ("selective", "selective")):
        assert compose([f"model.gradient_checkpointing={text}"]).config.model.gradient_checkpointing == mode
    with pytest.raises(ConfigError, match="model.gradient_checkpointing: 'some' is not one of 'none'"):
        compose(["model.gradient_checkpointing=some"])


def test_a_run_with_it_is_the_run_without(tmp_path):
    rows = []
    for mode in ("none", "selective"):
        out = tmp_path / mode
        run(*SMALL, "steps=2", "eval.every=-1", f"model.gradient_checkpointing={mode}", f"output={out}")
        rows.append(lines(out / "metrics.jsonl"))
    for without, one in zip(*rows, strict=True):
        for key in ("loss", "grad_norm", "entropy"):
            assert one[key] == pytest.approx(without[key], rel=1e-4), key
