"""What `upge.NoiseBalanced` follows: the noise of two gradients, how far apart they are, and where their mixture errs
least."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from upge import ConfigError
from upge.gradient_noise import gradient_noise, measured_terms

GAC = algorithms.load("gac")
TERMS = measured_terms(GAC.terms, GAC.stateful["mu"])


def batch(probabilities: list[list[float]], rewards: list[float], demonstrations: int) -> upge.Trajectories:
    """One group of responses with these probabilities of their tokens. The last ones are demonstrations."""
    lengths, number = [len(row) for row in probabilities], len(rewards)
    expert = range(number - demonstrations, number)
    made = trajectories(lengths=lengths, rewards=rewards, group=[0] * number, demonstrations=expert)
    logprobs = torch.full(made.response_mask.shape, -7.0, dtype=torch.float64)  # of padding
    for row, given in enumerate(probabilities):
        logprobs[row, : len(given)] = torch.tensor(given, dtype=torch.float64).log()
    return dataclasses.replace(made, logprobs=logprobs)


# The signals.


def test_the_signals_are_their_formulas():
    """Two rollouts with Â = ±√½ (reward 1 and 0, unbiased std), and two demonstrations; φ = p(1 - p)."""
    given = batch([[0.5], [0.2, 0.8], [0.5, 0.1], [0.25]], [1.0, 0.0, 1.0, 1.0], 2)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    apart = [(0.25 - a) ** 2, (0.16 + a) ** 2, (0.25**2 + 0.09**2) / 2, 0.1875**2]
    nll = [-(math.log(0.5) + math.log(0.1)) / 2, -math.log(0.25)]
    expected = {
        "rollout_noise": a**2,
        "demonstration_noise": statistics.pvariance(nll),
        "disagreement": statistics.fmean(apart),
    }
    assert gradient_noise(*TERMS, given) == pytest.approx(expected, rel=1e-12)


def test_every_response_counts_once_whatever_its_length():
    short = batch([[0.5], [0.2], [0.3], [0.9]], [1.0, 0.0, 1.0, 1.0], 2)
    long = batch([[0.5] * 5, [0.2], [0.3] * 3, [0.9]], [1.0, 0.0, 1.0, 1.0], 2)
    assert gradient_noise(*TERMS, long) == pytest.approx(gradient_noise(*TERMS, short), rel=1e-12)


@pytest.mark.parametrize(("number", "left_out"), [(3, 0), (9, 0), (10, 1), (19, 1), (20, 2)])
def test_a_tenth_of_the_demonstrations_is_left_out_at_each_end(number, left_out):
    chances = [math.exp(-(((3 * k) % number) ** 2) / 50) for k in range(number)]  # in no order
    given = batch([[0.5], [0.5], *([p] for p in chances)], [1.0, 0.0] + [1.0] * number, number)
    kept = sorted(-math.log(p) for p in chances)[left_out : number - left_out]
    actual = gradient_noise(*TERMS, given)["demonstration_noise"]
    assert actual == pytest.approx(statistics.pvariance(kept), rel=1e-12)


def test_what_is_missing_has_no_noise():
    alone = gradient_noise(*TERMS, batch([[0.5], [0.5]], [1.0, 0.0], 0))
    assert math.isnan(alone["demonstration_noise"]) and math.isfinite(alone["disagreement"])
    alone = gradient_noise(*TERMS, batch([[0.5]], [1.0], 1))
    assert math.isnan(alone["rollout_noise"]) and alone["demonstration_noise"] == 0


def test_the_estimators_decide_what_is_compared():
    """Without φ the coefficient of a demonstration's token is 1, as in the sum of log-likelihoods."""
    chord = algorithms.load("chord_mu").terms
    terms = chord["rl"].estimator, chord["sft"].estimator
    given = batch([[0.5], [0.2], [0.3]], [1.0, 0.0, 1.0], 1)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    expected = statistics.fmean([(1 - a) ** 2, (1 + a) ** 2, 1.0])
    assert gradient_noise(*terms, given)["disagreement"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["terms.more=${terms.rl}"], "found 2 of source rollouts (rl, more)"),
        (["terms.rl.source=demonstrations"], "found 0 of source rollouts;"),
        (
            [
                "terms.sft.estimator.likelihood={_target_: upge.EntropyLikelihood}",
                "terms.sft.support={_target_: upge.FullVocabulary}",
            ],
            "terms.sft: NoiseBalanced measures coefficients by the log-probs of sampled tokens, but this term has "
            "support FullVocabulary",
        ),
    ],
)
def test_an_algorithm_without_two_such_terms_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        algorithms.load("gac", changes)
    assert message in str(caught.value)


# The share.


def signals(rollouts: float, demonstrations: float, apart: float, step: int = 0) -> dict[str, float]:
    return {"rollout_noise": rollouts, "demonstration_noise": demonstrations, "disagreement": apart, "step": step}


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_the_best_share_has_the_least_mean_squared_error(target):
    """By enumeration: g_s is one of two vectors, g_r one of three, independent of each other."""
    expert = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    own = torch.tensor([[-1.0, 0.0], [0.0, 4.0], [1.0, -1.0]], dtype=torch.float64)
    aim = target * expert.mean(0) + (1 - target) * own.mean(0)

    def error(mu: float) -> float:
        mixed = mu * expert[:, None] + (1 - mu) * own[None]
        return float((mixed - aim).square().sum(-1).mean())

    noise = [float((g - g.mean(0)).square().sum(-1).mean()) for g in (own, expert)]
    apart = float((expert.mean(0) - own.mean(0)).square().sum())
    best = upge.NoiseBalanced(target=target).best(signals(*noise, apart))
    assert best is not None and all(error(best) < error(best + shift) for shift in (-1e-3, 1e-3))
    slope = (error(best + 1e-4) - error(best - 1e-4)) / 2e-4
    assert slope == pytest.approx(0, abs=1e-9)


def test_the_share_follows_its_rule():
    """μ* = (½·2 + 3)/6 = 2/3; half of 0.9·0.5 + 0.1·2/3 and half of the prior 0.85·4/10."""
    prior = upge.Schedule(start=0.0, peak=0.85, end=0.15, warmup=10, decay=800)
    gate = upge.NoiseBalanced(smoothing=0.9, prior=prior, change=1.0)
    expected = 0.5 * (0.45 + 0.1 * 2 / 3) + 0.5 * 0.34
    assert gate.updated(0.5, signals(3.0, 1.0, 2.0, step=4)) == pytest.approx(expected, rel=1e-12)
    alone = dataclasses.replace(gate, blend=1.0)
    assert alone.updated(0.5, signals(3.0, 1.0, 2.0)) == pytest.approx(0.45 + 0.2 / 3, rel=1e-12)
    assert alone.updated(0.5, signals(0.0, 0.0, 0.0)) == 0.5, "without noise and distance nothing moves it"


def test_a_step_moves_the_share_by_a_bounded_change():
    gate = upge.NoiseBalanced(blend=1.0, smoothing=0.0)
    assert gate.updated(0.5, signals(9.0, 1.0, 0.0)) == pytest.approx(0.51)
    assert gate.updated(0.5, signals(1.0, 9.0, 0.0)) == pytest.approx(0.49)
    assert gate.updated(0.9, signals(1.0, 0.0, 0.0)) == 0.9 and gate.updated(0.05, signals(0.0, 1.0, 0.0)) == 0.05


def test_measurements_are_averaged():
    gate = upge.NoiseBalanced(smoothing=0.75)
    assert gate.tracked(None, 8.0) == 8.0 and gate.tracked(8.0, 4.0) == pytest.approx(7.0)
    assert [step for step in range(25) if gate.measured(step)] == [0, 10, 20]
    assert all(gate.due(step) for step in range(3)) and gate.initial() == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.95}, "start=0.95"),
        ({"target": 1.5}, "NoiseBalanced.target: 1.5"),
        ({"smoothing": -0.1}, "NoiseBalanced.smoothing: -0.1"),
        ({"blend": 2.0}, "NoiseBalanced.blend: 2.0"),
        ({"every": 0}, "NoiseBalanced.every: 0"),
        ({"change": -1.0}, "NoiseBalanced.change: -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        upge.NoiseBalanced(**settings)
    assert message in str(caught.value)
