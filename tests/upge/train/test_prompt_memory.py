"""Memory per prompt: what is tracked, how prompts are drawn by it, what parts read, and that it survives a restart."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace

import pytest
import torch

import algorithms
import upge
from tests.upge.train.test_collect import FakeModel as Fake
from tests.upge.train.test_collect import Ranks, collector, prompts_of
from upge.data import Example, Problem
from upge.errors import ConfigError
from upge.prompt_memory import PromptColumns, PromptRecord, Remembered
from upge.train.learner import Memory
from upge.train.prompt_order import least_used, mixed_indices, weighted_permutation
from upge.train.prompt_records import PromptReader, Prompts, compared, drift, effective_number, remember, visits
from upge.train.sample import Trajectory, assemble


def examples(number: int, source: str = "") -> list[Example]:
    problems = (Problem(f"p{i}", "1+1=?", "2", ("2",), source=source) for i in range(number))
    return [Example(problem, (i,), ((100, i),)) for i, problem in enumerate(problems)]


def rollout(example: int, reward: float, ids: tuple[int, ...] = (7, 8), **more) -> Trajectory:
    return Trajectory(example, 0, (example,), ids, reward, is_demonstration=False, **more)


def prompts(values: list[float], ages: list[int] | None = None) -> PromptColumns:
    ages = ages or [1] * len(values)
    return PromptColumns.of([Remembered(v, 4, 2, 0.5, age) for v, age in zip(values, ages, strict=True)])


def tracked(reward_lists: list[list[float]], memory: upge.PromptMemory, step: int = 0) -> Prompts:
    """The memory after a step in which each list's rewards were those of its prompt."""
    state, data = Prompts(), examples(len(reward_lists))
    sampled = [rollout(i, reward) for i, rewards in enumerate(reward_lists) for reward in rewards]
    remember(memory, state, visits(sampled, data), step)
    return state


# What is tracked.


def test_the_mean_is_that_of_a_beta_distribution_with_decay():
    """α ← ρα + successes, β ← ρβ + failures, v = α/(α + β), written out over several visits."""
    memory, alpha, beta, rho = upge.DecayedMean(start=0.25, weight=4.0, decay=0.7), 1.0, 3.0, 0.7
    numbers = memory.initial()
    assert memory.value(numbers) == 0.25
    for rewards in ([1.0], [0.0, 1.0, 1.0], [0.0], [1.0, 1.0]):
        numbers = memory.updated(numbers, rewards, drift=9.0)
        alpha, beta = rho * alpha + sum(rewards), rho * beta + len(rewards) - sum(rewards)
        assert memory.value(numbers) == pytest.approx(alpha / (alpha + beta), abs=1e-15)
        assert numbers == pytest.approx((alpha, alpha + beta), abs=1e-14)


@pytest.mark.parametrize(("decay", "expected"), [(1.0, (0.5 + 2) / (1 + 4)), (0.0, 0.0)])
def test_without_decay_all_counts_and_with_full_decay_the_last_step_alone(decay, expected):
    memory = upge.DecayedMean(decay=decay)
    numbers = memory.updated(memory.updated(memory.initial(), [1.0, 1.0], 0.0), [0.0, 0.0], 0.0)
    assert memory.value(numbers) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("moved", "rho"), [(0.0, 0.96), (0.006, 2**-0.1), (0.01, 2 ** (-1 / 6)), (0.06, 0.875)])
def test_the_decay_follows_the_drift(moved, rho):
    decay = upge.DriftDecay(half_life=0.06, low=0.875, high=0.96)
    assert decay.at(moved) == pytest.approx(min(max(rho, 0.875), 0.96), abs=1e-15)
    memory = upge.DecayedMean(0.5, 1.0, decay)
    assert memory.wants_drift and not upge.DecayedMean().wants_drift
    assert memory.updated((3.0, 5.0), [1.0], moved) == pytest.approx((decay.at(moved) * 3 + 1, decay.at(moved) * 5 + 1))


def test_a_step_is_recorded_and_read_in_the_next():
    memory, data = upge.DecayedMean(decay=1.0), examples(3)
    state = tracked([[1.0, 0.0], [0.0, 0.0]], memory, step=4)
    assert state.records["p0"] == PromptRecord(2, 1, 0.5, 4, (1.5, 3.0))
    reader = PromptReader(memory, state, data, step=7)
    assert reader.of(0) == Remembered(0.5, 2, 1, 0.5, 3)
    new = reader.of(2)
    assert new[:3] == (0.5, 0, 0) and math.isnan(new.last_pass_rate) and new.age == 8
    assert reader.columns([1, 0]).value.tolist() == pytest.approx([0.5 / 3, 0.5])


def test_prompts_are_told_apart_by_data_set_and_guided_rollouts_do_not_count():
    memory, state = upge.DecayedMean(), Prompts()
    data = [*examples(1, "a"), *examples(1, "b"), *examples(1)]
    sampled = [rollout(0, 1.0), rollout(1, 0.0), rollout(2, 0.0), rollout(2, 1.0, prefix_tokens=1)]
    figures = remember(memory, state, visits(sampled, data), 0)
    assert {key: one.successes / one.attempts for key, one in state.records.items()} == {"a/p0": 1, "b/p0": 0, "p0": 0}
    assert figures["memory/new_share"] == 1 and figures["memory/prompts"] == 0
    assert figures["memory/value_mean"] == 0.5 and figures["memory/value_error"] == 0.5


def test_the_drift_compares_the_remembered_response_with_itself():
    """mean_t |log π(y_t) - log π_then(y_t)|, 0.2 here; a new prompt has none."""
    state, data = Prompts(), examples(2)
    first = visits([rollout(0, 1.0, (5, 6))], data)
    assert [t.response_ids for t in compared(first, state)] == [(5, 6)]
    moved = drift(first, state, [torch.tensor([-1.0, -2.0])])
    assert moved.by_key == {}
    remember(upge.DecayedMean(0.5, 1.0, upge.DriftDecay()), state, first, 0, moved)
    second = visits([rollout(1, 1.0, (9,)), rollout(0, 0.0, (7, 8, 9)), rollout(0, 1.0, (1,))], data)
    asked = compared(second, state)
    assert [(t.prompt_ids, t.response_ids) for t in asked] == [((1,), (9,)), ((0,), (7, 8, 9)), ((0,), (5, 6))]
    new = [torch.tensor([-0.5]), torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.1, -1.7])]
    moved = drift(second, state, new)
    assert moved.by_key == pytest.approx({"p0": 0.2}, abs=1e-7)
    memory = upge.DecayedMean(0.5, 1.0, upge.DriftDecay(0.2, 0.0, 1.0))
    figures = remember(memory, state, second, 1, moved)
    assert figures["memory/drift_mean"] == pytest.approx(0.2, abs=1e-7)
    assert state.records["p0"].tracked == pytest.approx((0.5 * (0.96 * 0.5 + 1) + 1, 0.5 * 1.96 + 2), abs=1e-6)
    assert state.responses["p0"][0].tolist() == [7, 8, 9] and torch.equal(state.responses["p0"][1], new[1])


def test_a_checkpoint_restores_all_of_it(tmp_path):
    memory = Memory({"mu": 0.5}, [3], tracked([[1.0], [0.0, 1.0]], upge.DecayedMean(), 2))
    memory.prompts.responses["p0"] = (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([-0.25, -3.0]))
    torch.save(asdict(memory), tmp_path / "state.pt")
    loaded = Memory.restored(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.prompts.records == memory.prompts.records and loaded.variables == memory.variables
    assert all(map(torch.equal, loaded.prompts.responses["p0"], memory.prompts.responses["p0"]))
    before = {"variables": {"mu": 0.5}, "remembered": [3]}
    assert Memory.restored(before) == Memory({"mu": 0.5}, [3]), "a checkpoint from before there was a memory"


# How prompts are drawn.


def test_the_weights_are_those_of_their_formulas():
    values, ages = [0.0, 0.1, 0.5, 0.8, 1.0], [1, 2, 3, 10, 100]
    columns = prompts(values, ages)
    near = upge.NearPassRate(target=0.6, width=0.3, floor=0.02)(columns)
    expected = [math.exp(-((v - 0.6) ** 2) / (2 * 0.3**2)) + 0.02 for v in values]
    assert near.tolist() == pytest.approx(expected, abs=1e-15)
    uncertain = upge.Uncertainty(0.05)(columns)
    assert uncertain.tolist() == pytest.approx([math.sqrt(v * (1 - v)) + 0.05 for v in values], abs=1e-15)
    assert upge.Age(1.5)(columns).tolist() == pytest.approx([age**1.5 for age in ages], rel=1e-14)
    product = upge.ProductOfWeights((upge.Age(), upge.Uncertainty(0.05)))(columns)
    assert torch.allclose(product, upge.Age()(columns) * uncertain, rtol=1e-14)
    assert effective_number([torch.tensor([1.0, 3.0]), torch.tensor([0.0])]) == pytest.approx(16 / 10)


def test_draws_without_replacement_have_the_probabilities_of_the_weights():
    """P(i first) = w_i/Σw and P(j second | i first) = w_j/(Σw - w_i), over 20,000 seeds, within 5 deviations."""
    weights, number = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), 20_000
    orders = Counter(tuple(weighted_permutation(weights, seed)) for seed in range(number))
    for (i, j, _), count in orders.items():
        p = float(weights[i] / 8 * weights[j] / (8 - weights[i]))
        assert abs(count - number * p) < 5 * math.sqrt(number * p * (1 - p)), (i, j)
    assert len(orders) == 6


def test_replacements_follow_the_weights_after_those_not_used():
    weights = torch.tensor([1e9, 1.0, 1e-9], dtype=torch.float64)
    assert least_used(3, 3, [0], 1, weights) == [1, 2, 0]
    assert least_used(4, 3, [], 1, weights) == [0, 1, 2, 0]


def test_sources_keep_their_shares_under_a_curriculum():
    strata, shares = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}, {"a": 0.5, "b": 0.5}
    weights = {"a": torch.tensor([1.0, 1.0, 1.0, 1e-12]).double(), "b": torch.tensor([1e-12, 1.0, 1.0, 1.0]).double()}
    for step in range(6):
        drawn = mixed_indices(step, 6, strata, shares, 3, weights)
        assert sorted(drawn) == [0, 1, 2, 5, 6, 7]
    assert mixed_indices(2, 6, strata, shares, 3, weights) == mixed_indices(2, 6, strata, shares, 3, weights)


@dataclass(frozen=True)
class ByValue(upge.PromptWeight):
    """The value itself."""

    def __call__(self, prompts: PromptColumns) -> torch.Tensor:
        return prompts.value


def learning(weight: upge.PromptWeight, redraw: upge.DynamicSampling | None = None) -> upge.Algorithm:
    algorithm = algorithms.load("rloo")
    return replace(algorithm, memory=upge.DecayedMean(decay=0.0), sampling=upge.Curriculum(weight, redraw))


def test_a_step_draws_by_what_is_remembered_whatever_the_number_of_ranks():
    """Of 12 prompts, four with a value of 1 and the others near 0: these four are drawn, in every step anew."""
    data, algo = examples(12), learning(ByValue())
    state = tracked([[1.0 if i in (2, 5, 6, 11) else 1e-12] for i in range(12)], algo.memory)
    reader = PromptReader(algo.memory, state, data, 1)
    alone = collector(algo, data, Fake()).collect(1, prompts=reader)
    assert sorted(prompts_of(alone[0])) == [2, 5, 6, 11] and len(alone.sampled) == 8
    assert alone.metrics["sampling/effective_prompts"] == pytest.approx(4)
    ranks = Ranks(2).run(lambda world: collector(algo, data, Fake(), world).collect(1, prompts=reader))
    for collection in ranks:
        assert collection.trajectories == alone.trajectories and collection.sampled == alone.sampled
    orders = {tuple(prompts_of(collector(algo, data, Fake()).collect(s, prompts=reader)[0])) for s in range(1, 8)}
    assert len(orders) > 1, "updates do not get the heavier prompts first"


def test_prompts_that_are_replaced_are_remembered_too():
    """Prompts 0, 3, ... are always right and 1, 4, ... always wrong: they are replaced, but were sampled."""
    redraw = upge.DynamicSampling(upge.PassRateBetween(), rounds=10)
    data, algo = examples(12), learning(upge.Age(0.0), redraw)
    reader = PromptReader(algo.memory, Prompts(), data, 0)
    collection = collector(algo, data, Fake()).collect(0, prompts=reader)
    assert {t.example % 3 for t in collection.trajectories} == {2}
    seen = visits(collection.sampled, data)
    assert len(seen) > 4 and sum(len(visit.rollouts) for visit in seen) == 2 * collection.metrics["sampling/prompts"]
    remember(algo.memory, reader.prompts, seen, 0)
    rates = {key: one.last_pass_rate for key, one in reader.prompts.records.items()}
    assert {rates[f"p{i}"] for i in range(12) if f"p{i}" in rates} == {0.0, 0.5, 1.0}


# What parts read.


@dataclass(frozen=True)
class Fresh(upge.Gate):
    """Open on prompts that were never sampled: a gate that reads the memory."""

    reads = frozenset({"prompt_attempts"})

    def __call__(self, batch) -> torch.Tensor:
        return (batch.prompt_attempts == 0).double()

    def formula(self):
        return upge.ConstantGate().formula()


def test_parts_and_gates_read_the_columns_of_the_step_before():
    data, algo = examples(6), algorithms.load("spo")
    algo = replace(algo, terms={"rl": replace(algo.terms["rl"], gate=Fresh())})
    state = tracked([[1.0], [0.0]], algo.memory)
    reader = PromptReader(algo.memory, state, data, 1)
    collection = collector(algo, data, Fake(), prompts=6).collect(1, prompts=reader)
    batch = assemble(collection.trajectories, 1)
    expected = [reader.of(t.example) for t in collection.trajectories]
    assert batch.prompt_value.tolist() == [one.value for one in expected] and batch.prompt_value.unique().numel() == 3
    assert batch.prompt_attempts.tolist() == [one.attempts for one in expected]
    opened = algo.plan(batch).terms["rl"].gate.values
    assert opened.tolist() == [float(t.example > 1) for t in collection.trajectories]


def test_the_columns_are_there_only_where_a_part_reads_them():
    data, algo = examples(6), learning(upge.Uncertainty())
    reader = PromptReader(algo.memory, Prompts(), data, 0)
    collection = collector(algo, data, Fake()).collect(0, prompts=reader)
    assert assemble(collection.trajectories, 0).prompt_value is None
    assert all(t.remembered is None for t in collection.trajectories)


def test_the_baseline_is_what_is_remembered():
    batch = upge.testing.batches.random_batch()
    values = upge.PromptBaseline()(batch)
    assert torch.equal(values[:, 0], batch.rewards - batch.prompt_value)


@pytest.mark.parametrize("epsilon", [1e-8, 0.3])
def test_whitening_over_trajectories_counts_each_once_whatever_its_length(epsilon):
    batch = upge.testing.batches.random_batch()
    own = upge.Whitened(upge.PromptBaseline(), epsilon, over="rollouts")(batch)
    rows = ~batch.is_demonstration & (batch.lengths > 0)
    apart = (batch.rewards - batch.prompt_value)[rows]
    expected = (apart - apart.mean()) / (apart.var() + epsilon).sqrt()
    assert torch.allclose(own[rows][:, 0], expected, rtol=1e-12, atol=1e-14)
    assert float(own[rows][:, 0].mean()) == pytest.approx(0, abs=1e-14)
    assert not torch.allclose(own[rows][:, 0], upge.Whitened(upge.PromptBaseline())(batch)[rows][:, 0])


# Messages.

NO_MEMORY = "sampling draws prompts by what is remembered of them, but there is no `memory`; give one"
CASES = [
    (lambda: replace(algorithms.load("spo"), memory=None), NO_MEMORY),
    (
        lambda: replace(algorithms.load("spo"), memory=None, sampling=None).check(group_size=1),
        r"advantage: Whitened reads \['prompt_value'\], .* it needs a memory of prompts, for example "
        "algo.memory={_target_: upge.DecayedMean}",
    ),
    (lambda: replace(algorithms.load("sft"), memory=upge.DecayedMean()), "memory remembers rollouts, but no term's"),
    (
        lambda: replace(algorithms.load("amft"), validation=replace(algorithms.load("spo"), sampling=None)),
        "'spo' has a `memory` of its own",
    ),
    (lambda: algorithms.load("sft", corrections=["curriculum"]), "curriculum"),
    (lambda: algorithms.load("spo", corrections=["curriculum"]), "already draws prompts by weights"),
    (lambda: algorithms.load("grpo", ["memory=3"]), "algo.memory: found .3. .int., expected a PromptMemory"),
    (lambda: upge.DecayedMean(decay=1.5), "DecayedMean.decay: 1.5 must lie between 0 and 1"),
    (lambda: upge.DecayedMean(weight=0.0), "DecayedMean.weight: 0 must be positive"),
    (lambda: upge.DecayedMean(start=math.inf), "DecayedMean.start: inf must be finite"),
    (lambda: upge.DriftDecay(half_life=0.0), "DriftDecay.half_life: 0 must be positive"),
    (lambda: upge.DriftDecay(low=0.9, high=0.8), "low=0.9, high=0.8; need 0 <= low <= high <= 1"),
    (lambda: upge.NearPassRate(width=0.0), "NearPassRate.width: 0 must be positive"),
    (lambda: upge.NearPassRate(floor=0.0), "NearPassRate.floor: 0 must be positive, because a prompt of weight 0"),
    (lambda: upge.Uncertainty(floor=-1.0), "Uncertainty.floor: -1 must be positive"),
    (lambda: upge.Age(-1.0), "Age.power: -1 must lie between 0 and 16"),
    (lambda: upge.ProductOfWeights(()), "ProductOfWeights.weights: is empty"),
    (lambda: upge.Curriculum(ByValue()).weights(prompts([0.5, -0.2])), "with the value -0.2 the weight -0.2"),
]


@pytest.mark.parametrize(("make", "message"), CASES, ids=[message[:30] for _, message in CASES])
def test_what_is_impossible_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
