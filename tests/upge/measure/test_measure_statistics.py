"""Sketches keep inner products as stated; statistics are unbiased, by adding up every sample; intervals cover."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from upge.errors import ConfigError
from upge.measure import Estimated, Sample, Sketch, cosine_of, cosine_with, exact_metrics, metrics
from upge.measure.by_rate import _snr
from upge.measure.metrics import between, gram, jackknife, within


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Sketches.

SIZES = (300, 7, 1000, 1)


def cut(vectors: torch.Tensor) -> list[torch.Tensor]:
    """[n, D] as tensors of different shapes."""
    parts = vectors.split(SIZES, dim=1)
    return [parts[0].reshape(-1, 30, 10), parts[1], parts[2].reshape(-1, 10, 10, 10), parts[3]]


def test_a_sketch_is_linear_and_the_same_every_time():
    x, y = noise(2, sum(SIZES), seed=1), noise(2, sum(SIZES), seed=2)
    first, again, other = (Sketch(SIZES, 64, seed) for seed in (3, 3, 4))
    assert torch.allclose(first(cut(2 * x - y)), 2 * first(cut(x)) - first(cut(y)), atol=1e-12)
    assert torch.equal(first(cut(x)), again(cut(x))) and not torch.allclose(first(cut(x)), other(cut(x)))
    # Several at once as each alone.
    assert torch.allclose(first(cut(x))[1:], first(cut(x[1:])), atol=1e-12)


@pytest.mark.parametrize("width", [16, 128, 5000])
def test_a_sketch_keeps_inner_products_within_its_stated_error(width):
    """Over 400 sketches: no bias beyond four standard errors, and the variance that is stated, for vectors of equal
    and of very unequal entries."""
    dense = noise(2, sum(SIZES), seed=5)
    spiky = dense * torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 20
    for x, y in (dense, spiky):
        y = y + 0.5 * x
        actual = []
        for seed in range(400):
            sketch = Sketch(SIZES, width, seed)
            a, b = sketch(cut(torch.stack([x, y])))
            actual.append([float(a @ b), float(a @ a)])
        actual = torch.tensor(actual, dtype=torch.float64)
        exact = torch.stack([x @ y, x @ x])
        bound = torch.stack([(x @ x) * (y @ y) + (x @ y) ** 2, 2 * (x @ x) ** 2]) / width
        assert bool(((actual.mean(dim=0) - exact).abs() <= 4 * (bound / 400).sqrt() + 1e-9).all())
        assert bool((actual.var(dim=0) <= 1.3 * bound).all())
        assert float(actual[:, 1].std() / exact[1]) <= 1.15 * sketch.relative_error


def test_a_sketch_of_short_numbers_is_added_up_in_longer_ones():
    """4,000 pieces of bfloat16, all alike in sign: as the same numbers in float64."""
    x = noise(1, 4000 * 8).abs().bfloat16()
    sketch = Sketch((4000 * 8,), 8)
    actual, exact = sketch([x]), sketch([x.double()])
    assert actual.dtype == torch.float32 and torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_sketch_of_width_0_is_the_gradient():
    x = noise(3, sum(SIZES))
    whole = Sketch(SIZES, 0)
    assert torch.equal(whole(cut(x)), x) and whole.relative_error == 0 and whole.width == sum(SIZES)
    with pytest.raises(ConfigError, match="width -1"):
        Sketch(SIZES, -1)
    with pytest.raises(ValueError, match="made for"):
        whole([x])


# Unbiased products.


def test_products_of_rounds_are_unbiased_exactly():
    """The expectation over every sample of three rounds, each one of four vectors with a probability."""
    outcomes, p = noise(4, 3), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mean, total, naive = p @ outcomes, 0.0, 0.0
    ones = torch.ones(3, dtype=torch.float64)
    for chosen in itertools.product(range(4), repeat=3):
        means, probability = outcomes[list(chosen)], float(p[list(chosen)].prod())
        total += probability * float(within(gram(means, means), ones))
        naive += probability * float(means.mean(dim=0).square().sum())
    assert total == pytest.approx(float(mean @ mean), abs=1e-14)
    assert naive > 1.2 * float(mean @ mean), "the square of the average has the noise in it"


def test_weights_and_single_rounds():
    a, b = noise(4, 6), noise(5, 6, seed=1)
    left, right = torch.tensor([1.0, 0, 2, 1], dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    expected = (left @ a / 4) @ b.mean(dim=0)
    assert float(between(gram(a, b), left, right)) == pytest.approx(float(expected))
    alone = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    assert math.isnan(within(gram(a, a), alone))


def test_the_jackknife_is_that_of_the_mean():
    """σ² of a mean is s²/n, and of a difference of two means the sum of both."""
    x, y = noise(12), noise(9, seed=1)

    def difference(weights):
        return ((weights[0] @ x) / weights[0].sum() - (weights[1] @ y) / weights[1].sum())[None]

    (actual,) = jackknife(difference, [torch.ones(12).double(), torch.ones(9).double()])
    a, b = float(x.var()) / 12, float(y.var()) / 9
    freedom = (a + b) ** 2 / (a**2 / 11 + b**2 / 8)
    assert actual.value == pytest.approx(float(x.mean() - y.mean()))
    assert actual.high - actual.value == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(a + b))
    (constant,) = jackknife(lambda w: torch.ones(1).double(), [torch.ones(4).double()])
    assert constant == Estimated.exactly(1.0)


def test_figures_cover_the_truth():
    """Estimates with a known mean and noise: of 120 samples the intervals of each figure hold the exact one in at least
    85 % (95 % is meant; three standard errors of 120 are 6 %, and 8 rounds are few)."""
    k, rounds, batches, parts = 40, 8, 6, 8
    true = noise(k, seed=3)
    mean = 0.3 * true + 0.15 * noise(k, seed=4)
    spread, doubt = 0.4, 0.8
    exact = exact_metrics(mean, float(mean @ mean) + k * spread**2, true)
    held = {name: 0 for name in ("cosine", "bias", "scale", "raw_bias", "noise", "snr", "alignment", "power", "signal")}
    for trial in range(120):
        estimates = mean + spread * noise(rounds * batches, k, seed=100 + trial)
        target = true + doubt * noise(parts, k, seed=1000 + trial)
        sample = Sample.of(estimates, torch.arange(rounds).repeat_interleave(batches), rounds)
        actual = metrics(sample, target)
        for name in held:
            one = getattr(actual, name)
            held[name] += one.low <= getattr(exact, name).value <= one.high
    assert all(count >= 0.85 * 120 for count in held.values()), held


def test_an_interval_beyond_the_range_does_not_become_a_point():
    assert Estimated(0.9, 0.7, 1.1).within(-1, 1) == Estimated(0.9, 0.7, 1)
    assert Estimated(1.5, 1.2, 1.8).within(-1, 1) == pytest.approx((1, 0.7, 1))
    assert Estimated(-0.25, -0.75, 0.25).within(0, 1) == Estimated(0, 0, 0.5)
    assert all(map(math.isnan, Estimated.exactly(math.nan).within(-1, 1)))


def test_a_mean_lost_in_noise_has_no_noise_figure_and_no_upper_end():
    """Not one of 0, which is what the root of a negative square would be."""
    lost, doubtful, known = Estimated(-0.1, -0.3, 0.25), Estimated(0.25, -0.1, 1.0), Estimated(0.25, 0.04, 1.0)
    assert math.isnan(lost.inverse_root().value) and lost.inverse_root()[1:] == pytest.approx((2.0, math.inf))
    assert doubtful.inverse_root() == pytest.approx((2.0, 1.0, math.inf))
    assert known.inverse_root() == pytest.approx((2.0, 1.0, 5.0))
    assert Estimated.exactly(math.inf).inverse_root() == Estimated.exactly(0.0)
    assert str(Estimated(-0.5, -1.0, 4.0).root().value) == "0.0" and Estimated(-0.5, -1.0, 4.0).root().high == 2


@pytest.mark.parametrize("prompts", [3, 12])
def test_signal_by_pass_rate_does_not_depend_on_how_many_prompts_there_are(prompts):
    """Prompts whose means scatter around a common one, over 300 bins: the law's share of signal in the power, which
    that of a bin's own mean exceeds by a third of the scatter where it has three prompts. Intervals cover."""
    k, rounds, spread, doubt = 30, 4, 0.6, 0.5
    common = 0.5 * noise(k, seed=1)
    exact = float(common @ common) / (k * (spread**2 + doubt**2))
    actual, held = [], 0
    for trial in range(300):
        means = common + spread * noise(prompts, 1, k, seed=10 + trial)
        one = _snr(means + doubt * noise(prompts, rounds, k, seed=1000 + trial))
        # As a share of the power, whose expectation is nearer to the ratio of the expectations.
        actual.append(one.value / (1 + one.value))
        held += one.low <= exact <= one.high
    assert sum(actual) / len(actual) == pytest.approx(exact / (1 + exact), abs=0.03)
    assert held >= 0.88 * 300
    alone = _snr(noise(1, rounds, k))
    assert math.isnan(alone.value)


def test_exact_figures_are_the_textbooks():
    mean, true = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    actual = exact_metrics(mean, 125.0, true)
    values = {name: getattr(actual, name).value for name in ("cosine", "bias", "scale", "raw_bias", "noise", "snr")}
    assert values == pytest.approx(
        {"cosine": 0.6, "bias": 0.8, "scale": 3.0, "raw_bias": math.sqrt(20), "noise": 2.0, "snr": 0.25}
    )
    assert actual.alignment.value == pytest.approx(3 / math.sqrt(125))
    assert actual.alignment.value == pytest.approx(0.6 / math.sqrt(1 + 1 / 0.25))
    opposite = exact_metrics(-mean, 125.0, true)
    assert opposite.bias.value == 1 and opposite.cosine.value == pytest.approx(-0.6)


def test_a_scale_changes_no_figure_that_is_free_of_it():
    estimates, target = noise(24, 10) + 1, noise(4, 10, seed=1) + 1
    rounds = torch.arange(4).repeat_interleave(6)
    a, b = (metrics(Sample.of(estimates * c, rounds, 4), target) for c in (1.0, 7.0))
    for name in ("cosine", "bias", "noise", "snr", "alignment"):
        assert getattr(a, name) == pytest.approx(getattr(b, name))
    assert b.scale.value == pytest.approx(7 * a.scale.value)


def test_cosines_have_the_noise_taken_out():
    """Two estimators with the same noise in the same round: the cosine of their averages is near 1, that of their means
    is that of the means."""
    k, a, b = 60, noise(60, seed=1), noise(60, seed=2)
    shared = 5 * noise(40, k, seed=3)
    rounds = torch.arange(40)
    first, second = (Sample.of(mean + shared, rounds, 40) for mean in (a, b))
    exact = float(a @ b / (a.norm() * b.norm()))
    actual = cosine_of(first, second)
    assert actual.low <= exact <= actual.high and actual.high - actual.low < 1
    plain = torch.nn.functional.cosine_similarity(first.means.mean(dim=0), second.means.mean(dim=0), dim=0)
    assert float(plain) > exact + 0.1
    known = cosine_with(first, b[None])
    assert known.low <= exact <= known.high


def test_rounds_without_estimates_do_not_count():
    estimates, target = noise(6, 50) / 2 + 1, noise(3, 50, seed=1) / 2 + 1
    packed = metrics(Sample.of(estimates, torch.tensor([0, 0, 1, 1, 2, 2]), 3), target)
    spread = metrics(Sample.of(estimates, torch.tensor([1, 1, 3, 3, 4, 4]), 6), target)
    for name in ("cosine", "scale", "snr", "alignment", "power", "signal"):
        assert getattr(packed, name) == pytest.approx(getattr(spread, name), nan_ok=True)
    assert math.isfinite(packed.alignment.low)
    alone = metrics(Sample.of(estimates, torch.zeros(6, dtype=torch.long), 4), target)
    assert math.isnan(alone.cosine.value) and math.isfinite(alone.alignment.value)


def test_without_a_true_gradient_nothing_is_held_against_it():
    """One lucky part out of several makes no direction: products of different parts are 0."""
    sample = Sample.of(noise(8, 5) + 1, torch.arange(4).repeat_interleave(2), 4)
    target = torch.zeros(4, 5, dtype=torch.float64)
    for lucky in (0.0, 1.0):
        target[0] = lucky
        actual = metrics(sample, target)
        assert all(math.isnan(getattr(actual, name).value) for name in ("cosine", "bias", "scale", "alignment"))
        assert math.isfinite(actual.power.value) and math.isnan(cosine_with(sample, target).value)
