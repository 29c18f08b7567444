"""Gates that carry a number from step to step, and those made of other gates or of two thresholds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories
from upge import ConfigError
from upge.stateful import stateful_gates


def groups(*successes: tuple[int, int], **state: float) -> upge.Trajectories:
    """A group for each (successes, rollouts), one token per response."""
    rewards = [float(i < k) for k, n in successes for i in range(n)]
    group = [g for g, (_, n) in enumerate(successes) for _ in range(n)]
    batch = trajectories(lengths=[1] * len(group), rewards=rewards, group=group)
    return dataclasses.replace(batch, state=state)


def per_group(gate: upge.Gate, batch: upge.Trajectories) -> list[float]:
    actual = gate(batch)
    return [float(actual[batch.group == g][0]) for g in batch.group.unique()]


# Complement.


def test_complement_is_what_is_left_to_one():
    batch = groups((0, 4), (1, 4), (4, 4))
    table = upge.PassRateTable((0.0, 1.0), (0.1, 0.9))
    assert per_group(upge.Complement(table), batch) == pytest.approx([0.9, 0.7, 0.1])
    assert per_group(upge.Complement(upge.PassRateAbove(0.0)), batch) == per_group(upge.PassRateAtMost(0.0), batch)
    assert per_group(upge.Complement(upge.Complement(table)), batch) == pytest.approx(per_group(table, batch))


def test_complement_closes_where_the_other_gate_is_fully_open():
    batch = groups((0, 2), (1, 2))
    assert upge.Complement(upge.PassRateAbove(0.0)).closed(batch).tolist() == [False, False, True, True]
    assert upge.Complement(upge.ConstantGate(0.0)).closed(batch).tolist() == [False] * 4
    live = upge.Complement(upge.EntropyWeight())
    assert live.live_reach == "trajectory" and not live.closed(batch).any()


def test_complement_needs_what_the_other_gate_needs():
    assert upge.Complement(upge.PassRateAbove()).group_size_needed == 2
    assert upge.Complement(upge.EntropyWeight()).columns == {"entropies"}
    assert upge.Complement(upge.PassRateAbove(0.25)).formula().text == "(1 − 1[P > 0.25])"
    with pytest.raises(ConfigError, match="Complement.gate"):
        upge.Complement(upge.NoMask())


# PassRateBetween.


@pytest.mark.parametrize(
    ("low", "high", "rollouts", "opened"),
    [
        (0.0, 1.0, 4, [0, 1, 1, 1, 0]),
        (0.25, 0.75, 4, [0, 0, 1, 0, 0]),
        (0.0, 0.5, 2, [0, 0, 0]),
        (1 / 3, 1.0, 3, [0, 0, 1, 0]),
        (0.333333333333, 0.666666666667, 6, [0, 0, 0, 1, 0, 0, 0]),
    ],
)
def test_pass_rate_between_excludes_both_ends(low, high, rollouts, opened):
    batch = groups(*((k, rollouts) for k in range(rollouts + 1)))
    assert per_group(upge.PassRateBetween(low, high), batch) == opened


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_pass_rate_between_refuses_an_empty_interval(low, high):
    with pytest.raises(ConfigError, match=f"PassRateBetween: low={low}, high={high}"):
        upge.PassRateBetween(low, high)


def test_pass_rate_between_needs_rollouts():
    batch = trajectories(lengths=[1, 1], rewards=[1.0, 1.0], group=[3, 3], demonstrations=[0, 1])
    with pytest.raises(ValueError, match="PassRateBetween: group 3 has no rollouts"):
        upge.PassRateBetween()(batch)


# A stateful gate.


@dataclass(frozen=True)
class Halving(upge.StatefulGate):
    """Half of what it was, or as small as the step's reward says."""

    variable: str = "share"
    wants: ClassVar[frozenset[str]] = frozenset({"reward/mean"})

    def initial(self) -> float:
        return 1.0

    def updated(self, value: float, signals: Mapping[str, float]) -> float:
        return min(value / 2, signals["reward/mean"])


def test_a_stateful_gate_returns_the_present_value():
    batch = groups((1, 2), share=0.3, mu=0.6)
    assert Halving()(batch).tolist() == [0.3, 0.3]
    assert Halving("other")(batch).tolist() == [1.0, 1.0], "where there is no value yet it is the initial one"
    assert upge.MetaGradient()(batch).tolist() == [0.6, 0.6]
    assert upge.MetaGradient()(groups((1, 2))).tolist() == [0.8, 0.8]
    assert Halving()(batch).dtype == torch.float64 and not Halving().is_live
    assert Halving().updated(0.5, {"reward/mean": 0.9}) == 0.25 and Halving().updated(0.5, {"reward/mean": 0.1}) == 0.1
    assert all(Halving().due(step) for step in range(3))


def test_a_stateful_gate_conforms():
    upge.testing.check_component(Halving())
    upge.testing.check_component(upge.Complement(Halving()))


def test_a_value_of_zero_closes_the_gate():
    assert Halving().closed(groups((1, 2), share=0.0)).tolist() == [True, True]
    assert upge.Complement(Halving()).closed(groups((1, 2), share=1.0)).tolist() == [True, True]


def test_the_state_goes_where_the_batch_goes():
    batch = groups((1, 2), (0, 2), share=0.3)
    piece = batch.select(torch.tensor([3, 1]), batch.logprobs[[3, 1]])
    assert piece.state == batch.pack().state == batch.with_rewards(-batch.rewards).state == {"share": 0.3}
    assert Halving()(Halving().view(piece)).tolist() == [0.3, 0.3]


# MetaGradient's rule.


def signals(slope: float, entropy: float) -> dict[str, float]:
    return {"utility_slope": slope, "entropy": entropy}


@pytest.mark.parametrize(
    ("value", "slope", "entropy", "expected"),
    [
        (0.8, 0.0, 0.5, 0.8),
        # 1e-4·100 = 0.01; 5e-4·(0.5 - 0.9) = -0.0002
        (0.8, 100.0, 0.9, 0.8098),
        (0.8, -100.0, 0.5, 0.79),
        (0.5, 0.0, 0.1, 0.5002),
        (0.94, 1e6, 0.5, 0.95),
        (0.06, -1e6, 0.5, 0.05),
        (0.3, 0.0, 1e9, 0.05),
    ],
)
def test_meta_gradient_moves_and_stays_within_its_bounds(value, slope, entropy, expected):
    assert upge.MetaGradient().updated(value, signals(slope, entropy)) == pytest.approx(expected, abs=1e-12)


def test_meta_gradient_climbs_the_utility():
    """Two losses on a plane, with gradients (0, 2) and (-1, 0) at the origin, and a held-out one with gradient (-3, 1).

    One step of rate 0.1 leads to θ′ = -0.1·[(1 - μ)·(0, 2) + μ·(-1, 0)] = (0.1μ, 0.2μ - 0.2); the held-out loss, which
    is linear, is there -0.3μ + 0.2μ - 0.2, so the utility grows by 0.1 per unit of μ: 0.1·⟨(-3, 1), (-1, -2)⟩ = 0.1.
    """
    rate, own, expert, held_out = 0.1, torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 0.0]), torch.tensor([-3.0, 1.0])
    mu = torch.tensor(0.4, requires_grad=True)
    utility = -(held_out * (-rate * ((1 - mu) * own + mu * expert))).sum()
    (slope,) = torch.autograd.grad(utility, mu)
    assert float(slope) == pytest.approx(0.1) == pytest.approx(rate * float(held_out @ (expert - own)))
    gate = upge.MetaGradient(start=0.4, rate=1.0, entropy_rate=0.0)
    moved = gate.updated(0.4, signals(float(slope), 2.0))
    assert moved == pytest.approx(0.5)
    better = -(held_out * (-rate * ((1 - moved) * own + moved * expert))).sum()
    assert float(better) > float(utility.detach())


def test_meta_gradient_is_due_at_the_end_of_every_so_many_steps():
    assert [step for step in range(61) if upge.MetaGradient().due(step)] == [19, 39, 59]
    assert [step for step in range(4) if upge.MetaGradient(every=1).due(step)] == [0, 1, 2, 3]


def test_meta_gradient_says_what_it_wants():
    gate = upge.MetaGradient(start=0.3)
    assert gate.wants == {"utility_slope", "entropy"} and gate.initial() == 0.3 and gate.columns == frozenset()


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"start": 0.99}, "start=0.99"),
        ({"low": 0.9}, "low=0.9"),
        ({"high": 1.5}, "high=1.5"),
        ({"every": 0}, "MetaGradient.every: 0"),
        ({"rate": "fast"}, "MetaGradient.rate"),
    ],
)
def test_meta_gradient_refuses_settings_that_make_no_sense(settings, fragment):
    with pytest.raises(ConfigError) as caught:
        upge.MetaGradient(**settings)
    assert fragment in str(caught.value)


# Which variables an algorithm carries.


def test_stateful_gates_are_found_inside_others():
    parts = {
        "a": upge.Complement(upge.MetaGradient()),
        "b": upge.ProductOf((upge.ConstantGate(), Halving())),
        "c": upge.MetaGradient(),
        "d": upge.NoMask(),
    }
    assert stateful_gates(parts) == {"mu": upge.MetaGradient(), "share": Halving()}
    assert set(stateful_gates(algorithms.load("amft").parts)) == {"mu"}
    assert stateful_gates(algorithms.load("hpt").parts) == {}


@pytest.mark.parametrize("inner", [upge.MetaGradient(start=0.5), upge.Complement(upge.MetaGradient(start=0.5))])
def test_two_gates_may_not_mean_different_things_by_one_variable(inner):
    with pytest.raises(ConfigError, match="share.* the variable 'mu'"):
        stateful_gates({"one": upge.MetaGradient(), "other": inner})
    assert len(stateful_gates({"one": upge.MetaGradient(), "other": upge.MetaGradient("nu", start=0.5)})) == 2


def test_an_override_of_one_end_alone_is_refused():
    """The complement with a variable of its own settings would be no complement."""
    gate = "{_target_: upge.Complement, gate: {_target_: upge.MetaGradient, start: 0.5}}"
    with pytest.raises(ConfigError, match="the variable 'mu'"):
        stateful_gates(algorithms.load("amft", [f"terms.rl.gate={gate}"]).parts)
