"""The policy's engine under ZeRO-3 on 1 and 2 ranks: gradients taken, several AdamWs over the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine_ranks import CLIPPED, token_weights
from tests.models import save_odd_model, trajectories
from tests.upge.train.test_update import launch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_odd_model(tmp_path_factory.mktemp("model"), tied=True)


#: Small buckets and several groups of parameters.
MORE = {"reduce_bucket_size": 20_000, "sub_group_size": 10_000}
RUNS = {
    "1 rank": (1, "none"),
    "2 ranks": (2, "none"),
    "1 rank, optimizer offloaded": (1, "optimizer"),
    "2 ranks, all offloaded": (2, "all"),
    "2 ranks, more settings": (2, "none", json.dumps({"zero_optimization": MORE})),
    "2 ranks, selective": (2, "none", "{}", "selective"),
}


#: Those that make test runs; the others are slow.
QUICK = ("1 rank", "2 ranks", "1 rank, optimizer offloaded")


def marks(name: str) -> tuple:
    return () if name in QUICK else (pytest.mark.slow,)


@pytest.fixture(scope="module", params=[pytest.param(run, id=n, marks=marks(n)) for n, run in RUNS.items()])
def results(model, request, tmp_path_factory) -> dict:
    """The results of tests/engine_ranks.py for a number of ranks and a mode of offloading."""
    folder = tmp_path_factory.mktemp("engine")
    ranks, *settings = request.param
    launch("engine_ranks", ranks, model, folder / "found.pt", folder, *settings)
    return torch.load(folder / "found.pt", weights_only=False) | {"run": request.param}


def token_loss(model: torch.nn.Module, variant: int) -> torch.Tensor:
    """Σ w log π, one trajectory at a time."""
    losses = []
    for t, weights in zip(trajectories(), token_weights(variant), strict=True):
        ids = torch.tensor([[*t.prompt_ids, *t.response_ids]])
        full = model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        losses.append((full.gather(-1, torch.tensor(t.response_ids)[:, None])[:, 0] * weights).sum())
    return torch.stack(losses).sum()


def plain_gradient(path, variant: int) -> dict[str, torch.Tensor]:
    """The gradient of Σ w log π by a plain float64 model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    token_loss(model, variant).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_score_norms_are_those_of_full_logits(model, results):
    """‖1_y - p‖² of each token, on one rank while the other is idle."""
    weights, norms = results["norms"]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    network.load_state_dict(weights, strict=False)
    for row, t in zip(norms, trajectories(), strict=True):
        ids, chosen = torch.tensor([[*t.prompt_ids, *t.response_ids]]), torch.tensor(t.response_ids)
        with torch.no_grad():
            p = network(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].softmax(-1)
        expected = (torch.nn.functional.one_hot(chosen, p.shape[-1]) - p).square().sum(-1)
        torch.testing.assert_close(row[: len(chosen)].double(), expected, rtol=1e-5, atol=1e-6)
        assert not row[len(chosen) :].any()


def product(a: dict, b: dict) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def test_the_settings_have_an_effect(results):
    ranks, offload, *more = (part for part in results["run"] if part not in ("{}", "selective"))
    seen = results["settings"]
    assert seen["optimizer"] == (offload != "none") and seen["parameters"] == (offload == "all")
    assert (seen["bucket"] == 20_000) == bool(more) and (seen["groups"] > 1) == bool(more)


def test_a_taken_gradient_is_the_plain_one(model, results):
    """Each rank has several micro-batches, none of which is dropped, also with offloading (arXiv 2604.23747)."""
    for variant in (0, 1):
        expected, taken = plain_gradient(model, variant), results["gradients"][variant]
        assert set(taken) == set(expected)
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            assert taken[name].dtype == torch.float32
            difference = float((taken[name] - gradient).abs().max())
            assert difference <= 2e-5 * scale, (name, difference / scale)


def test_dot_is_over_all_ranks_and_without_padding(model, results):
    first, second = (plain_gradient(model, variant) for variant in (0, 1))
    assert results["dot"][0] == pytest.approx(product(first, second), rel=1e-4)
    assert results["dot"][1] == pytest.approx(product(first, first), rel=1e-4)


def test_taking_leaves_no_trace(results):
    """Two gradients and one that is not finite were taken before: norms and weights are the same to the last bit."""
    assert results["with"]["results"] == results["without"]["results"]
    assert all(result.applied and result.grad_norm > 0.5 for result in results["with"]["results"])
    for name, weight in results["without"]["weights"].items():
        assert torch.equal(results["with"]["weights"][name], weight), name


def test_gradients_are_clipped_before_adamw(model, results):
    """AdamW forgets a constant factor, so the second gradient is a hundredth of the first: unclipped, it hardly counts.

    Weights equal those of a plain float64 model whose gradients are scaled to a norm of 0.5 where they exceed it.
    """
    start, weights, norms = results["clipped"]

    def plain(limit: float) -> dict[str, torch.Tensor]:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        network.load_state_dict(start, strict=False)
        adamw = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
        for variant, factor in ((0, CLIPPED), (1, CLIPPED / 100)):
            adamw.zero_grad()
            token_loss(network, variant).mul(factor).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
            adamw.step()
        return {name: parameter.detach() for name, parameter in network.named_parameters()}

    def difference(a: dict, b: dict) -> float:
        return sum(float((a[name].double() - b[name]).square().sum()) for name in start) ** 0.5

    assert min(norms) > 0.5, "both are clipped"
    expected = plain(0.5)
    size = difference(start, expected)
    assert difference(weights, expected) <= 1e-3 * size
    assert difference(plain(1e9), expected) > 0.1 * size


def test_an_update_above_the_limit_is_left_out(results):
    """The norm is the one before clipping, the same on all ranks, and no trace is left of the gradient."""
    norm, result, before, after = results["above"]
    assert not result.applied and result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    norm, result, before, after = results["below"]
    assert result.applied and result.grad_norm == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert not any(torch.equal(after[name], weight) for name, weight in before.items())


def test_sets_of_moments_are_so_many_optimizers(results):
    """By turns, on the engine's own gradients: the weights are those of plain AdamWs that share their parameters."""
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in results["start"].items()}

    def adamw() -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)

    optimizers = {"main": adamw(), "other": adamw()}
    for turn, (name, gradient, weights) in enumerate(results["turns"]):
        if name == "reset other":
            optimizers["other"] = adamw()
            continue
        for key, parameter in parameters.items():
            parameter.grad = gradient[key]
        optimizers[name].step()
        for key, parameter in parameters.items():
            difference = float((weights[key] - parameter).detach().abs().max())
            assert difference <= 1e-6, (turn, name, key, difference)


def test_a_continuation_equals_the_uninterrupted_run(results):
    assert results["state"] == {"step": 7}
    for name, weight in results["went on"].items():
        assert torch.equal(results["resumed"][name], weight), name


def test_gradients_in_half_precision_add_up_in_full(model, results):
    """The parts are rounded to bfloat16 (8 bits), their sum is not."""
    exact = plain_gradient(model, 0)
    scale = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in results["added here"].items():
        assert float((results["added there"][name] - gradient).abs().max()) <= 1e-6 * scale, name
        assert float((gradient - exact[name]).abs().max()) <= 0.05 * scale, name
