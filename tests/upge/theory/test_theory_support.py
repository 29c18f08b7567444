"""Expected gradients on the whole vocabulary and on sampled tokens, by enumeration of every batch."""

from __future__ import annotations

import pytest
import torch

import upge
from upge.theory.draws import Setting
from upge.theory.enumerate import expectation
from upge.theory.policy import SoftmaxPolicy

SIZES = {"vocabulary": 3, "horizon": 2}
SETTING = Setting(
    SoftmaxPolicy.random(**SIZES, seed=0),
    lambda tokens: float(tokens[0] == 1),
    reference=SoftmaxPolicy.random(**SIZES, seed=1),
    teacher=SoftmaxPolicy.random(**SIZES, seed=2),
)


def algorithm(advantage, support, denominator) -> upge.Algorithm:
    estimator = upge.UnifiedGradient(upge.NoMask(), denominator, advantage)
    reduction = upge.FixedLength(1)
    term = upge.Term("rollouts", upge.ConstantGate(), estimator, reduction, 1.0, support)
    return upge.Algorithm("distill", {"a": term})


def expected(advantage, support, denominator):
    return expectation(algorithm(advantage, support, denominator), SETTING, group_size=2)


def state_divergence(divergence) -> torch.Tensor:
    """Minus the gradient of Σ_states P(state)·divergence, with the probabilities of the states held fixed."""
    policy, teacher = SETTING.policy, SETTING.teacher
    table = policy.logits.clone().requires_grad_()
    space = policy.responses
    reach = torch.zeros(space.prefixes, dtype=torch.float64)
    for number, probability in enumerate(policy.probabilities.detach()):
        for t in range(int(space.mask[number].sum())):
            reach[space.prefix[number, t]] += probability
    log_p, log_q = table.log_softmax(-1), teacher.logits.log_softmax(-1)
    return -torch.autograd.grad((reach * divergence(log_p, log_q)).sum(), table)[0]


def reverse(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward(log_p, log_q):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize(
    ("advantage", "denominator", "divergence"),
    [
        (upge.LogRatio(), upge.UnitDenominator(), reverse),
        (upge.TargetProbability(), upge.CurrentPolicy(), forward),
    ],
)
def test_the_whole_vocabulary_gives_the_divergence_at_each_state(advantage, denominator, divergence):
    result = expected(advantage, upge.FullVocabulary(), denominator)
    torch.testing.assert_close(result.mean, state_divergence(divergence), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("advantage", "divergence"),
    [
        (upge.LogRatio(), reverse),
        (upge.TargetProbability(), forward),
        (upge.Surprisal(), lambda log_p, log_q: (log_p.exp() * log_p).sum(-1)),
    ],
)
def test_a_penalty_adds_the_divergence_at_each_state(advantage, divergence):
    """Beside a policy gradient, whose expectation stays as it is."""
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.BehaviorPolicy(), upge.LeaveOneOut())
    rl = {"rl": upge.Term("rollouts", upge.ConstantGate(), estimator, upge.FixedLength(1))}
    penalty = {"kl": upge.DivergencePenalty(0.3, upge.FixedLength(1), advantage)}
    plain = expectation(upge.Algorithm("rl", rl), SETTING, group_size=2)
    both = expectation(upge.Algorithm("both", rl, penalty), SETTING, group_size=2)
    expected = 0.3 * state_divergence(divergence)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(both.mean - plain.mean, expected, rtol=1e-10, atol=1e-13)


def test_the_sampled_token_has_the_same_expectation_and_more_variance():
    whole = expected(upge.LogRatio(), upge.FullVocabulary(), upge.UnitDenominator())
    top = expected(upge.LogRatio(), upge.TopK(2), upge.UnitDenominator())
    sampled = expected(upge.LogRatio(), upge.SampledToken(), upge.CurrentPolicy())
    torch.testing.assert_close(sampled.mean, whole.mean, rtol=1e-10, atol=1e-13)
    assert (top.mean - whole.mean).norm() > 1e-3, "the tokens outside the top k are missing"
    assert sampled.variance > 3 * whole.variance > 0
