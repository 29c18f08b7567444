"""The conformance suite at the edges: precision, extremes, nothing to compare, memory; each rule broken once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import upge
from tests.upge.testing.test_conformance import advantage_of, gate_of, mask_of
from tests.upge.testing.test_conformance_counts import Penalty
from upge.stateful import UTILITY_SLOPE
from upge.testing import ConformanceError, check_component, random_batch
from upge.testing.batches import degenerate_batches, extreme_batch, punched

GROUP = {"rewards", "group", "is_demonstration"}


def caught(part: upge.Component) -> str:
    with pytest.raises(ConformanceError) as actual:
        check_component(part)
    assert "\n" not in str(actual.value)
    return str(actual.value)


def likelihood_of(body) -> upge.LikelihoodGradient:
    class Broken(upge.LikelihoodGradient):
        reads = frozenset({"logprobs"})

        def __call__(self, batch):
            return body(batch)

    return Broken()


# The batches are as hard as they say.


def test_the_extreme_batch_is_extreme():
    batch = extreme_batch()
    mask, ratio = batch.response_mask, batch.log_importance_ratio
    assert set(batch.logprobs[mask].tolist()) == {-40.0, -1e-12, 0.0, -0.7}
    assert float(ratio[mask].max()) == 30 and float(ratio[mask].min()) == -30
    assert float(batch.log_sampler_ratio[mask].abs().max()) == pytest.approx(20)
    assert {0.0, 12.0} == set(batch.entropies[mask].tolist())
    groups = [batch.rewards[(batch.group_index == q) & ~batch.is_demonstration] for q in range(6)]
    assert {-1.0, 0.0, 1.0} == set(batch.rewards.tolist()) and any(len(set(g.tolist())) == 1 for g in groups)


def test_holes_leave_the_tokens_as_they_are():
    batch = random_batch()
    holed = punched(batch)
    assert torch.equal(holed.lengths, batch.lengths)
    for name in ("logprobs", "behavior_logprobs", "values"):
        assert torch.equal(getattr(holed, name)[holed.response_mask], getattr(batch, name)[batch.response_mask])
    counted = holed.response_mask.int()
    starts_late = (counted[:, 0] == 0) & (holed.lengths > 0)
    torn = (counted[:, 1:] > counted[:, :-1]).sum(dim=1) + counted[:, 0] > 1
    assert int(starts_late.sum()) > 2 and int(torn.sum()) > 2


def test_the_degenerate_batches_are_what_they_say():
    actual = {d.description: d.batch for d in degenerate_batches()}
    assert len(actual) == 9
    assert len(actual["groups of one rollout"].group.unique()) == len(actual["groups of one rollout"]) > 4
    assert bool(actual["demonstrations alone"].is_demonstration.all())
    assert set(actual["rollouts that all succeed"].pass_rate.tolist()) == {1.0}
    assert set(actual["rollouts that all fail"].pass_rate.tolist()) == {0.0}
    assert int(actual["empty responses"].lengths.sum()) == 0 and len(actual["empty responses"]) > 4
    assert [len(actual[d]) for d in ("a single rollout", "a single demonstration", "no trajectories")] == [1, 1, 0]


# Precision.


def only_in(dtype, body) -> upge.AdvantageEstimator:
    """An advantage that is log r but for columns of `dtype`, where it is body(log r)."""

    def either(batch):
        log_ratio = batch.log_importance_ratio
        return body(log_ratio) if log_ratio.dtype == dtype else log_ratio

    return advantage_of(either)


PRECISION = {
    "returns torch.float32 of float64 columns": advantage_of(lambda b: b.log_importance_ratio.float()),
    "returns torch.bool; a part returns floating-point": mask_of(lambda b, a: b.log_importance_ratio < 1),
    "returns torch.int64; a part returns floating-point": gate_of(lambda b: b.group, {"group"}),
    "returns torch.float16 of float64 columns": gate_of(lambda b: b.rewards.half(), {"rewards"}),
    "returns torch.float16 of float32 columns": only_in(torch.float32, lambda x: x.half()),
    "loses precision on float32 columns": only_in(torch.float32, lambda x: x.bfloat16().float()),
    "fails on float32 columns, which a model gives": only_in(torch.float32, lambda x: x @ x.double().T @ x),
    "overflows on float32 columns": advantage_of(lambda b: (3 * b.log_importance_ratio).exp()),
    "overflows on bfloat16 columns": only_in(torch.bfloat16, lambda x: x.half().exp().bfloat16()),
}


@pytest.mark.parametrize("rule", PRECISION)
def test_a_part_that_is_not_precise_is_caught(rule):
    message = caught(PRECISION[rule])
    assert rule in message and message.startswith("Broken")


# Extremes.

EXTREME = {
    "an inverse entropy": advantage_of(lambda b: 1 / b.entropies.detach(), {"entropies"}),
    "a logarithm of 1 - π": advantage_of(lambda b: torch.log(-torch.expm1(b.logprobs.detach())), {"logprobs"}),
    "an overflow of the ratio's power": mask_of(lambda b, a: 1 - (99 * b.log_importance_ratio.abs()).exp() * 0),
}


@pytest.mark.parametrize("name", EXTREME)
def test_a_part_that_is_not_finite_at_extremes_is_caught(name):
    assert "Broken returns NaN or infinity at extremes (log-probs of -40, -1e-12 and 0" in caught(EXTREME[name])


def test_a_mask_stays_a_mask_at_extremes():
    rounded = mask_of(lambda b, a: 1 + (b.log_importance_ratio.abs() > 20).to(b.logprobs.dtype))
    assert "Broken returns values outside [0, 1]" in caught(rounded)


def test_a_likelihood_may_be_flat():
    """f′ = 0 at a probability of 1 is log f′ = -inf; NaN is wrong all the same."""
    assert check_component(likelihood_of(lambda b: torch.log(-torch.expm1(b.logprobs.detach())))) is None
    wrong = likelihood_of(lambda b: torch.log(-torch.expm1(b.logprobs.detach())) * (b.logprobs.detach() < -1))
    assert "NaN or infinity at extremes" in caught(wrong)


def test_the_gradient_of_a_regularizer_is_finite_and_of_the_policy_alone():
    class Root(Penalty):
        def __call__(self, batch):
            return batch.entropies.sqrt()

    class Leaking(Penalty):
        reads = frozenset({"logprobs", "reference_logprobs"})

        def __call__(self, batch):
            return batch.reference_logprobs - batch.logprobs

    assert "Root has a gradient of NaN or infinity at extremes" in caught(Root())
    assert "Leaking lets a gradient through to reference_logprobs; read it with" in caught(Leaking())


def test_a_reward_is_earned_by_tokens_that_count():
    class Everywhere(upge.TokenReward):
        reads = frozenset({"rewards"})

        def __call__(self, batch):
            return batch.rewards.double()[:, None].expand(batch.response_mask.shape)

    assert "Everywhere gives a reward outside the response mask" in caught(Everywhere())


# Nothing to compare.


def group_values(batch, reduce) -> torch.Tensor:
    """[B, T] `reduce` of the rewards of each trajectory's group."""
    actual = [reduce(batch.rewards[batch.group == g]) for g in batch.group.tolist()]
    actual = torch.stack(actual) if actual else batch.rewards
    return actual[:, None].expand(batch.response_mask.shape)


DEGENERATE = {
    "NaN or infinity on groups of one rollout": advantage_of(
        lambda b: group_values(b, lambda r: r.sum() / (len(r) - 1)), GROUP
    ),
    "NaN or infinity on demonstrations alone": gate_of(lambda b: b.pass_rate, GROUP),
    "NaN or infinity on rollouts that all fail": gate_of(
        lambda b: b.rewards / ((b.rewards * ~b.is_demonstration).sum() + b.is_demonstration.all()), GROUP
    ),
    "NaN or infinity on empty responses": gate_of(lambda b: b.lengths / b.lengths.sum(), set()),
    "fails on no trajectories (IndexError": gate_of(lambda b: b.rewards - b.rewards[0] * 0, {"rewards"}),
    "fails on groups of one rollout (ValueError": gate_of(lambda b: refusing(b), GROUP),
    "returns shape [20, 7], expected [20, 10]": advantage_of(
        lambda b: b.rewards[:, None] * torch.ones(7, dtype=torch.float64), {"rewards"}
    ),
}


def refusing(batch) -> torch.Tensor:
    """Only what a part may refuse may be refused: a group without rollouts has no pass rate, one with a single one
    has."""
    if len(batch.group.unique()) == len(batch.group):
        raise ValueError("groups of one")
    return batch.rewards.double()


@pytest.mark.parametrize("rule", DEGENERATE)
def test_a_part_that_needs_a_contrast_is_caught(rule):
    assert rule in caught(DEGENERATE[rule])


# Stateful gates.


@dataclass(frozen=True)
class Tracking(upge.StatefulGate):
    """Sound: half of what it was, half of the signal, within [0, 1]."""

    variable: str = "share"
    wants = frozenset({"entropy"})

    def initial(self):
        return 0.5

    def updated(self, value, signals):
        return min(1.0, max(0.0, value / 2 + signals["entropy"] / 2))


class Outside(Tracking):
    def initial(self):
        return 2.0


class Counting(Tracking):
    calls: list = []

    def updated(self, value, signals):
        self.calls.append(1)
        return min(1.0, len(self.calls) * 1e-3)


class Eating(Tracking):
    def updated(self, value, signals):
        return min(1.0, max(0.0, value - signals.pop("entropy")))


class Dividing(Tracking):
    def updated(self, value, signals):
        return value / abs(signals["entropy"]) if signals["entropy"] else float("inf")


class Deaf(Tracking):
    def __call__(self, batch):
        return torch.ones(len(batch), dtype=torch.float64)


class Curved(Tracking):
    wants = frozenset({UTILITY_SLOPE, "entropy"})

    def __call__(self, batch):
        return super().__call__(batch) ** 2


class Vague(Tracking):
    def due(self, step):
        return step % 2


MEMORY = {
    Outside: "Outside.initial() is 2, where updated() never leads: it returns 0 to 1",
    Counting: "Counting.updated gives another value when called again",
    Eating: "Eating.updated changes the signals in place",
    Dividing: "Dividing.updated(0.5, {'entropy': 0.0}) is inf; it must be a finite number",
    Deaf: "Deaf ignores batch.state['share']",
    Curved: "is not affine in 'share', so its slope is not a constant",
    Vague: "Vague.due(0) is 0; it must be True or False",
}


def test_a_sound_gate_with_memory_conforms():
    assert check_component(Tracking()) is None


@pytest.mark.parametrize("gate", MEMORY)
def test_a_gate_with_memory_that_breaks_a_rule_is_caught(gate):
    assert MEMORY[gate] in caught(gate())
    assert MEMORY[gate] in caught(upge.ProductOf((upge.ConstantGate(), upge.Complement(gate()))))


# The critic's loss.


class Padded(upge.ValueLoss):
    def targets(self, batch):
        return super().targets(batch) * batch.response_mask.shape[1]


class Placed(upge.ValueLoss):
    def targets(self, batch):
        return super().targets(batch) * batch.response_mask[:, :1]


class Imitating(upge.ValueLoss):
    def weights(self, batch, counted):
        return self.reduction(self.reduction.view(batch), counted)


class Rooted(upge.ValueLoss):
    def __call__(self, values, old, targets):
        return (values - values.detach()).square().log()


class Averaged(upge.ValueLoss):
    def __call__(self, values, old, targets):
        return (values - targets).square().mean(dim=1)


VALUE_LOSS = {
    Padded: "Padded has targets that depend on the padding",
    Placed: "Placed has targets that depend on places outside the response mask",
    Imitating: "Imitating gives weight to demonstrations",
    Rooted: "Rooted returns NaN or infinity on a well-formed batch",
    Averaged: "Averaged returns shape [20], expected [20, 7]",
}


@pytest.mark.parametrize("loss", VALUE_LOSS)
def test_a_value_loss_that_breaks_a_rule_is_caught(loss):
    assert check_component(upge.ValueLoss(upge.GAE())) is None
    assert VALUE_LOSS[loss] in caught(loss(upge.GAE()))
