"""The count of kernels against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from experiments.bench import mfu
from experiments.bench.kernels import ATTENTION, ELEMENTWISE, HEAD, PRODUCTS, Kernel, Kernels, fused
from experiments.bench.mfu import Case, Settings
from experiments.run.model_shape import ModelShape
from experiments.scaling.counts import BANDWIDTH, PEAK
from upge.errors import ConfigError
from upge.train import elementwise
from upge.train.activations import Checkpointing

MODES: tuple[Checkpointing, ...] = ("full", "selective", "none")
N, D, V, INNER, KEYS, LAYERS = 30, 64, 67, 96, 32, 3


def small_config() -> Any:
    return AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=D, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def ran(kernels: Kernels) -> list[tuple[str, float, float]]:
    return [(kernel.part, kernel.operations, kernel.bytes) for kernel in kernels.ran]


def test_kernels_by_hand() -> None:
    x, w, ids = half(5, 8), half(8, 4), torch.zeros(3, dtype=torch.long, device="meta")
    with Kernels([5]) as kernels:
        made = x @ w
        made.view(20).add_(1.0)
        made.float()
        half(1, 4).expand(5, 4) + made
        F.embedding(ids, half(1000, 4))
        made.copy_(made.clone())
    product = 2 * (5 * 8 + 8 * 4 + 5 * 4)
    moved = [(PRODUCTS, 2 * 5 * 8 * 4, product), (ELEMENTWISE, 0, 2 * 40), (ELEMENTWISE, 0, 40 + 80)]
    moved += [(ELEMENTWISE, 0, 8 + 40 + 40), (ELEMENTWISE, 0, 24 + 24 + 24), (ELEMENTWISE, 0, 80), (ELEMENTWISE, 0, 80)]
    assert ran(kernels) == moved


def test_the_longer_of_operations_and_bytes() -> None:
    assert Kernel(PRODUCTS, PEAK, BANDWIDTH / 2, False).seconds() == 1
    assert Kernel(PRODUCTS, PEAK, BANDWIDTH / 2, False).seconds(products=0.5, attention=0.1) == 2
    assert Kernel(ATTENTION, PEAK, BANDWIDTH / 2, True).seconds(products=0.5, attention=0.1) == 10
    assert Kernel(ELEMENTWISE, 0, BANDWIDTH, False).seconds(memory=0.5) == 2


def test_a_compiled_function_is_one_kernel_and_its_gradient_another() -> None:
    kernels = Kernels([N])
    gate, up = half(N, D).requires_grad_(), half(N, D).requires_grad_()
    with kernels:
        fused(kernels, elementwise.silu_gated)(gate, up).backward(half(N, D))
    size = 2 * N * D
    assert ran(kernels) == [(ELEMENTWISE, 0, 3 * size), (ELEMENTWISE, 0, 5 * size)]
    hidden, weight = half(N, D).requires_grad_(), half(D).requires_grad_()
    kernels = Kernels([N])
    with kernels:
        fused(kernels, elementwise.rms_norm)(hidden, weight, 1e-6).backward(half(N, D))
    both = [2 * size + 2 * D, 3 * size + 4 * D, 2 * size + 2 * D]
    assert [kernel.bytes for kernel in kernels.ran] == both


@pytest.mark.parametrize("is_fused", [False, True])
def test_the_operations_of_a_model(is_fused: bool) -> None:
    """The backward pass of attention computes the scores again: 7 products of a causal square instead of 6."""
    config, batch = small_config(), mfu.micro_batch(100, 10, 20)
    assert batch.lengths == (29, 29, 29)
    least = mfu.model_operations(ModelShape.of(config, "bfloat16"), batch)
    actual: dict[Checkpointing, float] = {}
    for mode in MODES:
        kernels = mfu.counted(config, mode, is_fused, batch)
        actual[mode] = sum(kernel.operations for kernel in kernels.ran)
        assert set(kernels.seconds()) == {PRODUCTS, ATTENTION, ELEMENTWISE, HEAD}
    tokens, square = batch.input_ids.numel(), LAYERS * D * sum(length * length for length in batch.lengths)
    norms = 6 * tokens * D * (2 * LAYERS + 1)
    assert actual["none"] == actual["selective"] == least - norms + square
    # The last product of a layer is not computed again, because no gradient needs it.
    again = LAYERS * 2 * tokens * D * (D + 2 * KEYS + D + 2 * INNER)
    assert actual["full"] == actual["none"] + again + 2 * square


def test_layers_are_alike() -> None:
    config, batch = small_config(), mfu.micro_batch(100, 10, 20)
    for mode in MODES:
        (short,) = mfu.seconds_of(config, mode, True, batch, {"memory": 0.5})
        whole = mfu.counted(config, mode, True, batch).seconds(memory=0.5)
        assert dict(short) == pytest.approx(dict(whole), rel=1e-9)


def test_compiled_parts_move_less() -> None:
    config, batch = small_config(), mfu.micro_batch(100, 10, 20)
    for mode in MODES:
        plain, ours = (mfu.counted(config, mode, is_fused, batch).seconds() for is_fused in (False, True))
        assert ours[ELEMENTWISE] < 0.75 * plain[ELEMENTWISE] and ours[PRODUCTS] == plain[PRODUCTS]


@pytest.mark.parametrize("given", [{"modes": "ful"}, {"micro_batches": "9216,100"}, {"micro_batches": "many"}])
def test_invalid_settings(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}: found"):
        mfu.run(Settings(**given))


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = Counter({PRODUCTS: 0.5, ATTENTION: 0.1, HEAD: 0.15, ELEMENTWISE: 0.25})
    case = Case("r", 9216, "full", True, seconds, 0.414, 0.6, 200 * 2**30)
    monkeypatch.setattr(mfu, "cases", lambda settings: iter([case]))
    assert mfu.run(Settings()).splitlines()[-1] == (
        "| r | 9,216 | full | yes | 41 | 60 | 1.00 | 50 | 10 | 15 | 25 | 200 (too much) |"
    )
