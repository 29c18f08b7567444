"""Penalties on whole distributions: the gradient of the written divergence by autograd, counts, values, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import algorithms
import upge
from tests.upge.test_support import (
    batch_with_distributions,
    entropy,
    forward_kl,
    gradient,
    jsd,
    reverse_kl,
    term,
)
from upge.testing.batches import padded, random_batch
from upge.testing.supports import check_supports

KINDS = {
    "reverse KL to the teacher": (upge.LogRatio(), reverse_kl),
    "reverse KL to the reference": (upge.LogRatio("reference"), reverse_kl),
    "forward KL": (upge.TargetProbability(), forward_kl),
    "generalized JSD": (upge.JensenShannon(0.3), jsd),
    "entropy": (upge.Surprisal(), entropy),
}
RL = term(upge.GroupRelative(), upge.SampledToken(), upge.BehaviorPolicy(), gate=upge.PassRateAtMost(0.6))


def penalized(penalty: upge.Regularizer, terms=None) -> upge.Algorithm:
    return upge.Algorithm("test", terms or {"rl": RL}, {"penalty": penalty})


def counted(batch: upge.Trajectories) -> torch.Tensor:
    """[B, T] the tokens of rollouts that count in the term `RL`."""
    return batch.response_mask & RL.active(batch)[:, None]


def other_slope(penalty: upge.DivergencePenalty, batch, logits) -> torch.Tensor:
    """The gradient of the algorithm without that of its term alone."""
    both, alone = (one.estimate(batch).loss for one in (penalized(penalty), upge.Algorithm("test", {"rl": RL})))
    return gradient(both, logits) - gradient(alone, logits)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_and_the_value_are_those_of_the_divergence(kind, temperature):
    advantage, objective = KINDS[kind]
    batch, logits = batch_with_distributions()
    penalty = upge.DivergencePenalty(0.3, upge.TokenMean(), advantage, upge.FullVocabulary(temperature))
    given = batch.distributions
    target = getattr(given, getattr(advantage, "target", "teacher"))
    models = [(one / temperature).log_softmax(-1) for one in (logits, target)]
    own = counted(batch)
    expected = -0.3 * objective(*models, given.tokens)[own].sum() / own.sum()
    slope = gradient(expected, logits)
    assert 0 < own.sum() < batch.response_mask.sum() and slope.abs().max() > 1e-4
    torch.testing.assert_close(other_slope(penalty, batch, logits), slope, rtol=1e-10, atol=1e-13)
    estimate = penalized(penalty).estimate(batch)
    assert estimate.penalties["penalty"] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert estimate.metrics["penalty/value"] == estimate.penalties["penalty"]


@pytest.mark.parametrize("of", ["policy", "reference"])
def test_the_most_likely_tokens_give_the_truncated_sum(of):
    batch, logits = batch_with_distributions(1)
    penalty = upge.DivergencePenalty(0.3, upge.TokenMean(), upge.LogRatio("reference"), upge.TopK(3, of))
    policy, target, own = batch.distributions.policy, batch.distributions.reference, counted(batch)
    chosen = (policy if of == "policy" else target).detach().topk(3).indices
    p, q = policy.gather(-1, chosen), target.gather(-1, chosen)
    terms = p.exp() * (p - q)
    expected = 0.3 * (terms - p.exp())[own].sum() / own.sum()
    torch.testing.assert_close(other_slope(penalty, batch, logits), gradient(expected, logits), rtol=1e-10, atol=1e-13)
    value = penalized(penalty).estimate(batch).penalties["penalty"]
    assert value == pytest.approx(float((0.3 * terms[own].sum() / own.sum()).detach()), rel=1e-12)


def test_the_entropy_bonus_is_the_same_coefficient_evaluated_in_place():
    batch, logits = batch_with_distributions(2)
    own = {"coefficient": 0.3, "reduction": upge.SequenceMean(), "source": "all"}
    slopes, values = [], []
    for penalty in (upge.EntropyBonus(**own), upge.DivergencePenalty(advantage=upge.Surprisal(), **own)):
        slopes.append(other_slope(penalty, batch, logits))
        values.append(penalized(penalty).estimate(batch).penalties["penalty"])
    assert slopes[0].abs().max() > 1e-4
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10 * float(slopes[0].abs().max()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_penalty_changes_no_divisor_and_a_term_does():
    """A batch's divisor counts the trajectories of the terms: with a term on demonstrations, those too."""
    batch, _ = batch_with_distributions(3)
    rl = dataclasses.replace(RL, reduction=upge.TokenMean(over="batch"))
    anchor = term(upge.LogRatio("reference"), upge.FullVocabulary(), source="all", gate=upge.ConstantGate())
    penalty = upge.DivergencePenalty(0.7, upge.TokenMean(), upge.LogRatio("reference"), source="all")
    plain = upge.Algorithm("test", {"rl": rl}).estimate(batch)
    beside = penalized(penalty, {"rl": rl}).estimate(batch)
    assert torch.equal(beside.weights, plain.weights) and torch.equal(beside.terms["rl"].weights, plain.weights)
    with_term = upge.Algorithm("test", {"rl": rl, "anchor": anchor}).estimate(batch)
    assert (with_term.terms["rl"].weights - plain.weights).abs().max() > 1e-4


@pytest.mark.parametrize("source", ["rollouts", "demonstrations", "all"])
def test_it_counts_as_the_sampled_penalty_does(source):
    """The scale of each token is that of `KLPenalty` with the same reduction and source."""
    batch, _ = batch_with_distributions(4)
    sft = term(upge.ConstantAdvantage(), upge.SampledToken(), upge.CurrentPolicy(), "demonstrations")
    own = {"coefficient": 0.3, "reduction": upge.QuestionMean(over="batch"), "source": source}
    divergence = penalized(upge.DivergencePenalty(advantage=upge.LogRatio("reference"), **own), {"rl": RL, "sft": sft})
    sampled = penalized(upge.KLPenalty(**own), {"rl": RL, "sft": sft})
    one, other = divergence.plan(batch).divergences["penalty"], sampled.plan(batch).penalties["penalty"]
    torch.testing.assert_close(one.coefficient * one.weights, other.scale)
    assert other.scale.abs().max() > 0 and not sampled.supports
    assert divergence.supports == {"regularizers.penalty": upge.FullVocabulary()}
    assert torch.equal(divergence.plan(batch).contributing, sampled.plan(batch).contributing)


WITH_OTHERS = {
    "rl": RL,
    "distill": term(upge.JensenShannon(), upge.FullVocabulary(), source="all"),
}


def many() -> upge.Algorithm:
    """Terms and regularizers of both kinds; one name is that of a term and of a regularizer."""
    penalties = {
        "kl": upge.DivergencePenalty(0.3, upge.TokenMean(), upge.LogRatio("reference")),
        "distill": upge.DivergencePenalty(0.2, upge.TokenMean("batch"), upge.TargetProbability(), upge.TopK(4), "all"),
        "sampled": upge.KLPenalty(0.1, upge.SequenceMean()),
    }
    return upge.Algorithm("many", WITH_OTHERS, penalties)


def test_conformance():
    upge.testing.check_algorithm(many())
    # Parts that look at whole responses, and at whole groups.
    check_supports(algorithms.load("gspo", corrections=["kl_full"]))
    penalty = upge.DivergencePenalty(0.1, upge.TokenMean(), upge.Surprisal(), source="preference_pairs")
    check_supports(dataclasses.replace(algorithms.load("dpo"), regularizers={"entropy": penalty}))


def test_the_plans_of_each_name_add_up():
    batch, logits = batch_with_distributions(5)
    plan = many().plan(batch)
    assert plan.names == ["rl", "distill", "sampled", "kl"]
    alone = [gradient(plan.alone(name).estimate(batch).loss, logits) for name in plan.names]
    assert all(one.abs().max() > 1e-6 for one in alone)
    torch.testing.assert_close(sum(alone), gradient(plan.estimate(batch).loss, logits), rtol=1e-12, atol=1e-15)
    values = {name: plan.alone(name).estimate(batch).penalties for name in ("kl", "sampled")}
    assert {**values["kl"], **values["sampled"]}.items() <= plan.estimate(batch).penalties.items()


def test_padding_splits_and_order():
    batch, logits = batch_with_distributions(6)
    algorithm = many()
    whole, value = gradient(algorithm.estimate(batch).loss, logits), algorithm.estimate(batch).penalties
    wide = padded(dataclasses.replace(batch, distributions=None))
    more = wide.response_mask.shape[1] - batch.response_mask.shape[1]
    live = {n: torch.nn.functional.pad(getattr(batch, n), (0, more)) for n in ("logprobs", "entropies")}
    tokens, *models = batch.distributions
    stretched = [torch.nn.functional.pad(one, (0, 0, 0, more)) for one in models]
    given = upge.Distributions(torch.nn.functional.pad(tokens, (0, more)), *stretched)
    wide = dataclasses.replace(wide, **live, distributions=given)
    torch.testing.assert_close(gradient(algorithm.estimate(wide).loss, logits), whole, rtol=1e-12, atol=1e-15)
    plan, total, values = algorithm.plan(batch), torch.zeros_like(whole), dict.fromkeys(value, 0.0)
    for rows in torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)).split(3):
        width = batch.select(rows).response_mask.shape[1]
        columns = {
            "entropies": batch.entropies[rows, :width],
            "distributions": batch.distributions.at(rows, slice(width)),
        }
        estimate = plan.estimate(batch.select(rows, batch.logprobs[rows, :width], **columns))
        total += gradient(estimate.loss, logits)
        values = {name: values[name] + one for name, one in estimate.penalties.items()}
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-14)
    assert values == pytest.approx(value, rel=1e-12)


def test_a_plan_on_another_device_holds_nothing_of_the_old_one():
    batch, _ = batch_with_distributions(7)
    plan = many().plan(batch).to("meta")
    tensors = [one.weights for one in plan.divergences.values()]
    assert len(tensors) == 2 and {one.device.type for one in tensors} == {"meta"}
    assert bool(many().plan(batch).reading("reference_logprobs").any()), "the sampled penalty reads them"


def test_what_it_needs():
    needs = penalized(upge.DivergencePenalty(0.1, upge.TokenMean(), upge.LogRatio("reference"))).needs
    assert needs.reference and needs.distributions == {"reference"} and "reference_logprobs" not in needs.columns
    chosen = penalized(upge.DivergencePenalty(0.1, upge.TokenMean(), upge.Surprisal(), upge.TopK(3, "teacher")))
    assert chosen.needs.distributions == {"teacher"} and not chosen.has_entropy_gradient and chosen.takes_chunks
    idle = penalized(upge.DivergencePenalty(0.0, upge.TokenMean(), upge.LogRatio("reference")))
    assert not idle.supports and not idle.needs.reference and not idle.plan(random_batch(0)).divergences


def test_its_formula():
    penalty = upge.DivergencePenalty(0.25, upge.TokenMean(), upge.TargetProbability("reference"), upge.TopK(8))
    text, latex = penalized(penalty).formula().splitlines()[1], penalty.formula().latex
    assert text.strip() == "+ Σ_{τ~π_old} 0.25 · 1/Σ|τ| · Σ_t Σ_{v ∈ top 8 of π_θ} 1/π_θ · π_0 · ∇π_θ   [penalty]"
    assert latex.startswith(r"+\sum_{\tau\sim\pi_{old}} 0.25") and r"\mathrm{top}_{8}(\pi_\theta)" in latex
    away = upge.DivergencePenalty(-0.25, upge.TokenMean(), upge.Surprisal()).formula().text
    assert away == "− Σ_{τ~π_old} 0.25 · 1/Σ|τ| · Σ_t Σ_v −log π_θ · ∇π_θ"


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": upge.SampledToken()}, "support: SampledToken has no distribution; give upge.FullVocabulary"),
        ({"advantage": upge.GroupRelative()}, "advantage: .*expected Divergence"),
        ({"advantage": upge.TiltedReference()}, "advantage: .*expected Divergence"),
    ],
)
def test_settings_without_a_meaning(change, message):
    with pytest.raises(upge.ConfigError, match=message):
        upge.DivergencePenalty(
            **{"coefficient": 0.1, "reduction": upge.TokenMean(), "advantage": upge.LogRatio()} | change
        )


def test_what_a_batch_must_hold():
    batch, _ = batch_with_distributions()
    algorithm = penalized(upge.DivergencePenalty(0.1, upge.TokenMean(), upge.LogRatio("reference")))
    with pytest.raises(ValueError, match="distributions: the support of the regularizer 'penalty' is FullVocabulary"):
        algorithm.estimate(dataclasses.replace(batch, distributions=None))
    without = batch.distributions._replace(reference=None)
    with pytest.raises(ValueError, match="the regularizer 'penalty' compares with the reference, whose distributions"):
        algorithm.estimate(dataclasses.replace(batch, distributions=without))
    with pytest.raises(
        upge.ConfigError, match=r"regularizers.penalty.*DivergencePenalty reads \['reference_logprobs'\]"
    ):
        algorithm.check(group_size=8)
    algorithm.check(group_size=8, provided={"reference_logprobs"})


def test_a_name_that_no_term_has():
    batch, _ = batch_with_distributions()
    with pytest.raises(ValueError, match="alone: found 'unknown'; known: distill, kl, rl, sampled"):
        many().plan(batch).alone("unknown")


# A user's own divergence.


@dataclasses.dataclass(frozen=True)
class ChiSquared(upge.Divergence):
    """Â = -2·π_θ/ν: the gradient of -Σ_v π_θ²/ν."""

    reads = frozenset({"logprobs", "reference_logprobs"})

    def __call__(self, batch):
        return -2 * (batch.logprobs.detach() - batch.reference_logprobs.detach()).exp()

    def divergence(self, batch, advantages, mean):
        return -mean / 2


@dataclasses.dataclass(frozen=True)
class Halved(ChiSquared):
    """Its value is not the one that its advantage is the derivative of."""

    def divergence(self, batch, advantages, mean):
        return -mean


def test_a_divergence_of_ones_own():
    upge.testing.check_component(ChiSquared())
    with pytest.raises(upge.testing.ConformanceError, match="Halved has another gradient than its divergence"):
        upge.testing.check_component(Halved())
    batch, logits = batch_with_distributions(8)
    given, own = batch.distributions, counted(batch)
    expected = 0.3 * (2 * given.policy - given.reference).exp().sum(-1)[own].sum() / own.sum()
    slope = other_slope(upge.DivergencePenalty(0.3, upge.TokenMean(), ChiSquared()), batch, logits)
    torch.testing.assert_close(slope, gradient(expected, logits), rtol=1e-10, atol=1e-12)
