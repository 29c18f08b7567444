"""Noise of the sampler: the rounding, the log-probs under top_p and bfloat16, and what corrections make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import algorithms
from tests import rollout_ranks as probe
from upge.errors import ConfigError
from upge.rollout import Sampling
from upge.rollout.noise import NoiseConfig, rounded, with_rounding
from upge.rollout.transformers_engine import TransformersSampler, distribution
from upge.rollout.vllm_engine import VLLMSampler
from upge.theory.enumerate import Setting, SoftmaxPolicy, expectation
from upge.train.config import RolloutConfig

PROBABILITIES = (0.1, 0.4, 0.2, 0.3)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# Rounded weights.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4)])
def test_rounding_is_its_formula(bits, shape):
    """q·s with s = max|w|/(2^(bits-1) - 1) of each row, computed number by number in float64."""
    weight, levels = random_weight(*shape), 2 ** (bits - 1) - 1
    expected = []
    for row in weight.double().flatten(0, -2).tolist():
        scale = max(map(abs, row)) / levels
        expected.append([round(w / scale) * scale for w in row])
    actual = rounded(weight, bits)
    assert torch.allclose(actual.double().flatten(0, -2), torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(rounded(-weight, bits), -actual)
    for row in actual.flatten(0, -2):
        assert len(row.abs().unique()) <= levels + 1


def test_rounding_by_hand():
    """Three levels with 2 bits; half of a step goes to the even multiple; a row of zeros stays."""
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-7.0, 3.5, 0.5, 0.0]])
    assert rounded(weight, 2).tolist() == [[4, -4, 0, 0], [0, 0, 0, 0], [-7, 0, 0, 0]]
    assert rounded(weight, 4)[2].tolist() == [-7, 4, 0, 0]


def test_only_matrices_are_rounded_and_none_is_changed_in_place():
    given = {"bias": random_weight(6), "scalar": random_weight(), "matrix": random_weight(4, 6)}
    before = {name: weight.clone() for name, weight in given.items()}
    sent = dict(with_rounding(given.items(), 3))
    assert sent["bias"] is given["bias"] and sent["scalar"] is given["scalar"]
    assert torch.equal(sent["matrix"], rounded(given["matrix"], 3)) and not torch.equal(
        sent["matrix"], before["matrix"]
    )
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert all(weight is given[name] for name, weight in with_rounding(given.items(), 0)), "without noise, the same"


def test_rounded_bfloat16_weights_stay_bfloat16():
    weight = random_weight(4, 6, dtype=torch.bfloat16)
    actual = rounded(weight, 4)
    assert actual.dtype is torch.bfloat16 and torch.equal(actual, rounded(weight.float(), 4).bfloat16())


# The distribution that tokens are drawn from.


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.9, (None, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9)), (0.5, (None, 0.4 / 0.7, None, 0.3 / 0.7))]
)
def test_logprobs_with_top_p_are_renormalised(top_p, expected):
    """The smallest set whose probability reaches top_p; what is left out has probability 0."""
    # Just below, because 0.4 + 0.3 + 0.2 need not be 0.9 in float32.
    sampling = Sampling(top_p=top_p - 1e-4)
    actual = distribution(torch.tensor([PROBABILITIES]).log(), sampling)[0].exp().tolist()
    assert actual == pytest.approx([p or 0.0 for p in expected], abs=1e-6)


def test_bfloat16_logits_by_hand():
    """bfloat16 keeps 8 significant bits: between 4 and 8 its numbers are multiples of 1/32, and 5 + 1/64 becomes 5."""
    logits = torch.tensor([[5.015625, 4.96875, 0.0]])
    exact, noisy = (distribution(logits, Sampling(bfloat16_logits=on))[0] for on in (False, True))
    assert torch.equal(exact, logits[0].log_softmax(-1))
    assert torch.equal(noisy, torch.tensor([5.0, 4.96875, 0.0]).log_softmax(-1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "untied"
    probe.make_model(path, tied=False, seed=0)
    return path


def test_the_sampler_draws_and_reports_what_it_was_given(model):
    """With rounded weights the log-probs are those of the model with rounded weights; exact ones undo it."""
    sampler = TransformersSampler(model, dtype="float32")
    exact = {name: weight.clone() for name, weight in sampler._model.state_dict().items()}
    sampling = Sampling(max_tokens=12)

    def sample() -> list:
        return sampler.sample(probe.PROMPTS, 3, sampling, probe.SEEDS)

    before = sample()
    sampler.load_weights(with_rounding(exact.items(), 3))
    assert all(torch.equal(w, rounded(exact[name], 3)) for name, w in sampler._model.state_dict().items())
    noisy = sample()
    ids = torch.tensor([[*probe.PROMPTS[0], *noisy[0][0].token_ids]])
    with torch.no_grad():
        logits = sampler._model(ids).logits[0, len(probe.PROMPTS[0]) - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, ids[0, len(probe.PROMPTS[0]) :, None])[:, 0]
    assert torch.allclose(own, torch.tensor(noisy[0][0].logprobs), atol=1e-5)
    assert noisy != before
    sampler.load_weights(with_rounding(exact.items(), 0))
    assert sample() == before


# Settings.


@pytest.mark.parametrize("bits", [-1, 1, 9])
def test_a_number_of_bits_that_cannot_be_is_refused(bits):
    with pytest.raises(ConfigError, match=rf"weight_bits: found {bits}; .* from 2 to 8"):
        NoiseConfig(weight_bits=bits)


def test_noise_is_off_by_default_and_names_what_is_on():
    assert not NoiseConfig().is_on and NoiseConfig().describe() == "" and NoiseConfig().metrics() == {}
    noise = NoiseConfig(weight_bits=4, bfloat16_logits=True, top_p=0.9)
    assert all(part in noise.describe() for part in ("rollout.noise", "4 bits", "bfloat16", "top_p=0.9"))
    assert noise.metrics() == {"noise/weight_bits": 4, "noise/bfloat16_logits": 1.0, "noise/top_p": 0.9}


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_vllm_refuses_to_round_logits(engine):
    with pytest.raises(ConfigError, match=rf"noise\.bfloat16_logits: .*engine={engine}.*engine=transformers"):
        RolloutConfig(engine=engine, noise=NoiseConfig(bfloat16_logits=True))
    with pytest.raises(ConfigError, match=r"rollout\.noise\.bfloat16_logits: .*engine=transformers"):
        object.__new__(VLLMSampler).check([[5]], 1, Sampling(bfloat16_logits=True), [0])


# Corrections of it, by enumeration.

#: Responses of one token, whose ratio is that of the whole response, and of up to two.
SHORT, LONGER = SoftmaxPolicy.random(4, 1, seed=3, end=None), SoftmaxPolicy.random(4, 2, seed=3)


def rewards_of(policy: SoftmaxPolicy) -> torch.Tensor:
    return torch.rand(len(policy.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noisy_sampler(policy: SoftmaxPolicy, logits: torch.Tensor, sampling: Sampling) -> SoftmaxPolicy:
    """What the engine draws from with these logits."""
    return SoftmaxPolicy(distribution(logits, sampling).double(), policy.horizon, policy.end)


def gradient(policy: SoftmaxPolicy, sampler: SoftmaxPolicy, *corrections: str, overrides: tuple[str, ...] = ()):
    algorithm = algorithms.load("rloo", list(overrides), list(corrections))
    return expectation(algorithm, Setting(policy, rewards_of(policy), sampler=sampler), group_size=2)


WHOLE = ("correction.tis.level=sequence", "correction.tis.cap=null")


@pytest.mark.parametrize("bits", [3, 0])
@pytest.mark.parametrize(("policy", "overrides"), [(SHORT, ()), (LONGER, WHOLE)], ids=["tokens", "responses"])
def test_tis_removes_the_bias_of_rounding(policy, overrides, bits):
    """The policy's table is its weight matrix, or with 0 bits its logits are rounded to bfloat16.

    The ratio of the whole response leaves no bias, up to the float32 of the sampler's log-probs.
    """
    logits = rounded(policy.logits, bits) if bits else policy.logits
    noisy = noisy_sampler(policy, logits, Sampling(bfloat16_logits=not bits))
    plain, corrected = gradient(policy, noisy), gradient(policy, noisy, "tis", overrides=overrides)
    assert plain.relative_bias > (0.02 if bits else 1e-4)
    assert corrected.relative_bias < 1e-6


def test_what_top_p_leaves_out_cannot_be_corrected():
    """Σ π(y)·(R(y) - E_μ[R])·∇log π(y) over the responses that μ can draw: the others are missing."""
    truncated = noisy_sampler(LONGER, LONGER.logits, Sampling(top_p=0.8))
    whole, mu = gradient(LONGER, truncated, "tis", overrides=WHOLE), truncated.probabilities
    rewards = rewards_of(LONGER)
    drawn = mu > 0
    assert 0 < int((~drawn).sum()) < len(mu)
    advantage = torch.where(drawn, LONGER.probabilities * (rewards - (mu * rewards).sum()), 0.0)
    expected = torch.einsum("s,spv->pv", advantage, LONGER.token_scores.sum(dim=1))
    length = float(expected.norm())
    assert torch.allclose(whole.mean / whole.mean.norm(), expected / length, atol=1e-6)
    assert whole.relative_bias > 0.05
