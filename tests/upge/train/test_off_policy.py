"""How far a step is off-policy: the sums against numpy on all tokens at once, for any split into micro-batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import algorithms
from upge.train.metrics import MetricSums
from upge.train.off_policy import PARTS, OffPolicySums, RatioSums, quarters
from upge.train.sample import Trajectory
from upge.trajectories import Trajectories

LENGTHS = (1, 3, 4, 9, 16)
EXACT = {"rel": 1e-12, "abs": 1e-12}


def trajectories() -> list[Trajectory]:
    return [Trajectory(0, 0, (1,), tuple(range(2, 2 + n)), 0.0, False, (-0.5,) * n, True, "ok") for n in LENGTHS]


def ratios(scale: float = 0.8) -> list[np.ndarray]:
    """log r of each token of each response."""
    random = np.random.default_rng(5)
    return [random.normal(-0.1, scale, size=n).astype(np.float32) for n in LENGTHS]


def batch(logs: list[np.ndarray]) -> Trajectories:
    """Responses whose ratios to the sampler and to the behavior policy are exp(logs) and exp(-logs)."""
    width = max(LENGTHS)
    log_ratio = torch.tensor(np.stack([np.pad(one, (0, width - len(one))) for one in logs]))
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    return Trajectories(
        logprobs=-6 + log_ratio,
        response_mask=mask,
        rewards=torch.arange(5.0, dtype=torch.float64),
        group=torch.zeros(5, dtype=torch.long),
        sampler_logprobs=torch.full_like(log_ratio, -6.0),
        behavior_logprobs=-6 + 2 * log_ratio,
    )


def sums_of(rows: list[int], logs: list[np.ndarray]) -> OffPolicySums:
    whole = batch(logs)
    tokens = whole.select(torch.tensor(rows), logprobs=whole.logprobs[rows]).pack()  # pyright: ignore
    everything = torch.ones(len(tokens), dtype=torch.bool)
    parts = OffPolicySums.of_sampler(tokens, everything, trajectories())
    return parts + OffPolicySums.of_behavior(tokens, everything, trajectories())


def expected(logs: list[np.ndarray]) -> dict[str, float]:
    """The metrics by their formulas, on all tokens at once."""
    logs = [one.astype(np.float64) for one in logs]
    log_ratio, whole = np.concatenate(logs), np.exp([one.sum() for one in logs])
    ratio = np.exp(log_ratio)
    quarter = np.concatenate([4 * np.arange(len(one)) // len(one) for one in logs])
    metrics = {
        "chi2_tokens": np.mean(ratio**2) - 1,
        "chi2_responses": np.mean(whole**2) - 1,
        "ess_tokens": ratio.sum() ** 2 / (ratio**2).sum() / len(ratio),
        "ess_responses": whole.sum() ** 2 / (whole**2).sum() / len(whole),
        "kl_k1": np.mean(-log_ratio),
        "kl_k3": np.mean(ratio - 1 - log_ratio),
        "extreme_ratio_share": np.mean((ratio > 2) | (ratio < 0.5)),
    }
    for part in range(4):
        r, log_r = ratio[quarter == part], log_ratio[quarter == part]
        metrics[f"chi2_q{part + 1}"] = np.mean(r**2) - 1
        metrics[f"kl_k3_q{part + 1}"] = np.mean(r - 1 - log_r)
        metrics[f"extreme_ratio_share_q{part + 1}"] = np.mean((r > 2) | (r < 0.5))
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[3, 0], [2, 4, 1]], [[4], [3], [2], [1], [0]]])
def test_the_metrics_are_their_formulas_for_any_split(split: list[list[int]]) -> None:
    logs = ratios()
    actual = MetricSums.total([MetricSums(off_policy=sums_of(rows, logs)) for rows in split]).off_policy.metrics()
    # The log-probs are float32, so the ratios that they give are not those of `logs`.
    given = batch(logs)
    assert given.logprobs is not None and given.sampler_logprobs is not None and given.behavior_logprobs is not None
    for pair, old in (("sampler", given.sampler_logprobs), ("behavior", given.behavior_logprobs)):
        difference = (given.logprobs - old).numpy()
        own = {n.removeprefix(f"{pair}/"): v for n, v in actual.items() if n.startswith(pair)}
        assert own == pytest.approx(expected([row[:n] for row, n in zip(difference, LENGTHS, strict=True)]), **EXACT)
    assert 0 < actual["sampler/extreme_ratio_share"] < 1 and 0 < actual["sampler/ess_responses"] < 1


def test_on_policy_data_are_worth_what_they_are() -> None:
    metrics = sums_of([0, 1, 2, 3, 4], [np.zeros(n, dtype=np.float32) for n in LENGTHS]).metrics()
    assert {name: value for name, value in metrics.items() if value} == {
        f"{pair}/ess_{of}": 1.0 for pair in ("sampler", "behavior") for of in ("tokens", "responses")
    }
    assert OffPolicySums().metrics() == {}


def test_chi_square_and_the_effective_share_say_the_same_at_the_limit() -> None:
    """ESS/N = (mean W)²/(1 + χ²), which is 1/2 at χ² = 1 where the weights' mean is 1: half of the samples."""
    log_weights = torch.tensor([0.0, 2.0]).log()
    sums = RatioSums.of(log_weights, torch.tensor([0, 1]), torch.tensor([0, 0])).metrics()
    assert sums["chi2_responses"] == pytest.approx(1) and sums["ess_responses"] == pytest.approx(0.5)


def test_far_ratios_stay_finite() -> None:
    sums = RatioSums.of(
        torch.tensor([90.0] * 9 + [-1e4]), torch.tensor([0] * 9 + [1]), torch.zeros(10, dtype=torch.long)
    )
    assert all(np.isfinite(value) for value in sums.metrics().values())
    assert np.isnan(RatioSums.of(torch.tensor([np.nan]), torch.tensor([0]), torch.tensor([0])).metrics()["kl_k1"])


def test_a_term_that_does_not_read_the_behavior_policy_has_no_ratios() -> None:
    """The trainer fills `behavior_logprobs` only where a part reads them: zeros elsewhere are no log-probs."""
    whole, algorithm = batch(ratios()), algorithms.load("hpt")
    shown = torch.tensor([False, True, False, False, False])
    behavior = torch.where(shown[:, None], 0.0, whole.logprobs)  # pyright: ignore
    columns = {"is_demonstration": shown, "behavior_logprobs": behavior, "rewards": shown.double()}
    metrics = algorithm.estimate(dataclasses.replace(whole, **columns, is_demonstration_token=None)).metrics
    assert metrics["sft/tokens"] == 3 and "sft/extreme_ratio_share" not in metrics
    columns["rewards"] = torch.tensor([1.0, 1, 0, 0, 1], dtype=torch.float64)
    metrics = algorithm.estimate(dataclasses.replace(whole, **columns, is_demonstration_token=None)).metrics
    assert metrics["rl/extreme_ratio_share"] == 0


def test_quarters_of_a_response() -> None:
    row, column = torch.tensor([0, 1, 1, 1, 4, 4, 4, 4]), torch.tensor([0, 0, 1, 2, 0, 3, 4, 15])
    assert quarters(row, column, trajectories()).tolist() == [0, 0, 1, 2, 0, 0, 1, PARTS - 1]


def test_a_micro_batch_without_compared_tokens_adds_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    sums = RatioSums.of(torch.zeros(0), none, quarters(none, none, trajectories()))
    assert not sums.metrics() and not bool(sums.tokens.any())


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[3, 0], [2, 4, 1]]])
def test_the_mass_that_a_mask_removes(split: list[list[int]]) -> None:
    """PPO's clip removes r > 1.2 where Â > 0 and r < 0.8 where Â < 0; w without it is |w·Â·r|."""
    logs = ratios()
    whole, algorithm = batch(logs), algorithms.load("grpo")
    plan, sums = algorithm.plan(whole), OffPolicySums()
    for rows in split:
        micro = whole.select(torch.tensor(rows), logprobs=whole.logprobs[rows])  # pyright: ignore
        sums += OffPolicySums.of_estimate(plan.estimate(micro), trajectories())
    rewards = np.arange(5.0)
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    mass = np.zeros((4, 2))
    assert whole.logprobs is not None and whole.behavior_logprobs is not None
    difference = (whole.logprobs - whole.behavior_logprobs).numpy().astype(np.float64)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ratio, advantage = np.exp(difference[row, t]), advantages[row]
            stopped = ratio > 1.2 if advantage > 0 else ratio < 0.8
            mass[4 * t // length] += np.array([1, stopped]) * abs(advantage) * ratio / length
    metrics = sums.metrics()
    assert metrics["rl/masked_mass"] == pytest.approx(mass[:, 1].sum() / mass[:, 0].sum(), rel=1e-5)
    for part in range(4):
        assert metrics[f"rl/masked_mass_q{part + 1}"] == pytest.approx(mass[part, 1] / mass[part, 0], rel=1e-5)
    assert 0 < metrics["rl/masked_mass"] < 1
