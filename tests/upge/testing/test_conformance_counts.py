"""The conformance suite on reductions, regularizers, on-policy data and whole algorithms: each rule broken once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import algorithms
import upge
from tests import compositions
from tests.upge.testing.test_conformance import advantage_of
from tests.upge.testing.test_conformance_algorithms import Meddling
from upge.testing import ConformanceError, check_algorithm, check_component

# Reductions.


def reduction_of(body, over="term", reads=()) -> upge.Reduction:
    """A reduction with the given body (batch, active) → weights; `over` None leaves the field out."""

    class Broken(upge.Reduction):
        def __call__(self, batch, active):
            return body(batch, active)

    Broken.reads = frozenset(reads)
    if over is not None:
        Broken.over = over
    return Broken()


def spread(batch, active) -> torch.Tensor:
    """A sound one: 1 on every token of the active."""
    return (batch.response_mask & active[:, None]).double()


def test_a_sound_reduction_conforms():
    assert check_component(reduction_of(spread, "batch")) is None


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (reduction_of(lambda b, s: b.response_mask.double()), "gives weight to trajectories outside `active`"),
        (reduction_of(lambda b, s: spread(b, s) / len(b)), "outside `active` change the weights of the others"),
        (reduction_of(lambda b, s: spread(b, s) / b.response_mask.sum()), "divide by counts over `active`"),
        (reduction_of(lambda b, s: spread(b, s) * b.logprobs.detach(), reads={"logprobs"}), r"reads \['logprobs'\]"),
        (reduction_of(spread, over=None), "over=None; give it the field `over`, 'term' or 'batch'"),
    ],
)
def test_a_reduction_that_breaks_a_rule_is_caught(broken, rule):
    with pytest.raises(ConformanceError, match=f"Broken.*{rule}"):
        check_component(broken)


def test_a_reduction_of_other_trajectories_is_refused_where_it_is_made():
    with pytest.raises(upge.ConfigError, match="Broken.over: 'trem' is not one of 'term', 'batch'"):
        reduction_of(spread, over="trem")


# Regularizers.


class Penalty(upge.Regularizer):
    """Sound but for what a test changes."""

    coefficient, reduction, source = 1.0, upge.TokenMean(), "rollouts"
    reads = frozenset({"entropies"})

    def __call__(self, batch):
        return batch.entropies


def test_a_regularizer_has_its_three_fields():
    assert check_component(Penalty()) is None

    class Bare(upge.Regularizer):
        reads, __call__ = Penalty.reads, Penalty.__call__

    class Elsewhere(Penalty):
        source = "rollout"

    with pytest.raises(ConformanceError, match=r"Bare lacks \['coefficient', 'reduction', 'source'\]"):
        check_component(Bare())
    with pytest.raises(upge.ConfigError, match="Elsewhere.source: 'rollout' is not one of 'rollouts'"):
        Elsewhere()


def test_the_reduction_of_a_regularizer_is_checked_too():
    class Loose(Penalty):
        reduction = reduction_of(lambda b, s: b.response_mask.double())

    with pytest.raises(ConformanceError, match="gives weight to trajectories outside"):
        check_component(Loose())


# Strictly on-policy data.


def test_a_part_must_do_without_the_behaviour_column():
    raw = advantage_of(lambda b: b.logprobs.detach() - b.behavior_logprobs)
    with pytest.raises(ConformanceError, match="Broken fails where behavior_logprobs is None.*log_importance_ratio"):
        check_component(raw)
    assert check_component(advantage_of(lambda b: b.log_importance_ratio)) is None
    # One that does not read the current policy is evaluated before the forward pass and may ask for the column.
    assert check_component(advantage_of(lambda b: b.log_behavior, reads={"behavior_logprobs"})) is None
    nowhere = advantage_of(lambda b: 1 / b.log_importance_ratio.abs().sum(-1, keepdim=True).expand(b.logprobs.shape),
                           reach="trajectory")  # fmt: skip
    with pytest.raises(ConformanceError, match="NaN or infinity"):
        check_component(nowhere)


# Algorithms.


def test_a_plan_that_tears_a_group_apart_is_caught():
    """Demonstrations dropped: the advantage of the rollouts, which reads them, comes out differently."""
    terms = compositions.load("gspo").terms
    estimator = dataclasses.replace(terms["rl"].estimator, advantage=Crowd())
    torn = Meddling("torn", {"rl": dataclasses.replace(terms["rl"], estimator=estimator)}, meddle=only_with_a_signal)
    with pytest.raises(ConformanceError, match="'torn' has other weights without the trajectories that it drops"):
        check_algorithm(torn)


class Crowd(upge.AdvantageEstimator):
    """The sum of the group's current log-probs, demonstrations included."""

    reads, reach = frozenset({"logprobs", "group"}), "group"
    counts_demonstrations = True

    def __call__(self, batch):
        same = (batch.group[:, None] == batch.group).double()
        return (same @ batch.logprobs.detach().double().sum(dim=1, keepdim=True)).expand(batch.response_mask.shape)


def only_with_a_signal(plan, batch):
    return dataclasses.replace(plan, contributing=plan.contributing & (plan.terms["rl"].weights != 0).any(dim=1))


def test_a_gradient_that_is_not_minus_the_weights_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Loud(upge.algorithm.Plan):
        def estimate(self, batch):
            actual = super().estimate(batch)
            return dataclasses.replace(actual, loss=2 * actual.loss)

    terms = algorithms.load("grpo").terms
    loud = Meddling("loud", terms, meddle=lambda p, b: Loud(**vars(p)))
    with pytest.raises(ConformanceError, match="'loud' the gradient is not minus the weights"):
        check_algorithm(loud)


def test_a_class_or_a_name_is_not_an_instance():
    with pytest.raises(TypeError, match="found the class PPOClip; pass an instance"):
        check_component(upge.PPOClip)
    with pytest.raises(TypeError, match=r"algorithms.load\(NAME\), found 'grpo'; pass an instance"):
        check_algorithm("grpo")


@pytest.mark.parametrize("other", [upge.UniformPrefix(), upge.Uncertainty(), upge.DecayedMean(), upge.Replay()])
def test_what_is_no_part_of_a_term_is_tested_otherwise(other):
    with pytest.raises(TypeError) as caught:
        check_component(other)
    said = str(caught.value)
    assert f"found {other!r}; parts of a slot, gates, reductions" in said and "by calling its methods" in said
    assert "instance" not in said
