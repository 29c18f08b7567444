"""The head that makes its gradient on the way: against full logits and autograd, in one pass and in two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.upge.logprobs.test_logprobs import D, Largest, N, V, full_logits, make_inputs
from upge.logprobs import Coefficients, buffer_bytes, default_chunk_size, token_logprobs, token_loss
from upge.logprobs.chunks import softmax_statistics


def per_token(logprobs: Tensor, entropies: Tensor, behavior: Tensor, advantage: Tensor, bonus: float) -> Tensor:
    """[c] losses whose coefficients depend on each token's own log-prob: a clipped ratio, a penalty, a bonus."""
    ratio = (logprobs - behavior).exp()
    kept = torch.where(advantage > 0, ratio < 1.2, ratio > 0.8)
    penalty = 0.1 * ((behavior - logprobs).exp() + logprobs)
    return -advantage * ratio * kept + penalty - bonus * entropies.square()


def by_autograd(loss_of, seen: list | None = None, with_entropy: bool = False):
    """The coefficient function of a loss of (log-probs, entropies, chunk)."""

    def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        if seen is not None:
            seen.append((chunk.start, chunk.stop))
        leaves = [logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()]
        with torch.enable_grad():
            loss = loss_of(*leaves, chunk)
        actual = torch.autograd.grad(loss, leaves, allow_unused=True)
        return Coefficients(loss.detach(), actual[0], actual[1] if with_entropy else None)

    return coefficients


@pytest.mark.parametrize("chunk_size", [1, 4, N, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_chunkwise_loss_in_one_pass(chunk_size, temperature, dtype, tolerance, with_bias, with_entropy):
    hidden, weight, bias, targets, _ = make_inputs(dtype)
    inputs, bias = ((hidden, weight, bias), bias) if with_bias else ((hidden, weight), None)
    plain = full_logits(hidden, weight, targets, bias, temperature)
    behavior = (plain[0] + 0.3 * torch.sin(torch.arange(N))).detach().to(dtype)
    columns, bonus = (behavior, torch.linspace(-1.0, 2.0, N, dtype=dtype)), 0.3 * with_entropy
    expected, seen = per_token(*plain, *columns, bonus).sum(), []

    def loss_of(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Tensor:
        return per_token(logprobs, entropies, *(column[chunk] for column in columns), bonus).sum()

    loss, *actual = token_loss(
        hidden, weight, targets, by_autograd(loss_of, seen, with_entropy), bias=bias, temperature=temperature,
        entropy_gradient=with_entropy, chunk_size=chunk_size,
    )  # fmt: skip
    size = chunk_size or default_chunk_size(V, "cpu")
    assert seen == [(start, min(start + size, N)) for start in range(0, N, size)]
    assert not any(column.requires_grad for column in actual)
    gradients = torch.autograd.grad(3.0 * loss, inputs), torch.autograd.grad(3.0 * expected, inputs)
    for a, b in zip((loss, *actual, *gradients[0]), (expected, *plain, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * float(b.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, N, 100])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_loss_of_all_tokens_together(chunk_size, with_entropy):
    """Asked once, about all; with several chunks the logits are computed twice, and the gradient is the same."""
    hidden, weight, bias, targets, _ = make_inputs()
    inputs, seen = (hidden, weight, bias), []

    def loss_of(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Tensor:
        return logprobs.sum().exp() + logprobs.square().sum() * (entropies.sum() if with_entropy else 1.0)

    coefficients = by_autograd(loss_of, seen, with_entropy)
    loss, *actual = token_loss(
        hidden, weight, targets, coefficients, bias=bias, temperature=0.7, entropy_gradient=with_entropy, whole=True,
        chunk_size=chunk_size,
    )  # fmt: skip
    assert seen == [(0, N)]
    plain = full_logits(hidden, weight, targets, bias, 0.7)
    expected = loss_of(*plain, slice(0, N))
    gradients = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for a, b in zip((loss, *actual, *gradients[0]), (expected, *plain, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * float(b.detach().abs().max()), rtol=0)


def likelihood(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
    return Coefficients(-logprobs.sum(), torch.full_like(logprobs, -1.0))


class Products(TorchDispatchMode):
    """How many multiplications matrix products made."""

    multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def test_one_pass_multiplies_three_times_and_two_passes_four():
    """In units of N·D·V."""
    hidden, weight, _, targets, _ = make_inputs(n=12)

    def units(call) -> float:
        with Products() as counted:
            call().backward()
        return counted.multiplications / (12 * D * V)

    calls = (
        lambda: token_loss(hidden, weight, targets, likelihood, chunk_size=4)[0],
        lambda: token_loss(hidden, weight, targets, likelihood, chunk_size=4, whole=True)[0],
        lambda: token_logprobs(hidden, weight, targets, chunk_size=4)[0].sum(),
        lambda: full_logits(hidden, weight, targets, None, 1.0)[0].sum(),
    )
    assert [units(call) for call in calls] == [3, 4, 4, 3]


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    n, v, chunk_size = 200, 300, 16
    hidden, weight, bias, targets, _ = make_inputs(torch.float32, n=n, v=v)
    with Largest() as largest:
        token_loss(hidden, weight, targets, likelihood, bias=bias, chunk_size=chunk_size)[0].backward()
    assert largest.numel == chunk_size * v < n * v
    assert buffer_bytes(151_936, "cpu", torch.float32, 4096) < 12 * 151_936 * 4096 / 20


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_gradients_that_nothing_needs_are_not_computed(frozen):
    hidden, weight, _, targets, _ = make_inputs()
    expected = torch.autograd.grad(-full_logits(hidden, weight, targets, None, 1.0)[0].sum(), (hidden, weight))
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    with Largest((V, D) if frozen == "weight" else (N, D)) as largest:
        token_loss(hidden, weight, targets, likelihood, chunk_size=4)[0].backward()
    assert largest.of_shape == 0
    kept, place = (hidden, 0) if frozen == "weight" else (weight, 1)
    torch.testing.assert_close(kept.grad, expected[place], atol=1e-13, rtol=0)


def test_no_tokens_give_a_loss_of_zero_that_reaches_everything():
    hidden, weight, bias, targets, _ = make_inputs(n=0)
    loss, logprobs, entropies = token_loss(hidden, weight, targets, likelihood, bias=bias)
    assert float(loss.detach()) == 0 and logprobs.shape == entropies.shape == (0,)
    loss.backward()
    assert hidden.grad.shape == (0, D) and not weight.grad.any() and not bias.grad.any()


def test_improbable_tokens_and_sure_ones():
    """Log-probs of -6e4 and of nearly 0 are right to the rounding of 1."""
    hidden = torch.tensor([[3e4, 0.0], [-3e4, 0.0], [8.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss, logprobs, entropies = token_loss(hidden, weight, torch.tensor([0, 0, 0]), likelihood)
    loss.backward()
    rest = torch.tensor(-16.0, dtype=torch.float64).exp().log1p()
    expected = torch.tensor([0.0, -6e4, -rest], dtype=torch.float64)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-7)
    assert entropies.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    torch.testing.assert_close(hidden.grad[1], torch.tensor([-2.0, 0.0]))


def test_in_bfloat16_a_sure_tokens_gradient_keeps_its_digits():
    """p = 0.99: rounding p to bfloat16 before 1 - p would leave one digit of the gradient."""
    hidden = torch.tensor([[4.595, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    token_loss(hidden, weight, torch.tensor([0]), likelihood)[0].backward()
    logits = hidden.detach().double() @ weight.detach().double().t()
    exact = -(1 - logits.softmax(-1)[0, 0])
    assert float(hidden.grad[0, 0]) == pytest.approx(float(exact), rel=5e-3)


def test_a_loss_hands_its_gradient_on_once():
    hidden, weight, _, targets, _ = make_inputs()
    loss = token_loss(hidden, weight, targets, likelihood)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="already used"):
        loss.backward()


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (lambda lp, h, chunk: Coefficients(lp, lp), "a loss without dimensions"),
        (lambda lp, h, chunk: Coefficients(lp.sum(), lp[:1]), "as many numbers"),
        (lambda lp, h, chunk: Coefficients(lp.sum(), lp, h), "has some for the entropies, but entropy_gradient is"),
    ],
)
def test_what_a_coefficient_function_may_not_say(coefficients, message):
    hidden, weight, _, targets, _ = make_inputs()
    with pytest.raises(ValueError, match=message):
        token_loss(hidden, weight, targets, coefficients)


def test_the_compiled_block_is_the_plain_one():
    """What a GPU runs, compiled here for the CPU."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(6, 50, generator=generator)
    target = torch.randint(0, 50, (6, 1), generator=generator)
    plain, fused = torch.empty_like(z), torch.empty_like(z)
    expected = softmax_statistics(z, target, plain)
    actual = torch.compile(softmax_statistics, dynamic=True)(z, target, fused)
    for a, b in zip((*actual, fused), (*expected, plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_the_cpu(dtype):
    hidden, weight, _, targets, _ = make_inputs(torch.float32, n=300, d=64, v=1000)
    gradients = []
    for device in ("cpu", "cuda"):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight)]
        loss, logprobs, _ = token_loss(*inputs, targets.to(device), likelihood, chunk_size=128)
        loss.backward()
        gradients.append([logprobs.detach().cpu(), *(x.grad.float().cpu() for x in inputs)])
    for a, b in zip(*gradients, strict=True):
        scale = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(a, b, atol=scale * float(b.abs().max()), rtol=0)
