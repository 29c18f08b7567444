"""A step's trajectories from fakes: prompts drawn anew, streams of prompts, preference pairs, any number of ranks."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import upge
from upge import DynamicSampling
from upge.config import from_tree
from upge.data import Example, Problem
from upge.errors import DataError
from upge.rollout import Rollout
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.collect import HELD_OUT, Collector
from upge.train.metrics import rollout_metrics
from upge.train.prompt_order import held_out, least_used, prompt_indices, stream_seed
from upge.train.sample import Trajectory, assemble, usable
from upge.verify import Declared, Item, NamedReward, Reward, Verdict
from upge.verify.reward import Term

#: What the fake model does with prompt i, by i % 3: always right, always wrong, right in every other rollout.
RIGHT, WRONG, MIXED = 0, 1, 2


def examples(number: int, demonstrations: bool = True, rejected: bool = True) -> list[Example]:
    """Prompt i is the token i, its demonstration (100, i), its rejected response (200, i)."""
    problem = Problem("p", "1+1=?", "2", ("2",))
    return [
        Example(problem, (i,), ((100, i),) if demonstrations else (), (200, i) if rejected else None)
        for i in range(number)
    ]


@dataclass
class FakeModel:
    """Sampler, prompting and verifier in one; a response is (prompt, seed, 1 if right) and remembers all of them."""

    lucky: frozenset[int] = frozenset()
    rounds: list[list[int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None) -> list[list[Rollout]]:
        self.rounds.append([prompt[0] for prompt in prompts])
        self.seeds += seeds
        actual = [[self.rollout(p[0], s, m) for m in range(n)] for p, s in zip(prompts, seeds, strict=True)]
        for index, copy in sorted(product(range(len(prompts)), range(n)), key=lambda place: place[::-1], reverse=True):
            arrived(index, copy, actual[index][copy])
        return actual

    def rollout(self, prompt: int, seed: int, member: int) -> Rollout:
        right = prompt % 3 == RIGHT or (prompt % 3 == MIXED and member % 2 == 0) or (seed in self.lucky and member == 0)
        return Rollout((prompt, seed, int(right)), (-1.0, -2.0, -3.0), True)

    def decode(self, responses) -> list[str]:
        return [str(response[-1]) for response in responses]

    def submit(self, item: Item) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        threading.Timer(0.001, future.set_result, [Verdict(float(item.response))]).start()
        return future


ALONE = SimpleNamespace(rank=0, size=1, is_main=True, gather=lambda value: [value])


class Ranks:
    """As many threads as ranks, each with a world of its own; what they gather is exchanged at a barrier."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def world(self, rank: int) -> SimpleNamespace:
        def gather(value):
            self.slots[rank] = value
            self.barrier.wait()
            actual = list(self.slots)
            self.barrier.wait()
            return actual

        return SimpleNamespace(rank=rank, size=self.size, is_main=rank == 0, gather=gather)

    def run(self, work) -> list:
        actual: list = [None] * self.size
        threads = [
            threading.Thread(target=lambda r=r: actual.__setitem__(r, work(self.world(r)))) for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return actual


def term(source: str) -> upge.Term:
    relative = upge.GroupRelative() if source == "rollouts" else upge.ConstantAdvantage()
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), relative, upge.PolicyLikelihood())
    return upge.Term(source, upge.ConstantGate(), estimator, upge.TokenMean())


def algorithm(*sources: str, rounds: int = 0) -> upge.Algorithm:
    """A term per source; with `rounds`, prompts whose rollouts all got the same reward are drawn anew."""
    sampling = DynamicSampling(upge.PassRateBetween(), rounds) if rounds else None
    return upge.Algorithm("test", {source: term(source) for source in sources}, sampling=sampling)


def collector(
    algo, data: list[Example], model: FakeModel, world=ALONE, prompts: int = 4, data_policy: dict | None = None, **more
) -> Collector:
    settings = {"prompts_per_step": prompts, "group_size": 2, "seed": 5, "data_policy": data_policy or {}}
    config = from_tree(upge.train.config.RunConfig, settings)
    return Collector(config, algo, data, VerifiedSampler(model, model, model), (9,), world, **more)


def prompts_of(trajectories) -> list[int]:
    """The prompt of each group, in order of the groups, which are numbered 0, 1, ..."""
    prompts = {t.group: t.example for t in trajectories}
    assert list(prompts) == list(range(len(prompts)))
    return list(prompts.values())


# Prompts drawn anew.


def test_without_redraws_a_step_is_what_it_was():
    """Prompts and seeds are part of every recorded run."""
    model = FakeModel()
    actual, figures, *_ = collector(algorithm("rollouts", "demonstrations"), examples(12), model).collect(3)
    prompts = [1, 10, 2, 4]
    assert prompt_indices(3, 4, 12, 5) == prompts and model.rounds == [prompts]
    assert model.seeds == [stream_seed(5, "rollout", 3, g) for g in range(4)] and model.seeds[0] == 429836502
    assert [(t.example, t.group, t.is_demonstration) for t in actual] == [
        (prompt, g, demonstration) for g, prompt in enumerate(prompts) for demonstration in (False, False, True)
    ]
    assert [t.reward for t in actual] == [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1]
    assert actual[0].response_ids == (1, model.seeds[0], 0) and actual[2].response_ids == (100, 1)
    assert set(figures) == {"time/rollout", "time/verify"} and {t.preference for t in actual} == {0}


def test_closed_prompts_are_replaced_in_order_of_acceptance():
    """Only prompts 2, 5, 8, 11, ... have rollouts that differ."""
    model = FakeModel()
    algo = algorithm("rollouts", "demonstrations", rounds=10)
    actual, figures, *_ = collector(algo, examples(30), model).collect(0)
    asked = [i for prompts in model.rounds for i in prompts]
    kept = [i for i in asked if i % 3 == MIXED]
    assert model.rounds[0] == prompt_indices(0, 4, 30, 5) and len(set(asked)) == len(asked)
    assert prompts_of(actual) == kept and len(kept) == 4
    missing = 4
    for prompts in model.rounds:
        assert len(prompts) == missing > 0
        missing -= sum(i % 3 == MIXED for i in prompts)
    assert [t.is_demonstration for t in actual] == [False, False, True] * 4
    assert (figures["sampling/rounds"], figures["sampling/prompts"]) == (len(model.rounds), len(asked))
    assert model.rounds == [[18, 22, 7, 24], [1, 14, 12, 27], [19, 11, 29], [2]]


def test_rounds_are_limited_and_what_is_missing_stays_missing():
    model = FakeModel()
    actual, figures, *_ = collector(algorithm("rollouts", rounds=2), examples(30), model).collect(0)
    assert model.rounds == [[18, 22, 7, 24], [1, 14, 12, 27]] and prompts_of(actual) == [14]
    assert (figures["sampling/rounds"], figures["sampling/prompts"]) == (2, 8)


def test_a_step_is_never_empty():
    """Nothing that is learned from: the first round stands."""
    model = FakeModel()
    only_right = [e for e in examples(60) if e.prompt_ids[0] % 3 == RIGHT]
    actual, figures, *_ = collector(algorithm("rollouts", rounds=3), only_right, model).collect(1)
    assert prompts_of(actual) == prompt_indices(1, 4, 20, 5)
    assert [t.response_ids[1] for t in actual[::2]] == [stream_seed(5, "rollout", 1, g) for g in range(4)]
    assert (figures["sampling/rounds"], figures["sampling/prompts"]) == (3, 12)


def test_a_small_data_set_is_tried_again_only_when_all_has_been_tried():
    """Seven prompts, one of them mixed; prompt 1 succeeds in a later round by luck and then replaces another."""
    data = [e for e in examples(21) if e.prompt_ids[0] % 3 == WRONG][:6] + [examples(21)[2]]
    lucky = frozenset({stream_seed(5, "rollout", 0, 3, 0)})
    model = FakeModel(lucky)
    actual, figures, *_ = collector(algorithm("rollouts", rounds=4), data, model, prompts=3).collect(0)
    asked = [i for prompts in model.rounds for i in prompts]
    assert sorted(asked[:7]) == [1, 2, 4, 7, 10, 13, 16] and len(model.rounds) == 4
    assert max(Counter(asked).values()) == 2 and Counter(asked)[2] == 1
    assert [data[i].prompt_ids[0] for i in prompts_of(actual)] == [2, model.rounds[3][0]]
    assert figures["sampling/prompts"] == len(asked)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_agree_with_one_process(size):
    """Also where a round has fewer prompts than there are ranks."""

    def work(world):
        made = collector(algorithm("rollouts", "demonstrations", rounds=10), examples(30), FakeModel(), world)
        return [made.collect(step) for step in (0, 1)]

    alone = work(ALONE)
    assert [actual for actual, *_ in alone] == [actual for actual, *_ in work(ALONE)]
    counts = [(f["sampling/rounds"], f["sampling/prompts"]) for _, f, *_ in alone]
    for steps in Ranks(size).run(work):
        assert [actual for actual, *_ in steps] == [actual for actual, *_ in alone]
        assert [(f["sampling/rounds"], f["sampling/prompts"]) for _, f, *_ in steps] == counts


def test_least_used_by_hand():
    """Of five prompts two have been used, one of them twice."""
    actual = least_used(8, 5, [3, 1, 3], seed=0)
    assert sorted(actual[:3]) == [0, 2, 4] and sorted(actual[3:7]) == [0, 1, 2, 4] and len(actual) == 8
    assert actual == least_used(8, 5, [1, 3, 3], seed=0) != least_used(8, 5, [1, 3, 3], seed=1)


# Other streams.


def test_prompts_kept_apart_are_never_trained_on():
    """Four of 40; none is drawn anew, and rollouts have other seeds than the step's."""
    model = FakeModel()
    made = collector(algorithm("rollouts", rounds=10), examples(40), model, prompts=3, reserve=True)
    apart = set(held_out(40, 5))
    assert len(apart) == 4 and apart != set(held_out(40, 6))
    drawn = []
    for step in range(12):
        assert not set(prompts_of(made.collect(step)[0])) & apart
        model.rounds.clear()
        model.seeds.clear()
        actual, figures, *_ = made.collect(step, HELD_OUT)
        drawn.append(prompts_of(actual))
        assert len(set(drawn[-1])) == 3 and set(drawn[-1]) <= apart
        assert model.rounds == [drawn[-1]] and "sampling/rounds" not in figures
        assert not set(model.seeds) & {stream_seed(5, "rollout", step, g) for g in range(3)}
    assert {i for step in drawn for i in step} == apart and drawn[0] != drawn[1]
    assert drawn[0] == prompts_of(made.collect(0, HELD_OUT)[0])


def test_a_small_data_set_keeps_one_prompt_apart():
    made = collector(algorithm("rollouts"), examples(4), FakeModel(), reserve=True)
    assert prompts_of(made.collect(0, HELD_OUT)[0]) == held_out(4, 5) and len(made.streams["train"]) == 3
    with pytest.raises(DataError, match="none of 1 training examples"):
        collector(algorithm("rollouts"), examples(1), FakeModel(), reserve=True)
    bare = [Example(e.problem, e.prompt_ids) if i in held_out(12, 5) else e for i, e in enumerate(examples(12))]
    with pytest.raises(DataError, match="can use none of the 1 reserved for its validation"):
        collector(algorithm("demonstrations"), bare, FakeModel(), reserve=True)


def test_only_examples_that_serve_are_drawn():
    """A stage of demonstrations alone in a data set where only some prompts have one."""
    data = [e if i % 2 else Example(e.problem, e.prompt_ids) for i, e in enumerate(examples(12))]
    made = collector(algorithm("demonstrations"), data, FakeModel())
    assert all(len(made.collect(s)[0]) == 4 for s in range(3))
    assert sorted(t.example for step in range(3) for t in made.collect(step)[0])[::2] == [1, 3, 5, 7, 9, 11]
    assert len(collector(algorithm("rollouts", "demonstrations"), data, FakeModel()).streams["train"]) == 12
    assert usable(data[:2] + examples(1, rejected=False), algorithm("preference_pairs").needs) == [1]
    with pytest.raises(DataError, match="'test' can use none of 3 training examples"):
        collector(algorithm("demonstrations"), examples(3, demonstrations=False), FakeModel())


def test_demonstrations_of_given_examples():
    data = [*examples(5), *examples(1, demonstrations=False)]
    actual = collector(algorithm("rollouts"), data, FakeModel()).demonstrations([3, 5, 0], 7)
    assert [(t.example, t.group, t.response_ids, t.reward, t.preference) for t in actual] == [
        (3, 0, (100, 3), 1.0, 0),
        (0, 1, (100, 0), 1.0, 0),
    ]
    assert all(t.is_demonstration and t.status == "demonstration" for t in actual)


# Preference pairs.


@pytest.mark.parametrize("sources", [("preference_pairs",), ("preference_pairs", "demonstrations")])
def test_pairs_by_hand(sources):
    """The chosen side is the demonstration, once; nothing is sampled."""
    made = collector(algorithm(*sources), examples(3), FakeModel(), prompts=2)
    actual, *_ = made.collect(0)
    first, second = prompt_indices(0, 2, 3, 5)
    assert [(t.example, t.group, t.response_ids, t.reward, t.preference) for t in actual] == [
        (first, 0, (100, first), 1.0, 1),
        (first, 0, (200, first), 0.0, -1),
        (second, 1, (100, second), 1.0, 1),
        (second, 1, (200, second), 0.0, -1),
    ]
    batch = assemble(actual, 0)
    assert batch.preference.tolist() == [1, -1, 1, -1] and batch.preference.dtype == torch.int64
    assert batch.is_demonstration.all() and made.sampler.engine.rounds == []


def test_pairs_beside_rollouts_and_without_a_rejected_side():
    data = [examples(1, rejected=False)[0], examples(2)[1]]
    both = collector(algorithm("rollouts", "preference_pairs"), data, FakeModel(), prompts=2)
    members = {t.example: [] for t in both.collect(0)[0]}
    for t in both.collect(0)[0]:
        members[t.example].append((t.is_demonstration, t.preference))
    assert members[0] == [(False, 0), (False, 0)]
    assert members[1] == [(False, 0), (False, 0), (True, 1), (True, -1)]
    three = collector(algorithm("rollouts", "preference_pairs", "demonstrations"), data, FakeModel(), prompts=2)
    assert sorted(t.preference for t in three.collect(0)[0] if t.is_demonstration) == [-1, 0, 1]
    assert collector(algorithm("preference_pairs"), data, FakeModel()).streams["train"] == [1]


# Rewards of any range.


#: math + 2*my.style, which gives rewards from -1 to 2.
BOTH = Reward(
    (Term("math"), Term("my.style", 2.0, "style")),
    {"math": Declared(), "my.style": Declared(minimum=-0.5, maximum=0.5)},
)


def parts(right: float) -> tuple[NamedReward, ...]:
    return NamedReward("math", right), NamedReward("style", right - 0.5, 2.0)


class Signed(FakeModel):
    """Its verifier gives -1 or 2, as a sum of two parts."""

    def submit(self, item: Item) -> Future[Verdict]:
        self.items = [*getattr(self, "items", []), item]
        future: Future[Verdict] = Future()
        right = float(item.response)
        future.set_result(Verdict(3 * right - 1, rewards=parts(right)))
        return future


def test_rewards_of_any_range_reach_the_batch_and_the_metrics():
    model, data = Signed(), [replace(one, problem=replace(one.problem, row={"a": 1})) for one in examples(12)]
    algo, settings = algorithm("rollouts", "demonstrations"), {"prompts_per_step": 12, "group_size": 2, "seed": 5}
    config = from_tree(upge.train.config.RunConfig, settings | {"verify": {"pass_threshold": 0.0}})
    sampler = VerifiedSampler(model, model, model, pass_threshold=0.0, rewards={"math": BOTH})
    actual = Collector(config, algo, data, sampler, (9,), ALONE).collect(0).trajectories
    assert {t.reward for t in actual if not t.is_demonstration} == {-1.0, 2.0}
    assert {t.reward for t in actual if t.is_demonstration} == {2.0}
    batch = assemble(actual, 0)
    assert batch.pass_threshold == 0.0 and set(batch.pass_rate.tolist()) == {0.0, 0.5, 1.0}
    assert upge.SignedReward()(batch)[:, 0].tolist() == [1.0 if t.reward > 0 else -1.0 for t in actual]
    assert dict(batch.reward_weights) == {"math": 1.0, "style": 2.0} and list(batch.named_rewards) == ["math", "style"]
    assert torch.equal(sum(w * batch.named_rewards[name] for name, w in batch.reward_weights.items()), batch.rewards)
    metrics = rollout_metrics(actual)
    assert (metrics["pass_rate"], metrics["reward/mean"]) == (0.5, 0.5)
    assert (metrics["reward/math"], metrics["reward/style"]) == (0.5, 0.0)
    (item, *_) = model.items
    assert (item.row, item.tokens, item.is_truncated) == ({"a": 1}, 3, False)
    members = Counter(item.member.group for item in model.items)
    assert set(members.values()) == {2} and {i.member.place for i in model.items} == {0, 1}


def test_the_sides_of_a_pair_have_the_ends_of_the_range():
    data = examples(8)
    made = collector(algorithm("rollouts", "preference_pairs"), data, FakeModel())
    made.given.rewards = {"math": Reward((Term("math"),), {"math": Declared(minimum=-3.0, maximum=4.0)})}
    actual = [(t.reward, t.preference) for t in made.collect(0).trajectories if t.is_demonstration]
    assert set(actual) == {(4.0, 1), (-3.0, -1)}


def test_partial_credit_below_the_threshold_is_a_signal_but_no_success():
    """The pass rate reads the threshold, the advantage the reward."""
    actual = [Trajectory(0, 0, (1,), (2,), reward, False, pass_threshold=0.5) for reward in (0.0, 0.4)]
    batch = assemble(actual, 0)
    assert batch.pass_rate.tolist() == [0, 0]
    assert upge.GroupRelative()(batch)[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)
    lower = assemble([replace(t, pass_threshold=0.3) for t in actual], 0)
    assert lower.pass_rate.tolist() == [0.5, 0.5] and lower.select(torch.tensor([1])).pass_threshold == 0.3


def test_one_of_several_rewards_decides_on_success():
    """Of 'style' the right response has 0.5, the wrong one -0.5: with a threshold of 0.5 no rollout passes."""
    model, data, algo = Signed(), examples(12), algorithm("rollouts", "demonstrations")
    every = {0.0, 0.5, 1.0}
    for success, threshold, rates in (("style", 0.0, every), ("style", 0.5, {0.0}), ("", 0.5, every)):
        verify = {"pass_threshold": threshold, "success": success}
        tree = {"prompts_per_step": 12, "group_size": 2, "seed": 5, "verify": verify}
        sampler = VerifiedSampler(model, model, model, rewards={"math": BOTH}, **verify)
        config = from_tree(upge.train.config.RunConfig, tree)
        actual = Collector(config, algo, data, sampler, (9,), ALONE).collect(0).trajectories
        batch = assemble(actual, 0)
        assert set(batch.pass_rate.tolist()) == rates and (batch.succeeded is None) == (success == "")
        passed = [t.passed for t in actual]
        assert batch.success.tolist() == passed
        verdicts = [Verdict(t.reward, rewards=t.rewards) for t in actual]
        assert [sampler.passed(verdict) for verdict in verdicts] == passed, "accuracy says the same"
        assert rollout_metrics(actual)["pass_rate"] == sum(t.passed for t in actual if not t.is_demonstration) / 24


def test_trajectories_with_other_rewards_have_no_column_of_them():
    one, two = (Trajectory(0, 0, (1,), (2,), 1.0, False, rewards=parts(right)) for right in (0.0, 1.0))
    assert assemble([one, two], 0).named_rewards["style"].tolist() == [-0.5, 0.5]
    for rewards in ((), (NamedReward("math", 1.0),), (NamedReward("math", 1.0), NamedReward("style", 0.5, 3.0))):
        assert assemble([one, replace(two, rewards=rewards)], 0).named_rewards == {}
    plain = replace(one, rewards=(NamedReward("math", 1.0),), sampler_logprobs=(-1.0,))
    assert plain.summands == () and "reward/math" not in rollout_metrics([plain]), "one verifier is no sum"
