"""Per-trajectory gradients against autograd, and their sums against the whole gradient of every algorithm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import algorithms
from tests.models import save_random_model, trajectories, unrounded
from tests.upge.train.test_update import padded_logprobs
from upge import Algorithm, Trajectories
from upge.measure import (
    Directions,
    Group,
    ModelScores,
    Pool,
    Request,
    batch_estimates,
    batches,
    deal,
    estimator,
    gradients,
    slopes,
)
from upge.measure.pool import pair_of

PROMPTS, ROUNDS, PER_BATCH, TEMPERATURE = 4, 2, 2, 1.0
#: Corrections, too: penalties are no products, and entropies have a gradient of their own.
CORRECTED = ("grpo+kl_k3", "rloo+entropy", "grpo+tis", "grpo+optimal_baseline", "gkd+entropy", "gkd+kl_full")


def loaded(name: str) -> Algorithm | algorithms.Pipeline:
    plain, *corrections = name.split("+")
    return algorithms.load(plain, corrections=corrections)


MEASURED = [
    name
    for name in (*algorithms.names(), *CORRECTED)
    if isinstance(actual := loaded(name), Algorithm) and not (actual.needs.critic or actual.guidance)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> torch.nn.Module:
    path = save_random_model(tmp_path_factory.mktemp("model"))
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    unrounded(network)
    return network


@pytest.fixture(scope="module")
def plain_model(model, tmp_path_factory) -> torch.nn.Module:
    """The same weights, run by transformers as it is."""
    network = AutoModelForCausalLM.from_pretrained(
        save_random_model(tmp_path_factory.mktemp("plain")), dtype=torch.float64
    )
    unrounded(network)
    return network


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Prompts of their own for each round would be other prompts: the rollouts of two samples share those of one."""
    drawn = [trajectories(groups=PROMPTS, seed=0, pairs=True), trajectories(groups=PROMPTS, seed=1, pairs=True)]
    prompts = {t.group: t.prompt_ids for t in drawn[0]}
    groups = []
    for q in range(PROMPTS):
        own = [[dataclasses.replace(t, prompt_ids=prompts[q]) for t in sample if t.group == q] for sample in drawn]
        shown = [t for t in own[0] if t.is_demonstration]
        pair, one = tuple(shown), dataclasses.replace(shown[0], preference=0)
        groups.append([Group(tuple(t for t in sample if not t.is_demonstration), (one,), pair) for sample in own])
    reference = [[list(group.rollouts) for group in own] for own in groups]
    return Pool(groups, deal(PROMPTS, PER_BATCH, ROUNDS, 0), reference, torch.rand(PROMPTS, dtype=torch.float64))


def columns_of(scores: ModelScores, pool: Pool) -> dict:
    pairs = pool.pairs()
    actual, full = {}, scores.distributions(pairs)
    for number, (pair, (logprobs, entropies)) in enumerate(zip(pairs, scores.columns(pairs), strict=True)):
        g = torch.Generator().manual_seed(number)
        reference = logprobs - 0.3 * torch.rand(len(logprobs), generator=g).double()
        actual[pair] = {"logprobs": logprobs, "entropies": entropies, "reference_logprobs": reference}
        actual[pair] |= {"teacher_logprobs": reference - 0.1, "score_norms": entropies}
        for name in ("policy", "reference", "teacher"):
            noise = 0.0 if name == "policy" else torch.randn(full[number].shape, generator=g)
            actual[pair][f"distribution/{name}"] = (full[number] + noise).log_softmax(-1)
    return actual


@pytest.fixture(scope="module")
def everything(model, pool) -> tuple:
    """All algorithms on the pool, with every gradient that they ask for, whole."""
    scores, directions = ModelScores(model, 0), Directions()
    columns = columns_of(scores, pool)
    actual = {name: estimator(loaded(name), pool, columns, directions) for name in MEASURED}
    return columns, actual, gradients(scores, directions.requests), len(directions.requests)


def padded_distributions(model: torch.nn.Module, members: list) -> torch.Tensor:
    """[B, T, V] log π(·|t), with a gradient."""
    rows, width = [], max(len(t.response_ids) for t in members)
    for t in members:
        full = model(input_ids=torch.tensor([[*t.prompt_ids, *t.response_ids]])).logits[0].log_softmax(dim=-1)
        full = full[len(t.prompt_ids) - 1 : -1]
        rows.append(torch.nn.functional.pad(full, (0, 0, 0, width - len(full))))
    return torch.stack(rows)


def plain_gradient(model: torch.nn.Module, algorithm: Algorithm, members: list, batch: Trajectories) -> torch.Tensor:
    """Minus the gradient of the loss by all parameters, through one plain forward pass per trajectory."""
    logprobs, entropies = padded_logprobs(model, members)
    live = {"logprobs": logprobs, "entropies": entropies}
    if batch.distributions is not None:
        live["distributions"] = batch.distributions._replace(policy=padded_distributions(model, members))
    loss = algorithm.estimate(dataclasses.replace(batch, **live)).loss
    actual = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(actual, model.parameters(), strict=True)
    return -torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@pytest.mark.parametrize("name", MEASURED)
def test_contributions_add_up_to_the_whole_gradient(name, everything, pool, plain_model):
    """Of every batch, to the precision of float64; each batch planned whole."""
    columns, actual, rows, _ = everything
    estimates, rounds = batch_estimates(pool, actual[name].contributions(pool, rows))
    algorithm = loaded(name)
    planned = list(batches(pool, algorithm, columns))
    assert len(planned) == len(estimates) == ROUNDS * PROMPTS // PER_BATCH
    for (number, members, batch), estimate, r in zip(planned, estimates, rounds.tolist(), strict=True):
        expected = plain_gradient(plain_model, algorithm, members, batch)
        assert number == r and float(expected.norm()) > 0
        assert torch.allclose(estimate, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_parts_add_up_to_the_whole(everything, pool):
    _, actual, rows, _ = everything
    for one in actual.values():
        whole = one.contributions(pool, rows)
        parts = sum(one.contributions(pool, rows, [part]) for part in one.parts)
        assert torch.allclose(whole, parts, atol=1e-12 * float(whole.abs().max()))


def test_what_is_alike_is_differentiated_once(everything, pool):
    """On-policy every algorithm without demonstrations and penalties asks for one gradient of a rollout, the same."""
    columns, actual, _, asked = everything
    alone, plain = Directions(), [n for n in MEASURED if "+" not in n and loaded(n).needs.rollouts]
    plain = [
        n for n in plain if not (loaded(n).needs.demonstrations or loaded(n).needs.reference or loaded(n).needs.teacher)
    ]
    for name in plain:
        estimator(loaded(name), pool, columns, alone)
    assert len(plain) > 8 and len(alone.requests) <= sum(len(g.rollouts) for own in pool.groups for g in own)
    uses = sum(len(entries.cells) for one in actual.values() for entries in one.parts.values())
    assert asked < uses / 3


def test_slopes_are_those_of_the_loss(everything, pool):
    """The parts add up to minus its gradient by log-probs and entropies."""
    for name in MEASURED:
        algorithm = loaded(name)
        _, _, batch = next(iter(batches(pool, algorithm, everything[0])))
        given = batch.distributions
        full = [] if given is None else [given.policy]
        leaves = [values.clone().requires_grad_() for values in (batch.logprobs, batch.entropies, *full)]
        live = {"logprobs": leaves[0], "entropies": leaves[1]}
        live |= {} if given is None else {"distributions": given._replace(policy=leaves[2])}
        loss = algorithm.estimate(dataclasses.replace(batch, **live)).loss
        by_logprobs, by_entropies, *by_vocabulary = torch.autograd.grad(loss, leaves, allow_unused=True)
        actual = slopes(algorithm, batch).values()
        dense = [one.by_vocabulary for one in actual if one.by_vocabulary is not None]
        assert bool(dense) == bool(full) and all(torch.allclose(sum(dense), -one, atol=1e-12) for one in by_vocabulary)
        assert torch.allclose(sum(one.by_logprobs for one in actual), -by_logprobs, atol=1e-12)
        through = [one.by_entropies for one in actual if one.by_entropies is not None]
        assert (sum(through) + by_entropies).abs().max() < 1e-12 if through else by_entropies is None


# Single trajectories.


def requests(model: torch.nn.Module) -> list[Request]:
    """Of ragged lengths, some with entropies, one of a single token."""
    actual = []
    for number, t in enumerate(trajectories(groups=2, seed=3)):
        response = t.response_ids[: 1 if number == 0 else None]
        weights = torch.randn(2, len(response), dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        dense = torch.randn(len(response), model.config.vocab_size, dtype=torch.float64) if number % 3 == 1 else None
        actual.append(Request((t.prompt_ids, response), weights[0], weights[1] if number % 2 else None, dense))
    return actual


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [0, 4])
def test_gradients_of_single_trajectories(model, plain_model, at_once, temperature):
    """One by one and many at once through torch.func: those of autograd on a plain forward pass."""
    asked = requests(model)
    scores = ModelScores(model, 0, temperature, at_once=at_once)
    seen = []
    for members, actual in scores.gradients(asked):
        for number, gradient in zip(members, actual, strict=True):
            (prompt, response), by_logprobs, by_entropies, by_vocabulary = asked[number]
            ids = torch.tensor([[*prompt, *response]])
            logits = plain_model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
            logprobs = logits.log_softmax(dim=-1)
            total = (logprobs.gather(1, torch.tensor(response)[:, None])[:, 0] * by_logprobs).sum()
            if by_entropies is not None:
                total = total - ((logprobs.exp() * logprobs).sum(dim=-1) * by_entropies).sum()
            if by_vocabulary is not None:
                total = total + (logprobs * by_vocabulary).sum()
            expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(plain_model.parameters()))])
            assert torch.allclose(gradient, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
            seen.append(number)
    assert sorted(seen) == list(range(len(asked)))


def test_columns_are_those_of_a_plain_forward_pass(model, plain_model):
    members = trajectories(groups=2, seed=4)
    actual = ModelScores(model, 8).columns([pair_of(t) for t in members])
    logprobs, entropies = padded_logprobs(plain_model, members)
    for row, (t, (mine, own)) in enumerate(zip(members, actual, strict=True)):
        length = len(t.response_ids)
        assert torch.allclose(mine, logprobs[row, :length]) and torch.allclose(own, entropies[row, :length])


def test_a_sketched_gradient_is_the_sketch_of_the_gradient(model):
    asked = requests(model)
    whole, short = ModelScores(model, 0), ModelScores(model, 256, seed=1)
    (full,) = [values for _, values in whole.gradients(asked)]
    sizes = [parameter.numel() for parameter in short.parameters]
    assert torch.allclose(gradients(short, asked)[list(*_order(whole, asked))], short.sketch(full.split(sizes, dim=1)))


def _order(scores: ModelScores, asked: list[Request]) -> list[list[int]]:
    return [members for members, _ in scores.gradients(asked)]
