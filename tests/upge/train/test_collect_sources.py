"""A step's trajectories with several demonstrations a prompt, or several sources; and what a failure leaves."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.upge.train.test_collect import FakeModel, algorithm, collector, examples, prompts_of
from upge.data import Example, Problem
from upge.errors import DataError
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.collect import HELD_OUT
from upge.train.sample import assemble


def test_demonstrations_take_turns():
    """One a step by default, each as often as the others; with 0 all come at once, as one group."""
    problem = Problem("p", "1+1=?", "2", ("a", "b", "c"))
    data = [Example(problem, (i,), ((100, i), (101, i), (102, i))) for i in range(2)]
    made = collector(algorithm("demonstrations"), data, FakeModel(), prompts=2)
    for stride in (1, 3, 8):
        turns = Counter((t.example, t.response_ids[0]) for n in range(90) for t in made.collect(n * stride)[0])
        assert sum(turns.values()) == 180 and all(26 <= turns[i, 100 + c] <= 34 for i in range(2) for c in range(3))
    for wanted, kept in ((0, 3), (2, 2), (5, 3)):
        policy = {"demonstrations": wanted}
        actual = collector(algorithm("demonstrations"), data, FakeModel(), prompts=1, data_policy=policy).collect(0)[0]
        assert len({t.response_ids for t in actual}) == len(actual) == kept and {t.group for t in actual} == {0}
        assert assemble(actual, 0).group.tolist() == [0] * kept


def mixed(numbers: dict[str, int]) -> list[Example]:
    """So many examples of each source, one source after the other."""
    sources = [name for name, number in numbers.items() for _ in range(number)]
    pairs = zip(examples(len(sources)), sources, strict=True)
    return [replace(example, problem=replace(example.problem, source=source)) for example, source in pairs]


def test_sources_come_by_their_weights():
    data, weights = mixed({"small": 3, "large": 30, "unused": 3}), {"small": 3.0, "large": 1.0, "unused": 0.0}
    made = collector(algorithm("rollouts"), data, FakeModel(), prompts=4, weights=weights)
    counts = Counter(data[i].problem.source for step in range(40) for i in prompts_of(made.collect(step)[0]))
    assert abs(counts["small"] - 120) <= 1 and abs(counts["large"] - 40) <= 1 and counts["unused"] == 0
    with pytest.raises(DataError, match=r"data.weights.none: no training example .* has what 'test' needs"):
        collector(algorithm("rollouts"), data, FakeModel(), weights={**weights, "none": 1.0})


def test_prompts_kept_apart_come_by_the_weights():
    data, weights = mixed({"small": 20, "large": 180}), {"small": 1.0, "large": 1.0}
    made = collector(algorithm("rollouts"), data, FakeModel(), prompts=4, weights=weights, reserve=True)
    apart = [data[i].problem.source for i in made.streams["held out"]]
    assert Counter(apart)["large"] > 3 * Counter(apart)["small"] > 0
    drawn = Counter(data[i].problem.source for step in range(30) for i in prompts_of(made.collect(step, HELD_OUT)[0]))
    assert abs(drawn["small"] - drawn["large"]) <= 30


def test_a_failed_step_leaves_no_work_behind():
    """What was submitted for responses of a call that failed is given up."""
    model, futures = FakeModel(), []

    class Failing(FakeModel):
        def sample(self, prompts, n, sampling, seeds, arrived, interrupted=None):
            arrived(0, 0, self.rollout(0, seeds[0], 0))
            raise RuntimeError("out of memory")

    def submit(item):
        futures.append(Future())
        return futures[-1]

    pool = SimpleNamespace(submit=submit)
    made = collector(algorithm("rollouts"), examples(4), model)
    made.sampler = VerifiedSampler(Failing(), pool, model)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.collect(0)
    assert len(futures) == 1 and futures[0].cancelled()


def test_prompts_drawn_anew_keep_the_weights():
    """What is closed is replaced by prompts of the same source."""
    data, weights = mixed({"a": 30, "b": 30}), {"a": 1.0, "b": 1.0}
    model = FakeModel()
    made = collector(algorithm("rollouts", rounds=10), data, model, prompts=6, weights=weights)
    for step in range(5):
        actual, figures, *_ = made.collect(step)
        assert Counter(data[i].problem.source for i in prompts_of(actual)) == {"a": 3, "b": 3}
        assert figures["sampling/rounds"] > 1
