"""Parts that users may write and the shipped ones do not: what they wrap is computed beforehand, and a head that asks
in chunks gets what one that asks about everything gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import algorithms
import upge
from tests.policy import sample
from upge.regularizers import Regularizer
from upge.testing import ConformanceError, check_algorithm, check_component
from upge.train.micro_batches import MicroBatch
from upge.train.packing import pack
from upge.trajectories import Source
from upge.views import TokenView


@dataclass(frozen=True)
class AdvantageKL(Regularizer):
    """A distance to the reference policy, weighted by a static part."""

    coefficient: float
    reduction: upge.Reduction
    advantage: upge.AdvantageEstimator = upge.GroupRelative()
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "reference_logprobs"})

    def __call__(self, batch: TokenView) -> Tensor:
        weight = 1 + self.advantage(batch).detach().square()
        return weight * (batch.reference_logprobs.detach() - batch.logprobs).square()


@dataclass(frozen=True)
class WhereUndecided(Regularizer):
    """Reads the entropies, and lets no gradient through them."""

    coefficient: float
    reduction: upge.Reduction
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "entropies"})

    def __call__(self, batch: TokenView) -> Tensor:
        return batch.entropies.detach() * batch.logprobs.square()


@dataclass(frozen=True)
class Gated(upge.AdvantageEstimator):
    """A live advantage with a static one and a gate inside."""

    per_token: bool = True
    advantage: upge.AdvantageEstimator = upge.GroupRelative()
    gate: upge.Gate = upge.PassRateAbove(threshold=0.0)
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: TokenView) -> Tensor:
        gate = self.gate(batch)
        spread = batch.per_token(gate) if self.per_token else gate[:, None]
        return self.advantage(batch) * spread * batch.logprobs.detach().exp()


@dataclass(frozen=True)
class Tabled(upge.StabilizationMask):
    """A tensor as a setting: it is the part's own, whatever rows of a batch are taken."""

    table: Tensor
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: TokenView, advantages: Tensor) -> Tensor:
        return self.table[(batch.logprobs.detach() < -1).long()]


def with_regularizer(part: Regularizer) -> upge.Algorithm:
    grpo = algorithms.load("grpo")
    return upge.Algorithm("mine", grpo.terms, {"mine": part})


def with_part(**parts) -> upge.Algorithm:
    term = algorithms.load("grpo").terms["rl"]
    estimator = upge.UnifiedGradient(**(term.estimator.parts | parts))
    return upge.Algorithm("mine", {"rl": upge.Term(term.source, term.gate, estimator, term.reduction)})


TOKENS = upge.TokenMean()
MINE = {
    "a static part in a regularizer": with_regularizer(AdvantageKL(0.1, TOKENS)),
    "entropies without a gradient": with_regularizer(WhereUndecided(0.1, TOKENS)),
    "a gate in an advantage": with_part(advantage=Gated()),
}


def asked(algorithm: upge.Algorithm, chunk: int) -> tuple[Tensor, Tensor]:
    """∂L/∂log π and ∂L/∂H of each token, as the trainer's piece tells the head, asked in chunks of so many."""
    batch = sample(0).batch
    lengths = batch.lengths.tolist()
    packed = pack([([1], list(range(1, n + 1))) for n in lengths])
    piece = MicroBatch(batch, list(range(len(batch))), packed)
    plan = algorithm.plan(batch)
    objective = piece.objective(algorithm, lambda view, places: [(1.0, plan.estimate_in_head(view, places))])
    assert not objective.whole
    logprobs, entropies = (packed.unpad(c.detach()[:, : packed.shape[1]]) for c in (batch.logprobs, batch.entropies))
    actual = []
    for start in range(0, len(logprobs), chunk):
        part = slice(start, start + chunk)
        one = objective.coefficients(logprobs[part], entropies[part], part)
        actual.append((one.logprobs, torch.zeros_like(one.logprobs) if one.entropies is None else one.entropies))
    return torch.cat([a for a, _ in actual]), torch.cat([b for _, b in actual])


@pytest.mark.parametrize("name", MINE)
def test_chunks_change_nothing(name):
    algorithm = MINE[name]
    assert algorithm.takes_chunks
    whole, apart = asked(algorithm, 10**6), asked(algorithm, 3)
    for a, b in zip(whole, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert bool(whole[0].any())
    check_algorithm(algorithm)


def test_the_suite_refuses_a_part_that_is_not_written_for_packed_tokens():
    with pytest.raises(ConformanceError, match=r"another value on packed tokens.*batch\.per_token"):
        check_component(Gated(per_token=False))


def test_a_tensor_among_the_settings_is_left_alone():
    mask = Tabled(torch.tensor([0.25, 1.0], dtype=torch.float64))
    algorithm, batch = with_part(mask=mask), sample(0).batch
    rows = torch.arange(10, 25)
    (plan,) = algorithm.plans(batch, [rows])
    assert torch.equal(plan.terms["rl"].estimator.mask.table, mask.table)
    piece = batch.select(rows, batch.logprobs[rows], row=torch.arange(len(rows)))
    actual = plan.estimate(piece).terms["rl"].mask
    assert set(actual[piece.response_mask].unique().tolist()) == {0.25, 1.0}


def test_a_loss_that_is_not_finite_reaches_the_gradient():
    batch = sample(0).batch
    packed = pack([([1], list(range(1, n + 1))) for n in batch.lengths.tolist()])
    grpo = algorithms.load("grpo")
    plan = grpo.plan(batch)
    objective = MicroBatch(batch, list(range(len(batch))), packed).objective(
        grpo, lambda view, places: [(float("inf"), plan.estimate_in_head(view, places))]
    )
    logprobs, entropies = (packed.unpad(c.detach()) for c in (batch.logprobs, batch.entropies))
    actual = objective.coefficients(logprobs, entropies, slice(0, len(logprobs)))
    assert bool(actual.loss.isnan()) and bool(actual.logprobs.isnan().any())


def test_what_has_a_coefficient_of_zero_costs_nothing():
    """No reference policy, no gradient of entropies, no wider reach: as if it were not there."""
    idle = {
        "kl": upge.KLPenalty(0.0, TOKENS),
        "entropy": upge.EntropyBonus(0.0, TOKENS),
    }
    grpo, gspo = algorithms.load("grpo"), algorithms.load("gspo")
    term = gspo.terms["rl"]
    off = upge.Term(term.source, term.gate, term.estimator, term.reduction, coefficient=0.0)
    algorithm = upge.Algorithm("mine", {**grpo.terms, "off": off}, idle)
    assert gspo.reach == "trajectory" and not gspo.takes_chunks
    assert algorithm.takes_chunks and algorithm.reach == "token" and not algorithm.has_entropy_gradient
    assert not algorithm.step_needs.reference
    batch = sample(0).batch
    ours, plain = algorithm.estimate(batch), grpo.estimate(batch)
    assert torch.equal(ours.weights, plain.weights) and torch.equal(ours.loss, plain.loss)
    assert set(ours.terms) == set(plain.terms) and not ours.penalties


def test_the_formula_of_a_penalty_has_its_sign_and_weights() -> None:
    printed = WhereUndecided(0.5, upge.TokenMean()).formula()
    assert printed.text == "− Σ_{τ~π_old} 0.5 · 1/Σ|τ| · Σ_t ∇WhereUndecided()"
    assert printed.latex.startswith(r"-\sum_{\tau\sim\pi_{old}} 0.5\,") and printed.latex.endswith(
        r"\nabla \mathrm{WhereUndecided}"
    )
