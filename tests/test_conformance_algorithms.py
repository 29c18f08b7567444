"""The conformance suite on whole algorithms, each made to break one rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import algorithms
import upge
from upge.algorithm import Plan
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
            lambda p, b: dataclasses.replace(p, keep=torch.zeros_like(p.keep)),
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

    check_component(OwnMean())
    broken = upge.Algorithm("broken", algorithms.load("grpo").terms, {"own": OwnMean()})
    with pytest.raises(ConformanceError, match="algorithm 'broken' the gradient depends on the micro-batch split"):
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
