"""The conformance suite on whole algorithms, each made to break one rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import algorithms
import upge
from upge.plan import Plan
from upge.testing import ConformanceError, check_algorithm, check_component


@dataclass(frozen=True)
class Meddling(upge.Algorithm):
    """An algorithm whose plan is changed by `meddle(plan, batch)` before it is used."""

    meddle: object = None

    def plan(self, batch):
        return self.meddle(super().plan(batch), batch)


def meddling(meddle) -> Meddling:
    terms = {"rl": dataclasses.replace(algorithms.load("grpo").terms["rl"])}
    return Meddling("meddling", terms, meddle=meddle)


def scaled(plan: Plan, factor: torch.Tensor | float) -> Plan:
    """The plan with the weights of its term multiplied."""
    term = plan.terms["rl"]
    return dataclasses.replace(plan, terms={"rl": dataclasses.replace(term, weights=term.weights * factor)})


def test_meddling_with_nothing_conforms():
    assert check_algorithm(meddling(lambda plan, batch: plan)) is None


@pytest.mark.parametrize(
    ("rule", "meddle"),
    [
        ("the gradient depends on the padding", lambda p, b: scaled(p, 1 / b.response_mask.shape[1])),
        (
            "the gradient depends on the order of the trajectories",
            lambda p, b: scaled(p, torch.arange(len(b))[:, None].double()),
        ),
        (
            "the plan drops trajectories that have a gradient",
            lambda p, b: dataclasses.replace(p, contributing=torch.zeros_like(p.contributing)),
        ),
        (
            "the gradient depends on places outside the response mask",
            lambda p, b: scaled(p, 1 / torch.arange(1, b.response_mask.shape[1] + 1)),
        ),
        ("fails on no trajectories", lambda p, b: scaled(p, (b.rewards[0] < 2).double())),
        (
            "the loss or its gradient is NaN or infinite on empty responses",
            lambda p, b: scaled(p, b.lengths.sum() / b.lengths.sum()),
        ),
    ],
)
def test_rule_catches_the_algorithm_that_breaks_it(rule, meddle):
    with pytest.raises(ConformanceError, match=f"algorithm 'meddling'.*{rule}"):
        check_algorithm(meddling(meddle))


def test_weights_that_are_not_the_product_are_caught():
    class Doubling(upge.Algorithm):
        def estimate(self, batch):
            estimate = super().estimate(batch)
            return dataclasses.replace(estimate, weights=2 * estimate.weights)

    with pytest.raises(ConformanceError, match="factors do not multiply to weights"):
        check_algorithm(Doubling("doubling", algorithms.load("grpo").terms))


def test_a_gradient_that_depends_on_the_split_is_caught():
    """A regularizer that takes its own mean over whatever batch it gets."""

    @dataclass(frozen=True)
    class OwnMean(upge.Regularizer):
        coefficient: float = 1.0
        reduction: upge.Reduction = upge.TokenMean()
        source: str = "rollouts"
        reads = frozenset({"entropies"})

        def __call__(self, batch):
            return batch.entropies / batch.entropies.detach().sum()

    broken = upge.Algorithm("broken", algorithms.load("grpo").terms, {"own": OwnMean()})
    with pytest.raises(ConformanceError, match="OwnMean declares reach 'token' but depends on more"):
        check_algorithm(broken)


def test_an_estimate_that_depends_on_the_split_is_caught():
    """Each piece averages over itself; nothing wrong with a part, and the whole batch is as it should be."""

    class OverItself(Plan):
        def estimate(self, batch):
            rest = Plan(**vars(self))
            return Plan.estimate(scaled(rest, len(self.contributing) / len(batch)), batch)

    broken = meddling(lambda plan, batch: OverItself(**vars(plan)))
    with pytest.raises(ConformanceError, match="algorithm 'meddling' the gradient depends on the micro-batch split"):
        check_algorithm(broken)


def test_a_broken_part_is_found_inside_an_algorithm():
    class Loud(upge.StabilizationMask):
        reads = frozenset()

        def __call__(self, batch, advantages):
            return torch.full_like(advantages, 2.0)

    terms = algorithms.load("grpo").terms
    estimator = dataclasses.replace(terms["rl"].estimator, mask=Loud())
    with pytest.raises(ConformanceError, match="Loud returns values outside"):
        check_algorithm(upge.Algorithm("x", {"rl": dataclasses.replace(terms["rl"], estimator=estimator)}))


# Gradients and precision. Each changes what a planned batch says about a piece.


def telling(change) -> Meddling:
    """An algorithm whose estimates are changed by change(estimate, batch)."""

    class Changed(Plan):
        def estimate(self, batch):
            return change(super().estimate(batch), batch)

    return meddling(lambda plan, batch: Changed(**vars(plan)))


def leaking(column: str):
    """A loss to which a column adds without a say in the weights."""
    return lambda e, b: dataclasses.replace(e, loss=e.loss + getattr(b, column).sum() * 1e-3)


def rounded(estimate, batch):
    """Weights of float32 columns in the precision of bfloat16."""
    weights = estimate.weights
    return dataclasses.replace(estimate, weights=weights.bfloat16().to(weights.dtype)) if narrow(batch) else estimate


def narrow(batch) -> bool:
    return batch.logprobs.dtype != torch.float64


def infinite(estimate, batch):
    """A loss that only half precision makes infinite."""
    return dataclasses.replace(estimate, loss=estimate.loss * (float("inf") if halved(batch) else 1.0))


def halved(batch) -> bool:
    return batch.logprobs.dtype == torch.bfloat16


CHANGES = {
    **{f"a gradient flows into {c}, which only log-probs may have": leaking(c) for c in ("values", "entropies")},
    "a gradient flows into behavior_logprobs": leaking("behavior_logprobs"),
    "a gradient flows into rewards": leaking("rewards"),
    "loses precision on float32 columns": rounded,
    "weights of float64 columns are torch.float32": lambda e, b: dataclasses.replace(e, weights=e.weights.float()),
    "weights of bfloat16 columns are torch.bfloat16": lambda e, b: (
        dataclasses.replace(e, weights=e.weights.bfloat16()) if halved(b) else e
    ),
    r"weights or loss are NaN or infinite at extremes \(.*bfloat16\)": infinite,
}


@pytest.mark.parametrize("rule", CHANGES)
def test_an_estimate_that_says_something_else_is_caught(rule):
    with pytest.raises(ConformanceError, match=f"algorithm 'meddling'.*{rule}"):
        check_algorithm(telling(CHANGES[rule]))


def test_an_unbounded_ratio_of_whole_responses_is_caught():
    """Nothing wrong with a part: their product leaves float32."""
    corrected = upge.SamplerCorrected(upge.BehaviorPolicy(), cap=None, level="sequence")
    term = algorithms.load("reinforce").terms["rl"]
    term = dataclasses.replace(term, estimator=dataclasses.replace(term.estimator, denominator=corrected))
    assert check_component(corrected) is None
    with pytest.raises(ConformanceError, match="weights or loss are NaN or infinite at extremes .*float32"):
        check_algorithm(upge.Algorithm("unbounded", {"rl": term}))


@dataclass(frozen=True)
class Naive(upge.UnifiedGradient):
    """The product as it is written."""

    def weight(self, batch, factors=None):
        mask, log_denominator, advantages, shape = factors or self.factors(batch)
        return mask * advantages * torch.exp(batch.logprobs.detach() - log_denominator) * shape

    def precompute_parts(self, batch, live):
        return Naive(**{slot: part.precomputed(batch, live) for slot, part in self.parts.items()})


def test_a_mask_wins_over_a_ratio_that_overflows():
    term = algorithms.load("grpo").terms["rl"]
    naive = dataclasses.replace(term, estimator=Naive(**term.estimator.parts))
    with pytest.raises(ConformanceError, match="'naive': term 'rl' has a weight .* where the ratio overflows"):
        check_algorithm(upge.Algorithm("naive", {"rl": naive}))


def test_a_gate_may_return_a_column_as_it_is():
    """Gates are detached like the factors."""

    class Rewarded(upge.Gate):
        reads = frozenset({"rewards"})

        def __call__(self, batch):
            return batch.rewards

    term = algorithms.load("reinforce").terms["rl"]
    assert check_algorithm(upge.Algorithm("rewarded", {"rl": dataclasses.replace(term, gate=Rewarded())})) is None
