"""What a learner does beside plain updates: gates that follow a held-out objective, interleaved updates, a critic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import algorithms
from tests.learner_ranks import BONUS, LR, NOISY, SIZE, mixed
from tests.models import save_random_model, trajectories
from tests.upge.train.test_update import launch, padded_logprobs
from upge.gradient_noise import gradient_noise, measured_terms
from upge.train.learner import Learner, Memory
from upge.train.sample import assemble


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[(1, 10_000), (2, 45)], ids=["one rank", "two ranks"])
def results(request, model_path, tmp_path_factory) -> dict:
    ranks, budget = request.param
    output = tmp_path_factory.mktemp("learner") / "found.pt"
    launch("learner_ranks", ranks, model_path, output, budget)
    return torch.load(output, weights_only=False)


# The written objectives, on a plain model in float64.


def imitate(model, batch) -> torch.Tensor:
    """Mean negative log-likelihood of the demonstrations' tokens."""
    demonstrations = [t for t in batch if t.is_demonstration]
    logprobs, _ = padded_logprobs(model, demonstrations)
    return -sum(row[: len(t.response_ids)].sum() for row, t in zip(logprobs, demonstrations, strict=True)) / sum(
        len(t.response_ids) for t in demonstrations
    )


def reinforce(model, batch) -> torch.Tensor:
    """Centred rewards times the sums of log-probs over 1024, averaged over rollouts."""
    rollouts = [t for t in batch if not t.is_demonstration]
    logprobs, _ = padded_logprobs(model, rollouts)
    total = 0.0
    for row, t in zip(logprobs, rollouts, strict=True):
        group = [o.reward for o in rollouts if o.group == t.group]
        total -= (t.reward - sum(group) / len(group)) * row[: len(t.response_ids)].sum() / 1024
    return total / len(rollouts)


def bonus(model, batch) -> torch.Tensor:
    """Minus the mean entropy at the rollouts' tokens."""
    rollouts = [t for t in batch if not t.is_demonstration]
    _, entropies = padded_logprobs(model, rollouts)
    total = sum(row[: len(t.response_ids)].sum() for row, t in zip(entropies, rollouts, strict=True))
    return -total / sum(len(t.response_ids) for t in rollouts)


@pytest.fixture(scope="module")
def plain(model_path) -> tuple[float, float, float]:
    """lr·⟨∇L_val, ∇L_imitate - ∇L_reinforce⟩; dU/dμ by central differences; the norm of the gradient at μ = 0.6."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    parameters = list(model.parameters())

    def gradient(loss: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(loss, parameters)

    step, held_out = trajectories(seed=0), trajectories(seed=50)
    losses = (reinforce(model, step), imitate(model, step), bonus(model, step), imitate(model, held_out))
    rl, sft, extra, val = (gradient(loss) for loss in losses)
    slope = LR * sum(float((v * (s - r)).sum()) for v, s, r in zip(val, sft, rl, strict=True))
    mixture = [0.4 * r + 0.6 * s + BONUS * e for r, s, e in zip(rl, sft, extra, strict=True)]
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def utility(mu: float, lr: float) -> float:
        for p, s, gr, gs in zip(parameters, start, rl, sft, strict=True):
            p.copy_(s - lr * ((1 - mu) * gr + mu * gs))  # the bonus is the same at any μ
        return -float(imitate(model, held_out))

    # The slope is that of an infinitely small step, times the rate: steps both ways cancel what is of second order.
    small = 3e-3
    rise, fall = ((utility(0.7, lr) - utility(0.5, lr)) / 0.2 for lr in (small, -small))
    difference = (rise - fall) / (2 * small) * LR
    return slope, difference, float(sum(g.square().sum() for g in mixture).sqrt())


def test_slope_is_the_derivative_of_the_utility(results, plain):
    """⟨∇L_val, ∇L_2 - ∇L_1⟩ times the rate, with the sign that finite differences of the utility confirm."""
    slope, difference, _ = plain
    assert difference == pytest.approx(slope, rel=1e-3) and abs(slope) > 1e-3
    assert results["slope"] == pytest.approx(slope, rel=2e-4)


def test_asking_for_the_slope_leaves_no_trace(results, plain):
    """The update after it has the gradient of (1-μ)·L_1 + μ·L_2 and the bonus, and of nothing else."""
    assert results["norm"] == pytest.approx(plain[2], rel=1e-4)
    assert results["state"] == 0.6


def test_the_variable_moves_by_slope_and_entropy(results):
    """0.6 + 2·0.05 + 0.25·(0.5 - 0.3)"""
    assert results["mu"] == pytest.approx(0.75, abs=1e-12)


def test_the_noise_of_the_present_policy_is_measured_and_averaged(results, model_path):
    """In the first and the third of three steps."""
    model, algorithm = (
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64),
        algorithms.load("gac", NOISY),
    )
    gate, mu = algorithm.stateful["mu"], 0.5

    def measured(seed: int) -> dict[str, float]:
        columns = assemble(trajectories(seed=seed), 0)
        logprobs = torch.zeros(columns.response_mask.shape, dtype=torch.float64)
        with torch.no_grad():
            padded, _ = padded_logprobs(model, trajectories(seed=seed))
        logprobs[:, : padded.shape[1]] = padded
        return gradient_noise(*measured_terms(algorithm.terms, gate), replace(columns, logprobs=logprobs))

    first, third = measured(0), measured(2)
    later = {name: (first[name] + third[name]) / 2 for name in first}
    for step, (figures, variables) in enumerate(results["noise"]):
        expected = first if step < 2 else later
        assert figures["state/mu"] == pytest.approx(mu)
        for name, value in expected.items():
            assert figures[f"state/mu_{name}"] == variables[f"mu_{name}"]
            assert variables[f"mu_{name}"] == pytest.approx(value, rel=1e-4), (step, name)
        mu = gate.updated(mu, {**expected, "step": step + 1})
        assert variables["mu"] == pytest.approx(mu, abs=1e-7)


def test_the_critics_goal_is_the_return(results):
    """At first V = 0 and so R = 0.95^(tokens still to come)·reward; the reference policy is the policy: no KL."""
    returns = [
        [0.95 ** (len(t.response_ids) - 1 - i) * t.reward for i in range(len(t.response_ids))]
        for t in trajectories()
        if not t.is_demonstration
    ]
    flat = torch.tensor([r for row in returns for r in row], dtype=torch.float64)
    first, second = results["critic"]
    assert first["critic/return_mean"] == pytest.approx(float(flat.mean()), rel=1e-5)
    assert first["critic/value_mean"] == 0 and first["critic/explained_variance"] == pytest.approx(0, abs=1e-5)
    assert first["critic/loss"] == pytest.approx(float(flat.square().mean()) / 2, rel=1e-5)
    assert first["critic/grad_norm"] > 0 and first["updates"] == 1
    assert second["critic/loss"] < first["critic/loss"], "the critic has learned from the first update"


def test_the_critic_can_learn_alone(results):
    assert results["policy updates"] == 0 and results["critic"][1]["updates"] == 0


def test_updates_above_the_limit_are_told_apart(results):
    """The policy's and the interleaved updates' are counted each, and none of them has moved a weight."""
    assert results["above limit"] == (1, 0.0, 1.0) and results["unmoved"]


def test_interludes_wait_for_enough_prompts(results):
    """Only group 0 fails and has a demonstration: it is remembered in each step, and after three an update follows."""
    assert SIZE == 3
    assert results["interleaved_updates"] == [(0.0, [0]), (0.0, [0, 0]), (1.0, []), (0.0, [0])]
    assert results["optimizer"] == "main"


@pytest.mark.parametrize(
    "broken", [{"entropy": float("nan")}, {"entropy": None}, {"state/mu_utility_slope": float("inf")}]
)
def test_a_signal_without_a_value_leaves_the_variable(broken):
    """A missing or overflowing figure must not throw μ to a bound; the run says so."""
    learner = object.__new__(Learner)
    learner.algorithm = mixed()
    learner.models = SimpleNamespace(policy=SimpleNamespace(world=SimpleNamespace(is_main=True)))
    figures = {"state/mu_utility_slope": 0.05, "entropy": 0.3} | broken
    memory = Memory({"mu": 0.6})
    with pytest.warns(UserWarning, match="'mu' stays 0.6, because the metric '(entropy|state/mu_utility_slope)'"):
        learner.remember({k: v for k, v in figures.items() if v is not None}, 0, memory)
    assert memory.variables == {"mu": 0.6}
    learner.remember({"state/mu_utility_slope": 0.05, "entropy": 0.3}, 0, memory)
    assert memory.variables["mu"] == pytest.approx(0.75)
