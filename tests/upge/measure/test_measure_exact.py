"""What the instrument says of a sample must agree with what adding up every batch says, within its intervals."""

from __future__ import annotations

import itertools

import pytest
import torch

from experiments.theory import load, setting, shipped
from tests.measuring import TableScores, drawn
from upge.errors import ConfigError
from upge.measure import (
    Directions,
    Targets,
    batch_sample,
    bins_of,
    conflict,
    deal,
    estimator,
    exact_metrics,
    gradients,
    imitation,
    measured,
    metrics,
    same,
    true_gradient,
)
from upge.measure.contributions import sources
from upge.measure.diagnosis import exact, thresholds
from upge.theory.enumerate import expectation
from upge.train.sample import Trajectory

NAMES = ("rloo", "grpo", "sft", "dft", "hpt", "luffy", "srft", "rloo+entropy")
PROMPTS, ROUNDS, GROUP, PARTS = 16, 8, 3, 8


def algorithm(name: str):
    plain, *corrections = name.split("+")
    return load(plain, corrections)


@pytest.mark.parametrize("one", shipped(), ids=lambda one: one.name)
def test_enumeration_agrees_with_the_theory(one):
    """Mean and signal to noise of every shipped algorithm, and parts that add up."""
    made = setting()
    actual = exact(one, made, group_size=2)
    report = expectation(one, made, group_size=2, target=made.objectives["reward"])
    assert torch.allclose(actual[""].mean, report.mean.flatten(), atol=1e-14)
    mine = exact_metrics(actual[""].mean, actual[""].power, made.objectives["reward"].flatten())
    assert mine.snr.value == pytest.approx(report.snr**2) and mine.cosine.value == pytest.approx(report.cosine)
    parts = [values.mean for part, values in actual.items() if part]
    assert torch.allclose(sum(parts), actual[""].mean, atol=1e-14) and set(actual) <= {"", *sources(one)}


def test_the_true_gradient_is_unbiased_exactly():
    """Over every pair of rollouts, weighted by their probability."""
    made = setting()
    policy, scores = made.policy, TableScores(made.policy)
    responses, total = policy.responses.lists(), torch.zeros(scores.width, dtype=torch.float64)
    for chosen in itertools.product(range(len(responses)), repeat=2):
        rollouts = [Trajectory(0, 0, (0,), responses[i], float(made.reward[i]), False) for i in chosen]
        probability = float(policy.probabilities[list(chosen)].prod())
        total += probability * true_gradient(scores, [[rollouts]])[0, 0]
    assert torch.allclose(total, made.objectives["reward"].flatten(), atol=1e-12)


@pytest.fixture(scope="module")
def sampled() -> tuple:
    made = setting()
    pool = drawn(made, PROMPTS, ROUNDS, GROUP, PARTS, seed=5, part_size=12)
    scores, directions = TableScores(made.policy), Directions()
    pairs = pool.pairs()
    columns = {
        pair: {"logprobs": logprobs, "entropies": entropies}
        for pair, (logprobs, entropies) in zip(pairs, scores.columns(pairs), strict=True)
    }
    actual = {name: estimator(algorithm(name), pool, columns, directions) for name in NAMES}
    shown = imitation(pool, directions)
    rows = gradients(scores, directions.requests)
    to = Targets(true_gradient(scores, pool.reference), shown.dense((PROMPTS, ROUNDS), rows).sum(dim=0))
    return made, pool, actual, rows, to


def test_intervals_hold_the_exact_figures(sampled):
    """Of all figures of all algorithms and their parts at least 85 % of those with a meaning; and none is far off:
    within three times its interval."""
    made, pool, actual, rows, to = sampled
    held, asked = 0, 0
    for name, one in actual.items():
        truth = exact(algorithm(name), made, group_size=GROUP)
        for part in ("", *(one.parts if len(one.parts) > 1 else ())):
            if not bool(truth[part].mean.any()):
                continue
            known = exact_metrics(truth[part].mean, truth[part].power, made.objectives["reward"].flatten())
            sample = batch_sample(pool, one.contributions(pool, rows, [part] if part else None))
            mine = metrics(sample, to.pooled)
            for figure in ("cosine", "scale", "snr", "alignment", "power", "signal"):
                value, low, high = getattr(mine, figure)
                exactly = getattr(known, figure).value
                slack = 1e-9 + (high - low)
                assert low - slack <= exactly <= high + slack, (name, part, figure)
                asked, held = asked + 1, held + (low - 1e-9 <= exactly <= high + 1e-9)
    assert asked > 70 and held >= 0.85 * asked, f"{held} of {asked}"


def test_more_of_the_sample(sampled):
    """Imitation, conflict, and who is the same: against the exact means."""
    made, pool, actual, rows, to = sampled
    shown = made.objectives["imitation"].flatten()
    assert torch.nn.functional.cosine_similarity(to.imitation.mean(dim=0), shown, dim=0) > 0.99
    bins = bins_of(pool.pass_rates)
    truth = exact(algorithm("luffy"), made, group_size=GROUP)
    exactly = torch.nn.functional.cosine_similarity(truth["rl"].mean, truth["offline"].mean, dim=0)
    met = conflict(pool, actual["luffy"], rows, bins)
    assert met.overall.low <= float(exactly) <= met.overall.high
    assert conflict(pool, actual["rloo"], rows, bins) is None
    # All prompts are in one bin, and a single prompt is the batch: there the figures are those of batches.
    # The demonstrations of a round are those that an algorithm learns from there: no noise of theirs is in the cosine.
    sft = measured(pool, actual["sft"], "", actual["sft"].contributions(pool, rows), bins, to)
    whole = exact(algorithm("sft"), made, group_size=GROUP)[""].mean
    assert sft.imitation.low <= float(whole @ shown / (whole.norm() * shown.norm())) + 1e-9
    line = measured(pool, actual["rloo"], "", actual["rloo"].contributions(pool, rows), bins, to)
    (at,) = line.by_rate
    assert at.pooled.alignment == pytest.approx(line.overall.alignment)
    assert at.pooled.snr.value == pytest.approx(line.overall.snr.value)
    assert sum(one.groups for one in line.by_count) < PROMPTS * ROUNDS, "groups without a difference have no weight"
    estimates = {
        "a": torch.ones(2, 3).double(), "b": 5 * torch.ones(2, 3).double(), "c": -torch.ones(2, 3).double()
    }  # fmt: skip
    assert same(estimates) == [["a", "b"], ["c"]]


def test_bins_and_thresholds():
    rates = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 0.0], dtype=torch.float64)
    actual = {one.label: one.prompts for one in bins_of(rates)}
    assert actual == {"0": (0, 6), "0–0.25": (1, 2), "0.25–0.5": (3,), "0.75–1": (4,), "1": (5,)}
    assert thresholds(algorithm("grpo"), 4) == {}
    at = thresholds(algorithm("hpt"), 4)
    assert list(at) == [0, 0.25, 0.5, 0.75, 1]
    assert {term.gate.threshold for term in at[0.5].terms.values()} == {0.5}


def test_dealing_is_an_epoch_each_round():
    dealt = deal(12, 3, 5, seed=1)
    assert all(sorted(q for batch in one for q in batch) == list(range(12)) for one in dealt)
    assert dealt == deal(12, 3, 5, seed=1) and dealt[0] != dealt[1]
    with pytest.raises(ConfigError, match="5 does not divide prompts=12"):
        deal(12, 5, 2, seed=0)
