"""The expected gradient of every estimator, exactly: what is unbiased is so to 1e-10, and biases have a number."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import algorithms
import upge
from experiments import theory as docs
from upge.prompt_memory import Remembered
from upge.theory import enumerate as theory
from upge.theory.enumerate import Setting, SoftmaxPolicy, expectation

EXACT = 1e-10
PER_TOKEN = upge.SequenceMean(tokens="sum")
NOTHING = upge.ConstantAdvantage(value=0.0)
#: Two tokens, any of three or the end: seven responses of one or two tokens. Three fixed steps of two: eight.
RAGGED, FIXED = SoftmaxPolicy.random(3, 2, seed=4), SoftmaxPolicy.random(2, 3, seed=1, end=None)
SPACES = {"ragged": RAGGED, "fixed": FIXED, "one step": SoftmaxPolicy.random(7, 1, seed=2)}


def reward(policy: SoftmaxPolicy, binary: bool = True) -> torch.Tensor:
    values = torch.rand(len(policy.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (values > 0.5).double() if binary else values


def algorithm(
    advantage: upge.AdvantageEstimator = NOTHING,
    denominator: upge.ReferenceDenominator | None = None,
    mask: upge.StabilizationMask | None = None,
    reduction: upge.Reduction = PER_TOKEN,
    source: str = "rollouts",
    **regularizers: upge.Regularizer,
) -> upge.Algorithm:
    estimator = upge.UnifiedGradient(mask or upge.NoMask(), denominator or upge.CurrentPolicy(), advantage)
    term = upge.Term(source=source, gate=upge.ConstantGate(), estimator=estimator, reduction=reduction)
    return upge.Algorithm(name="made here", terms={"rl": term}, regularizers=regularizers)


# The enumeration itself.


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_probabilities_sum_to_one(policy):
    assert abs(float(policy.probabilities.sum()) - 1) < 1e-12
    assert len(set(policy.responses.lists())) == len(policy.responses)
    drawn = list(theory.multisets(policy.probabilities.tolist(), 3))
    n = len(policy.responses)
    assert len(drawn) == math.comb(n + 2, 3) and abs(sum(p for _, p in drawn) - 1) < 1e-12


def test_responses_are_those_that_there_are():
    assert RAGGED.responses.lists() == [(0,), *((a, b) for a in (1, 2) for b in (0, 1, 2))]
    assert FIXED.responses.lists() == list(itertools.product((0, 1), repeat=3))
    assert RAGGED.responses.prefixes == 3 and FIXED.responses.prefixes == 7


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_scores_are_the_derivatives_of_the_table(policy):
    def at(logits):
        moved = SoftmaxPolicy(logits, policy.horizon, policy.end)
        return moved.token_logprobs, moved.token_entropies

    scores, slopes = torch.autograd.functional.jacobian(at, policy.logits)
    assert torch.allclose(policy.token_scores, scores, rtol=0, atol=1e-12)
    assert torch.allclose(policy.entropy_scores, slopes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_exact_gradients_equal_autograd_and_finite_differences(policy):
    other, rewards = policy.moved(0.7), reward(policy, binary=False)
    objectives = {
        theory.exact_gradient: (rewards, lambda p: (p.probabilities * rewards).sum()),
        theory.forward_kl_gradient: (other, lambda p: (other.probabilities * (other.logprobs - p.logprobs)).sum()),
        theory.reverse_kl_gradient: (other, lambda p: (p.probabilities * (p.logprobs - other.logprobs)).sum()),
    }
    for exact, (argument, objective) in objectives.items():
        logits = policy.logits.clone().requires_grad_()
        table = lambda values: SoftmaxPolicy(values, policy.horizon, policy.end)  # noqa: E731
        (expected,) = torch.autograd.grad(objective(table(logits)), logits)
        actual = exact(policy, argument)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
        step = 1e-5 * torch.eye(policy.logits.numel(), dtype=torch.float64).view(-1, *policy.logits.shape)
        slopes = [(objective(table(policy.logits + s)) - objective(table(policy.logits - s))) / 2e-5 for s in step]
        assert torch.allclose(actual.flatten(), torch.stack(slopes), rtol=0, atol=1e-9)
    assert theory.reverse_kl(policy, other) > 0 and theory.forward_kl(policy, policy) == pytest.approx(0, abs=1e-12)


def test_conditioning_on_success():
    """Maximum likelihood on one's own successes climbs the reward: -∇KL(π(·|R=1)‖π) = ∇E[R]/E[R]."""
    rewards = reward(RAGGED)
    winners = RAGGED.conditioned(rewards)
    expected = RAGGED.probabilities * rewards / (RAGGED.probabilities * rewards).sum()
    assert torch.allclose(winners.probabilities, expected, rtol=0, atol=1e-14)
    climbed = -theory.forward_kl_gradient(RAGGED, winners) * float((RAGGED.probabilities * rewards).sum())
    assert torch.allclose(climbed, theory.exact_gradient(RAGGED, rewards), rtol=0, atol=1e-14)


def test_expectation_equals_brute_force_through_the_table():
    """All ordered triples, each a batch whose loss is differentiated down to the logits."""
    space, behavior, reference = RAGGED.responses, RAGGED.moved(0.3), RAGGED.moved(0.4, seed=5)
    bonus = {
        "kl": upge.KLPenalty(coefficient=0.3, reduction=upge.TokenMean()),
        "entropy": upge.EntropyBonus(coefficient=0.2, reduction=upge.TokenMean()),
    }
    algo = algorithm(upge.GroupRelative(), upge.BehaviorPolicy(), upge.PPOClip(), upge.TokenMean(), **bonus)
    setting = Setting(RAGGED, reward(RAGGED), behavior=behavior, reference=reference)
    total, square = torch.zeros_like(RAGGED.logits), 0.0
    for ys in itertools.product(range(len(space)), repeat=3):
        rows, table = list(ys), SoftmaxPolicy(RAGGED.logits.clone().requires_grad_(), RAGGED.horizon)
        batch = upge.Trajectories(
            logprobs=table.token_logprobs[rows],
            entropies=table.token_entropies[rows],
            response_mask=space.mask[rows],
            rewards=setting.reward[rows],
            group=torch.zeros(3, dtype=torch.long),
            is_demonstration=torch.zeros(3, dtype=torch.bool),
            behavior_logprobs=behavior.token_logprobs[rows],
            reference_logprobs=reference.token_logprobs[rows],
        )
        (slope,) = torch.autograd.grad(algo.estimate(batch).loss, table.logits)
        p = float(behavior.probabilities[rows].prod())
        total, square = total - p * slope, square + p * float(slope.square().sum())
    report = expectation(algo, setting, group_size=3)
    assert torch.allclose(report.mean, total, rtol=0, atol=1e-12)
    assert report.variance == pytest.approx(square - float(total.square().sum()), rel=1e-9)
    assert report.batches == math.comb(9, 3)


# What claims to be unbiased.


@pytest.mark.parametrize("value", [-0.4, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("group_size", [1, 2])
def test_what_is_remembered_of_a_prompt_is_an_unbiased_baseline(value, group_size):
    """Given the memory, because its value does not depend on this step's rollouts; the variance depends on it."""
    rewards, remembered = reward(RAGGED), Remembered(value, 3, 1, 0.5, 2)
    actual = expectation(
        algorithm(upge.PromptBaseline()), Setting(RAGGED, rewards, remembered=remembered), group_size=group_size
    )
    assert torch.allclose(actual.mean, theory.exact_gradient(RAGGED, rewards), rtol=0, atol=EXACT)
    whitened = algorithm(upge.Whitened(upge.PromptBaseline(), over="rollouts"))
    if group_size > 1:
        scaled = expectation(whitened, Setting(RAGGED, rewards, remembered=remembered), group_size=group_size).mean
        assert not torch.allclose(scaled, actual.mean, rtol=0, atol=1e-4), "a batch's own mean and deviation are not"


@pytest.mark.parametrize("group_size", [2, 3, 4])
@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("binary", [True, False])
def test_leave_one_out_is_unbiased(policy, group_size, binary):
    report = expectation(algorithm(upge.LeaveOneOut()), Setting(policy, reward(policy, binary)), group_size=group_size)
    assert report.relative_bias < EXACT and report.cosine == pytest.approx(1)


@pytest.mark.parametrize(("name", "scale"), [("reinforce", 2 / 1024), ("dr_grpo", 2 / 3 / 1024), ("rloo", 1.0)])
@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_on_policy_algorithms_are_unbiased_up_to_their_scale(policy, name, scale):
    """±1 is 2R-1, hence the 2; the group's own mean takes a share of (n-1)/n; length is a constant divisor."""
    algo = algorithms.load(name)
    report = expectation(algo, Setting(policy, reward(policy)), group_size=3, scale=scale)
    assert report.relative_bias < EXACT
    several = expectation(algo, Setting(policy, reward(policy)), group_size=2, questions=2)
    _, remainder = theory.mixture(several.mean, [several.exact])
    assert remainder < EXACT and several.snr > 0


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_advantages_over_time(policy):
    """λ = 1 is unbiased whatever the critic says; any λ is with a perfect critic; λ < 1 with a wrong one is not."""
    rewards = reward(policy, binary=False)
    values = theory.exact_values(policy, rewards)
    wrong = values + torch.linspace(-1, 1, len(values), dtype=torch.float64)

    def bias(lam, critic):
        setting = Setting(policy, rewards, values=critic)
        return expectation(algorithm(upge.GAE(discount=1.0, lam=lam)), setting, group_size=1).relative_bias

    assert bias(1.0, wrong) < EXACT
    assert all(bias(lam, values) < EXACT for lam in (0.0, 0.5, 0.95))
    assert policy.horizon == 1 or bias(0.5, wrong) > 0.05
    plain = expectation(algorithm(upge.ReturnToGo()), Setting(policy, rewards), group_size=1)
    assert plain.relative_bias < EXACT


def test_a_baseline_lowers_the_variance():
    setting = Setting(RAGGED, reward(RAGGED) + 1)
    with_one, without = (
        expectation(algorithm(a), setting, group_size=2) for a in (upge.LeaveOneOut(), upge.ReturnToGo())
    )
    assert with_one.variance < 0.7 * without.variance


@dataclass(frozen=True)
class WholeRatio(upge.ReferenceDenominator):
    """π_θ/π_ref = Π_t π_θ/π_old: the importance ratio of the whole response."""

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "behavior_logprobs"})
    reach: ClassVar[str] = "trajectory"

    def __call__(self, batch):
        return batch.logprobs.detach() - batch.log_importance_ratio.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("policy", SPACES.values(), ids=SPACES)
def test_importance_weights_off_policy(policy):
    """The ratio of one token is exact for one step alone; that of the whole response always; no ratio never."""
    setting = Setting(policy, reward(policy), behavior=policy.moved(0.8))
    bias = {
        part: expectation(algorithm(upge.LeaveOneOut(), part()), setting, group_size=3).relative_bias
        for part in (upge.BehaviorPolicy, WholeRatio, upge.CurrentPolicy)
    }
    assert bias[WholeRatio] < EXACT and bias[upge.CurrentPolicy] > 0.05
    assert (bias[upge.BehaviorPolicy] < EXACT) if policy.horizon == 1 else (bias[upge.BehaviorPolicy] > 0.02)
    clipped = algorithm(upge.LeaveOneOut(), upge.BehaviorPolicy(), upge.PPOClip())
    assert expectation(clipped, setting, group_size=3).relative_bias > 0.05


def test_maximum_likelihood_is_the_forward_kl_where_lengths_are_equal():
    for policy, biased in ((FIXED, False), (RAGGED, True)):
        setting = Setting(policy, reward(policy), expert=policy.moved(1.0))
        for number in (1, 3):
            report = expectation(algorithms.load("sft"), setting, demonstrations=number, scale=1 / policy.horizon)
            assert (report.relative_bias > 0.01) == biased and (biased or report.relative_bias < EXACT)
            imitation = algorithm(upge.ConstantAdvantage(1.0), source="demonstrations")
            assert expectation(imitation, setting, demonstrations=number).relative_bias < EXACT


def test_the_standard_deviation_turns_no_gradient_of_binary_rewards():
    """One question, rewards 0 and 1, tokens summed: only its length changes. Rewards between turn it."""
    algo = algorithm(upge.GroupRelative())
    for binary in (True, False):
        report = expectation(algo, Setting(RAGGED, reward(RAGGED, binary)), group_size=3)
        _, remainder = theory.mixture(report.mean, [report.exact])
        assert (remainder < EXACT) == binary and (binary or remainder > 0.005)


def test_preference_pairs_start_in_the_direction_of_the_reward():
    """Where π_θ = π_0 every pair weighs β/2, and E[∇ log π(better) - ∇ log π(worse)] is ∇E[R] over P(1-P)."""
    pairs = algorithms.load("dpo")
    rewards = reward(RAGGED)
    rate = float((RAGGED.probabilities * rewards).sum())
    start = expectation(pairs, Setting(RAGGED, rewards, reference=RAGGED), scale=0.1 / 2 / (rate * (1 - rate)))
    assert start.relative_bias < EXACT and start.accepted == pytest.approx(2 * rate * (1 - rate))
    later = expectation(pairs, Setting(RAGGED, rewards, reference=RAGGED.moved(0.5)))
    assert theory.mixture(later.mean, [later.exact])[1] > 1e-3


def test_dynamic_sampling_keeps_groups_that_differ():
    gate = upge.PassRateBetween()
    plain = algorithm(upge.LeaveOneOut())
    chosen = upge.Algorithm("made here", plain.terms, sampling=upge.DynamicSampling(gate))
    setting = Setting(RAGGED, reward(RAGGED))
    rate = float((RAGGED.probabilities * setting.reward).sum())
    kept, every = (expectation(a, setting, group_size=3) for a in (chosen, plain))
    assert kept.accepted == pytest.approx(1 - rate**3 - (1 - rate) ** 3) and every.accepted == pytest.approx(1)
    assert torch.allclose(kept.mean * kept.accepted, every.mean, rtol=0, atol=1e-12)


def test_mixture_finds_what_was_mixed():
    setting = Setting(RAGGED, reward(RAGGED, binary=False), expert=RAGGED.moved(1.0), reference=RAGGED.moved(0.5))
    parts = setting.objectives
    mixed = 0.3 * parts["reward"] + 2 * parts["imitation"] - 0.7 * parts["proximity"]
    coefficients, remainder = theory.mixture(mixed, parts.values())
    assert coefficients == pytest.approx((0.3, 2, -0.7)) and remainder < EXACT
    assert theory.mixture(mixed, [parts["reward"]])[1] > 0.01


# The table, and what is refused.


@pytest.mark.slow
def test_the_tables_in_the_docs_are_current():
    text = docs.TABLES.page.read_text()
    assert docs.TABLES.updated(text) == text, "run python -m experiments.theory --docs"


def test_the_example_in_the_docs_runs():
    example = docs.TABLES.page.read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(example, "docs/theory.md", "exec"), names)  # it ends with an assertion of its own
    assert names["report"].batches == 84


def test_the_command_refuses_other_arguments(capsys):
    assert docs.main(["--readme"]) == 2 and "--docs" in capsys.readouterr().err
    with pytest.raises(upge.ConfigError, match="markers|missing"):
        docs.TABLES.updated("# nothing\n")


def test_what_cannot_be_enumerated_is_refused():
    setting = Setting(RAGGED, reward(RAGGED))
    with pytest.raises(upge.ConfigError, match="give `expert`"):
        expectation(algorithms.load("sft"), setting)
    with pytest.raises(upge.ConfigError, match="group_size: 1 is too small"):
        expectation(algorithm(upge.LeaveOneOut()), setting, group_size=1)
    with pytest.raises(upge.ConfigError, match="values"):
        expectation(algorithm(upge.GAE()), setting)
    with pytest.raises(upge.ConfigError, match="smaller group_size"):
        expectation(algorithm(upge.LeaveOneOut()), setting, group_size=3, questions=5)
    with pytest.raises(upge.ConfigError, match="no group can be drawn"):
        expectation(algorithms.load("dpo"), Setting(RAGGED, lambda tokens: 1.0, reference=RAGGED))
    with pytest.raises(upge.ConfigError, match="more than 1000 responses"):
        SoftmaxPolicy.random(vocabulary=10, horizon=4)
    with pytest.raises(upge.ConfigError, match="3 prefixes"):
        SoftmaxPolicy(RAGGED.logits[:2], 2)
    with pytest.raises(upge.ConfigError, match="there are 7 responses"):
        Setting(RAGGED, torch.zeros(6))
    with pytest.raises(upge.ConfigError, match="behavior: its responses"):
        Setting(RAGGED, reward(RAGGED), behavior=FIXED)


def test_the_numeric_half_loads_no_sympy():
    program = "import sys, upge.theory, upge.theory.enumerate; print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
