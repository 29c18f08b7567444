"""Gates at their thresholds and corners; reductions by hand for unequal lengths and groups."""

from __future__ import annotations

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories


def groups(*successes: tuple[int, int]) -> upge.Trajectories:
    """A group per pair (successes, rollouts), each with a successful demonstration at its end."""
    rewards, number, experts = [], [], []
    for index, (good, rollouts) in enumerate(successes):
        rewards += [1.0] * good + [0.0] * (rollouts - good) + [1.0]
        number += [index] * (rollouts + 1)
        experts.append(len(rewards) - 1)
    return trajectories(lengths=[1] * len(rewards), rewards=rewards, group=number, demonstrations=experts)


def per_group(gate: upge.Gate, batch: upge.Trajectories) -> list[float]:
    """The coefficient of each group, which must be that of all its trajectories."""
    values = gate(batch)
    actual = [values[batch.group == g] for g in batch.group.unique()]
    assert all(bool((value == value[0]).all()) for value in actual)
    return [float(value[0]) for value in actual]


# Pass-rate gates.


@pytest.mark.parametrize(
    ("threshold", "rollouts", "above"),
    [
        (0.0, 3, [0, 1, 1, 1]),
        (1 / 3, 3, [0, 0, 1, 1]),
        (2 / 3, 3, [0, 0, 0, 1]),
        (1.0, 3, [0, 0, 0, 0]),
        (0.25, 8, [0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (2 / 8, 8, [0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (0.2499, 8, [0, 0, 1, 1, 1, 1, 1, 1, 1]),
        (1 / 3, 6, [0, 0, 0, 1, 1, 1, 1]),
        (2 / 3, 6, [0, 0, 0, 0, 0, 1, 1]),
        (0.6, 5, [0, 0, 0, 0, 1, 1]),
    ],
)
def test_thresholds_are_exclusive_above_and_inclusive_below(threshold, rollouts, above):
    batch = groups(*((k, rollouts) for k in range(rollouts + 1)))
    assert per_group(upge.PassRateAbove(threshold), batch) == above
    assert per_group(upge.PassRateAtMost(threshold), batch) == [1 - a for a in above]


@pytest.mark.parametrize("rollouts", [2, 3, 5, 6, 7, 9, 10, 11, 13, 16, 49])
def test_every_multiple_of_one_over_n_is_met_exactly(rollouts):
    """A threshold of k/n closes at k successes and opens at k + 1, in spite of binary rounding."""
    batch = groups(*((k, rollouts) for k in range(rollouts + 1)))
    for k in range(rollouts + 1):
        opened = [float(j > k) for j in range(rollouts + 1)]
        for threshold in (k / rollouts, float(f"{k / rollouts:.12f}")):
            assert per_group(upge.PassRateAbove(threshold), batch) == opened
            assert per_group(upge.PassRateAtMost(threshold), batch) == [1 - value for value in opened]


def test_demonstrations_do_not_count_in_the_pass_rate():
    """No success among the rollouts and a successful demonstration: the pass rate is 0, not 1/3."""
    batch = groups((0, 2), (1, 2))
    assert batch.pass_rate.tolist() == [0.0] * 3 + [0.5] * 3
    assert per_group(upge.PassRateAtMost(0.0), batch) == [1.0, 0.0]


def test_rewards_of_minus_one_and_one_give_the_same_pass_rate():
    batch = trajectories(lengths=[1] * 4, rewards=[1.0, -1.0, -1.0, -1.0], group=[0] * 4)
    assert batch.pass_rate.tolist() == [0.25] * 4


@pytest.mark.parametrize("gate", [upge.PassRateAbove(), upge.PassRateAtMost(), upge.PassRateTable()])
def test_a_group_without_rollouts_has_no_pass_rate(gate):
    batch = trajectories(lengths=[1] * 3, rewards=[1.0, 0.0, 1.0], group=[4, 4, 9], demonstrations=[2])
    with pytest.raises(ValueError, match=f"{type(gate).__name__}: group 9 has no rollouts"):
        gate(batch)


@pytest.mark.parametrize(
    "gate",
    [
        upge.ConstantGate(0.5),
        upge.PassRateAbove(1 / 3),
        upge.PassRateAtMost(1 / 3),
        upge.PassRateBetween(0.2, 0.8),
        upge.PassRateTable(rates=(0.0, 0.5, 1.0), coefficients=(0.0, 1.0, 0.5)),
        upge.Complement(upge.PassRateBetween(0.2, 1.0)),
        upge.ProductOf((upge.PassRateAbove(0.2), upge.ConstantGate(2.0), upge.PassRateTable())),
    ],
)
def test_the_coefficient_at_a_pass_rate_is_that_of_its_groups(gate):
    rollouts = 6
    actual = per_group(gate, groups(*((k, rollouts) for k in range(rollouts + 1))))
    assert actual == [gate.at_pass_rate(k / rollouts) for k in range(rollouts + 1)]


def test_a_gate_that_follows_something_else_has_no_coefficient_at_a_pass_rate():
    entropy, above = upge.EntropyWeight(), upge.PassRateAbove(0.5)
    for gate in (entropy, upge.Schedule(), upge.MetaGradient(), upge.Complement(entropy)):
        assert gate.at_pass_rate(0.5) is None
    product = upge.ProductOf((entropy, above))
    assert product.at_pass_rate(0.5) == 0, "closed, whatever the entropy is"
    assert product.at_pass_rate(1.0) is None


def test_pass_rate_table_interpolates():
    table = upge.PassRateTable(rates=(0.0, 0.5, 1.0), coefficients=(0.0, 1.0, 0.5))
    actual = per_group(table, groups((0, 8), (1, 8), (2, 8), (4, 8), (6, 8), (8, 8)))
    assert actual == pytest.approx([0.0, 0.25, 0.5, 1.0, 0.75, 0.5], abs=1e-12)


def test_pass_rate_table_in_steps_takes_the_largest_rate_reached():
    table = upge.PassRateTable(rates=(0.0, 1 / 3, 2 / 3), coefficients=(0.1, 0.2, 0.3), step=True)
    batch, expected = groups((0, 3), (1, 3), (2, 3), (3, 3), (1, 4), (1, 2)), [0.1, 0.2, 0.3, 0.3, 0.1, 0.2]
    assert per_group(table, batch) == expected
    typed = upge.PassRateTable(rates=(0.0, 0.333333333333, 0.666666666667), coefficients=(0.1, 0.2, 0.3), step=True)
    assert per_group(typed, batch) == expected


@pytest.mark.parametrize("step", [False, True])
def test_pass_rate_table_is_constant_beyond_its_ends(step):
    table = upge.PassRateTable(rates=(0.25, 0.75), coefficients=(2.0, 4.0), step=step)
    assert per_group(table, groups((0, 8), (2, 8), (6, 8), (8, 8))) == [2.0, 2.0, 4.0, 4.0]
    assert per_group(upge.PassRateTable((0.5,), (7.0,), step), groups((0, 2), (1, 2), (2, 2))) == [7.0] * 3


# Other gates.


def test_entropy_weight():
    """Mean entropy 2 in both: 0.5·e^-2 and 0.1·e^2; an empty response has none."""
    batch = trajectories(entropies=[[1.0, 3.0], [2.0], []], lengths=[2, 1, 0])
    actual = upge.EntropyWeight(scale=0.5, sign=-1)(batch)
    assert actual.tolist() == pytest.approx([0.06766764, 0.06766764, 0.5], abs=1e-8)
    assert upge.EntropyWeight(scale=0.1, sign=1)(batch)[:2].tolist() == pytest.approx([0.73890561] * 2, abs=1e-8)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.2), (2, 0.55), (4, 0.9), (9, 0.5), (14, 0.1), (15, 0.1), (10**6, 0.1)]
)
def test_schedule_at_its_corners(step, expected):
    """Warm-up of 4 steps from 0.2 to 0.9, then half a cosine of 10 steps to 0.1."""
    settings = dict(start=0.2, peak=0.9, end=0.1, warmup=4, decay=10)
    batch = trajectories(lengths=[1, 1], step=step)
    assert upge.Schedule(**settings)(batch).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    rest = upge.Complement(upge.Schedule(**settings))
    assert rest(batch).tolist() == pytest.approx([1 - expected] * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 0, "decay": 10}, [1.0, 0.97552826]),
        ({"warmup": 0, "decay": 0}, [0.0, 0.0]),
        ({"warmup": 1, "decay": 0}, [0.0, 0.0]),
        ({"warmup": 2, "decay": 0}, [0.0, 0.5]),
    ],
)
def test_schedule_without_warm_up_or_decay(settings, expected):
    actual = [upge.Schedule(**settings).coefficient_at(step) for step in (0, 1)]
    assert actual == pytest.approx(expected, abs=1e-8)


def test_product_of_gates_and_always():
    batch = groups((0, 2), (1, 2))
    gate = upge.ProductOf((upge.PassRateAbove(0.0), upge.ConstantGate(0.5), upge.Schedule(warmup=4, peak=0.8, decay=8)))
    assert per_group(gate, batch) == [0.0, 0.0], "the schedule starts at 0"
    later = upge.ProductOf((upge.PassRateAbove(0.0), upge.ConstantGate(0.5)))
    assert per_group(later, batch) == [0.0, 0.5]
    assert per_group(upge.ProductOf(()), batch) == per_group(upge.ConstantGate(), batch) == [1.0, 1.0]


def test_a_gate_that_reads_the_current_policy_needs_whole_responses():
    """Whatever its class says: one number for a response is no matter of one token."""

    class Confidence(upge.Gate):
        reads = frozenset({"logprobs"})

        def __call__(self, batch):
            return batch.logprobs.detach().sum(dim=1).exp()

    assert Confidence().live_reach == "trajectory"
    assert upge.PassRateAbove().live_reach == "token"


# Reductions: lengths 2, 1, 4, 0 and 1; the first two trajectories are one group, the next three another.

LENGTHS, GROUP = [2, 1, 4, 0, 1], [7, 7, 3, 3, 3]
EVERY, SOME = [True] * 5, [True, True, True, False, False]


@pytest.mark.parametrize(
    ("reduction", "selected", "expected"),
    [
        (upge.TokenMean(), EVERY, [1 / 8, 1 / 8, 1 / 8, None, 1 / 8]),
        (upge.TokenMean(), SOME, [1 / 7, 1 / 7, 1 / 7, None, 0]),
        # the empty response counts as a trajectory: N = 5
        (upge.SequenceMean(), EVERY, [1 / 10, 1 / 5, 1 / 20, None, 1 / 5]),
        (upge.SequenceMean(), SOME, [1 / 6, 1 / 3, 1 / 12, None, 0]),
        (upge.SequenceMean(tokens="sum"), EVERY, [1 / 5, 1 / 5, 1 / 5, None, 1 / 5]),
        (upge.FixedLength(10), EVERY, [1 / 50, 1 / 50, 1 / 50, None, 1 / 50]),
        (upge.FixedLength(10), SOME, [1 / 30, 1 / 30, 1 / 30, None, 0]),
        # Q = 2; n = 2 and 3, then 2 and 1
        (upge.QuestionMean(), EVERY, [1 / 8, 1 / 4, 1 / 24, None, 1 / 6]),
        (upge.QuestionMean(), SOME, [1 / 8, 1 / 4, 1 / 8, None, 0]),
        (upge.QuestionMean(), [True, True, False, False, False], [1 / 4, 1 / 2, 0, None, 0]),
        (upge.QuestionMean(tokens="sum"), SOME, [1 / 4, 1 / 4, 1 / 2, None, 0]),
        (upge.QuestionMean(tokens="fixed", length=10), EVERY, [1 / 40, 1 / 40, 1 / 60, None, 1 / 60]),
    ],
)
def test_reduction(reduction, selected, expected):
    batch = trajectories(lengths=LENGTHS, group=GROUP)
    actual = reduction(batch, torch.tensor(selected))
    for row, length, weight in zip(actual.tolist(), LENGTHS, expected, strict=True):
        assert row == pytest.approx([weight or 0.0] * length + [0.0] * (4 - length), abs=1e-15)


@pytest.mark.parametrize("reduction", [upge.TokenMean(), upge.SequenceMean(), upge.FixedLength(3), upge.QuestionMean()])
def test_an_empty_selection_weighs_nothing(reduction):
    batch = trajectories(lengths=LENGTHS, group=GROUP)
    assert reduction(batch, torch.zeros(5, dtype=torch.bool)).tolist() == [[0.0] * 4] * 5
    empty = trajectories(lengths=[0, 0])
    assert reduction(empty, torch.ones(2, dtype=torch.bool)).tolist() == [[0.0]] * 2


def mixture(over: str) -> upge.Algorithm:
    """Rollouts of questions with a success and demonstrations of the others, under one reduction."""

    def term(source: str, gate: upge.Gate) -> upge.Term:
        part = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), upge.ConstantAdvantage())
        return upge.Term(source, gate, part, upge.SequenceMean(over=over, tokens="sum"))

    terms = {
        "own": term("rollouts", upge.PassRateAbove(0.0)),
        "expert": term("demonstrations", upge.PassRateAtMost(0.0)),
    }
    return upge.Algorithm("mixture", terms)


@pytest.mark.parametrize(("over", "own", "expert"), [("term", 1 / 4, 1 / 2), ("batch", 1 / 6, 1 / 6)])
def test_over_says_whose_count_divides(over, own, expert):
    """Four rollouts count (of questions 1 and 2), two demonstrations (of questions 0 and 3): 4 and 2, or 6 together."""
    batch = groups((0, 2), (1, 2), (2, 2), (0, 2))
    weights = mixture(over).estimate(batch).weights[:, 0].tolist()
    rest = [0.0, 0.0, expert]
    assert weights == pytest.approx([*rest, own, own, 0.0, own, own, 0.0, *rest])


def test_zero_advantage_counts_and_a_closed_gate_does_not():
    """hpt: three questions, so Q = 3 in both terms; the solved one counts in the divisor but needs no forward pass."""
    batch = groups((0, 2), (1, 2), (2, 2))
    plan = algorithms.load("hpt", ["terms.rl.reduction.length=10"]).plan(batch)
    assert plan.active.tolist() == [False, False, True, True, True, False, True, True, False]
    assert plan.contributing.tolist() == [False, False, True, True, True, False, False, False, False]
    estimate = plan.estimate(batch)
    assert estimate.terms["rl"].reduction[3:5, 0].tolist() == pytest.approx([1 / 60] * 2)
    assert estimate.terms["sft"].reduction[2].tolist() == pytest.approx([1 / 3])
    assert estimate.weights[:, 0].tolist() == pytest.approx([0, 0, 1 / 3, 1 / 120, -1 / 120, 0, 0, 0, 0])


def test_a_coefficient_of_zero_takes_a_term_out_of_the_count():
    batch = groups((1, 2), (1, 2))
    algorithm = mixture("batch")
    closed = upge.Term(**{**vars(algorithm.terms["own"]), "coefficient": 0.0})
    plan = upge.Algorithm("x", {**algorithm.terms, "own": closed}).plan(batch)
    assert not plan.active.any() and not plan.contributing.any()


def test_a_closed_gate_in_a_product_with_a_live_one_does_not_count():
    """Question 0 fails: its rollouts are out of divisor and forward pass although the entropies are not known yet."""
    batch = trajectories(entropies=[[1.0]] * 4, rewards=[0.0, 0.0, 1.0, 0.0], group=[0, 0, 1, 1])
    terms = mixture("term").terms
    product = upge.ProductOf((upge.PassRateAbove(0.0), upge.EntropyWeight(scale=1.0)))
    plan = upge.Algorithm("x", {"own": upge.Term(**{**vars(terms["own"]), "gate": product})}).plan(batch)
    assert plan.active.tolist() == plan.contributing.tolist() == [False, False, True, True]
    weights = plan.estimate(batch).weights[:, 0].tolist()
    assert weights == pytest.approx([0.0, 0.0, 0.18393972, 0.18393972], abs=1e-8), "1/2 · e^-1"
    assert product.closed(batch).tolist() == [True, True, False, False]
    assert not upge.EntropyWeight(scale=0.0).closed(batch).any(), "a live gate is known only later"


def test_a_regularizer_leaves_out_what_counts_in_no_term():
    """One of two questions has a success: -H of its two rollouts alone, each with weight 1/2."""
    batch = trajectories(entropies=[[1.0]] * 4, rewards=[0.0, 0.0, 1.0, 0.0], group=[0, 0, 1, 1])
    entropies = batch.entropies.clone().requires_grad_()
    batch = batch.select(torch.arange(4), batch.logprobs, entropies=entropies)
    own = {"own": mixture("term").terms["own"]}
    bonus = {"bonus": upge.EntropyBonus(1.0, upge.TokenMean())}
    upge.Algorithm("x", own, bonus).estimate(batch).loss.backward()
    assert entropies.grad[:, 0].tolist() == [0.0, 0.0, -0.5, -0.5]


def test_an_unknown_divisor_is_refused():
    class Odd(upge.Reduction):
        over = "trem"
        reads = frozenset()

        def __call__(self, batch, selected):
            return batch.response_mask.double()

    with pytest.raises(upge.ConfigError, match="Odd.over: 'trem' is not one of 'term', 'batch'"):
        Odd()
