"""The chunked head against full logits: values, gradients, precision, memory, and ZeRO-3."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import forked
from upge.logprobs import default_chunk_size, token_logprobs, token_score_norms

N, D, V = 13, 8, 11


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float):
    logits = hidden @ weight.t()
    logp = ((logits if bias is None else logits + bias) / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def make_inputs(dtype: torch.dtype = torch.float64, n: int = N, d: int = D, v: int = V, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((n, d), (v, d), (v,)))
    targets = torch.randint(0, v, (n,), generator=generator)
    upstream = torch.randn(2, n, generator=generator, dtype=torch.float32).to(torch.float64)
    return *(x.requires_grad_() for x in (hidden, weight, bias)), targets, upstream


@pytest.mark.parametrize("chunk_size", [1, 4, N, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_full_logits(chunk_size, temperature, dtype, tolerance, with_bias):
    hidden, weight, bias, targets, (up_logprobs, up_entropies) = make_inputs(dtype)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    bias = bias if with_bias else None

    def gradients(logprobs, entropies):
        loss = (up_logprobs.to(dtype) * logprobs).sum() + (up_entropies.to(dtype) * entropies).sum()
        return torch.autograd.grad(loss, inputs)

    ours = token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, entropy=True, chunk_size=chunk_size
    )
    plain = full_logits(hidden, weight, targets, bias, temperature)
    for a, b in zip((*ours, *gradients(*ours)), (*plain, *gradients(*plain)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_score_norms_equal_full_logits(chunk_size, dtype, tolerance):
    """‖∂ log p_y/∂z‖² by autograd, with z the logits divided by the temperature."""
    hidden, weight, bias, targets, _ = make_inputs(dtype)
    z = ((hidden @ weight.t() + bias) / 0.6).detach().double().requires_grad_()
    scores = torch.autograd.grad(z.log_softmax(-1).gather(1, targets[:, None]).sum(), z)[0]
    norms = token_score_norms(hidden, weight, targets, bias=bias, temperature=0.6, chunk_size=chunk_size)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not norms.requires_grad
    torch.testing.assert_close(norms.double(), scores.square().sum(-1), rtol=tolerance, atol=tolerance)


def test_gradcheck():
    hidden, weight, bias, targets, _ = make_inputs()

    def outputs(h, w, b):
        return token_logprobs(h, w, targets, bias=b, temperature=0.7, entropy=True, chunk_size=5)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_entropies_are_optional_and_each_output_can_be_differentiated_alone():
    hidden, weight, _, targets, _ = make_inputs()
    logprobs, none = token_logprobs(hidden, weight, targets, chunk_size=4)
    assert none is None
    both = token_logprobs(hidden, weight, targets, entropy=True, chunk_size=4)
    assert torch.equal(both[0], logprobs)
    plain = full_logits(hidden, weight, targets, None, 1.0)
    for output, expected in zip(both, plain, strict=True):
        ours = torch.autograd.grad(output.sum(), (hidden, weight), retain_graph=True)
        theirs = torch.autograd.grad(expected.sum(), (hidden, weight), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, and how often one of `shape` is returned."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape, self.numel, self.of_shape = shape, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
                self.of_shape += tuple(tensor.shape) == self.shape
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    n, v, chunk_size = 200, 300, 16
    hidden, weight, bias, targets, _ = make_inputs(torch.float32, n=n, v=v)
    saved: list[Tensor] = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        logprobs, entropies = token_logprobs(hidden, weight, targets, bias=bias, entropy=True, chunk_size=chunk_size)
        (logprobs + entropies).sum().backward()
    assert largest.numel == chunk_size * v < n * v
    assert sum(x.numel() for x in saved) == n * D + v * D + v + n


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_gradients_that_nothing_needs_are_not_computed(frozen):
    hidden, weight, _, targets, _ = make_inputs()
    expected = torch.autograd.grad(full_logits(hidden, weight, targets, None, 1.0)[0].sum(), (hidden, weight))
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    logprobs, _ = token_logprobs(hidden, weight, targets, chunk_size=4)
    shape = (V, D) if frozen == "weight" else (N, D)
    with Largest(shape) as largest:
        logprobs.sum().backward()
    assert largest.of_shape == 0
    remaining = (hidden, weight) if frozen == "weight" else (weight, hidden)
    assert remaining[1].grad is None
    torch.testing.assert_close(remaining[0].grad, expected[0 if frozen == "weight" else 1], atol=1e-13, rtol=0)


def test_bfloat16_statistics_are_those_of_float32_over_the_same_logits():
    hidden, weight, _, targets, _ = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in make_inputs())
    logprobs, entropies = token_logprobs(hidden, weight, targets, entropy=True, chunk_size=4)
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs, logp.gather(1, targets[:, None])[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(entropies, -(logp.exp() * logp).sum(-1), atol=1e-6, rtol=0)


def test_bfloat16_gradient_of_the_weight_does_not_decay_with_the_number_of_chunks():
    n = 4096
    hidden, weight, _, targets, _ = make_inputs(torch.float32, n=n)
    hidden, weight = (x.detach().to(torch.bfloat16).requires_grad_() for x in (hidden, weight))
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    full_logits(*exact_inputs, targets, None, 1.0)[0].sum().backward()
    exact = exact_inputs[1].grad

    def error(gradient: Tensor) -> float:
        return ((gradient.double() - exact).norm() / exact.norm()).item()

    token_logprobs(hidden, weight, targets, chunk_size=8)[0].sum().backward()
    accumulated = torch.zeros_like(weight)
    for part, ids in zip(hidden.detach().split(8), targets.split(8), strict=True):
        leaf = weight.detach().requires_grad_()
        token_logprobs(part, leaf, ids)[0].sum().backward()
        accumulated += leaf.grad
    assert error(weight.grad) < 5e-3
    assert error(accumulated) > 5 * error(weight.grad)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[3e4, 0.0], [-3e4, 0.0], [0.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, weight, torch.tensor([0, 0, 2]), entropy=True)
    (logprobs + entropies).sum().backward()
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -6e4, -torch.tensor(3.0).log()]))
    torch.testing.assert_close(entropies, torch.tensor([0.0, 0.0, torch.tensor(3.0).log()]))
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_no_tokens_give_zero_gradients():
    hidden, weight, bias, targets, _ = make_inputs(n=0)
    logprobs, entropies = token_logprobs(hidden, weight, targets, bias=bias, entropy=True)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert weight.grad.shape == (V, D) and not weight.grad.any()
    assert bias.grad.shape == (V,) and not bias.grad.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(2, N, D)}, r"hidden must be \[N, D\]"),
        ({"weight": torch.zeros(0)}, "ZeRO-3"),
        ({"targets": torch.zeros(N + 1, dtype=torch.long)}, rf"targets must be \[N\] = \[{N}\], got \({N + 1},\)"),
        ({"bias": torch.zeros(V + 1)}, "bias must be"),
        ({"weight": torch.zeros(V, D, dtype=torch.bfloat16)}, "bfloat16.*float32.*cast"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 token, got 0"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(N, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(arguments | changes))


def test_default_chunks_bound_memory_for_large_vocabularies():
    assert default_chunk_size(151_936, "cpu") == 512
    assert default_chunk_size(151_936, "cpu", torch.bfloat16) == 1024
    assert default_chunk_size(151_936, "cuda") == 4096
    assert default_chunk_size(64, "cpu") == 65_536


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_gradients_equal_the_plain_model(ranks, tmp_path):
    """Tied and untied heads whose weight is released between forward and backward; entropies are in the loss."""
    root = Path(__file__).parents[3]
    figures = tmp_path / "figures.json"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(root)}
    done = forked.run("tests.head_ranks", str(figures), environment=environment, ranks=ranks, torchrun=True)
    assert figures.exists(), done.stderr[-3000:]
    for of_rank in json.loads(figures.read_text()):
        assert sorted(of_rank) == ["tied", "tied checkpointed", "untied", "untied checkpointed"]
        for name, figure in of_rank.items():
            assert figure["gradient_error"] < 1e-5, (name, figure)
            assert figure["released_between"] == figure["released_early"] == 1.0, (name, figure)
            assert (figure["empty_micro_batches"] > 0) == (ranks == 2), (name, figure)
