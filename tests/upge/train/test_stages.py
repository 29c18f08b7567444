"""What begins anew with a stage: the learning-rate schedule, the critic's warm-up, AdamW's moments, the memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import algorithms
from tests.upge.train.test_collect import algorithm
from upge import Algorithm, Pipeline
from upge.config import from_tree
from upge.pipeline import Stage
from upge.train.config import RunConfig
from upge.train.engine import CriticEngine, Engine
from upge.train.learner import Memory, Models
from upge.train.lr_schedule import learning_rates
from upge.train.moments import Moments
from upge.train.parts import State
from upge.train.trainer import Trainer


def two_stages(first: Algorithm, second: Algorithm) -> Pipeline:
    """The first has two of five steps; the second's learning rate is ten times the run's."""
    return Pipeline("test", {"first": Stage(first, 2.0), "second": Stage(second, 3.0, lr_factor=10.0)})


def rates(pipeline: Pipeline, steps: int, **settings) -> list[tuple[float | None, float]]:
    """(the policy's, the critic's) learning rate of each step."""
    config = from_tree(RunConfig, settings)
    spans = pipeline.spans(steps)
    return [tuple(learning_rates(config, span, step)) for span in spans for step in range(span.first, span.end)]


def policy_rates(*arguments, **settings) -> list[float | None]:
    return [policy for policy, _ in rates(*arguments, **settings)]


def test_the_schedule_begins_anew_with_each_stage():
    """One step of warm-up and a linear fall, over 4 steps and then over 6."""
    pipeline = two_stages(algorithm("demonstrations"), algorithm("rollouts"))
    actual = policy_rates(pipeline, 10, optimizer={"lr": 1.0, "schedule": "linear", "warmup_steps": 1})
    assert actual == pytest.approx([1, 1, 2 / 3, 1 / 3, 10, 10, 8, 6, 4, 2])


def test_warm_up_begins_anew_with_each_stage():
    """Two steps that rise, then the full rate."""
    pipeline = two_stages(algorithm("demonstrations"), algorithm("rollouts"))
    actual = policy_rates(pipeline, 10, optimizer={"lr": 1.0, "warmup_steps": 2})
    assert actual == pytest.approx([0.5, 1, 1, 1, 5, 10, 10, 10, 10, 10])


SETTINGS = {"optimizer": {"lr": 1.0, "schedule": "linear", "warmup_steps": 1}, "critic": {"lr": 8.0, "warmup_steps": 2}}


def test_the_critic_learns_alone_for_exactly_its_warm_up():
    """Two of six steps; the policy's schedule then has the other four, the critic's has all six."""
    actual = rates(Pipeline.of(algorithms.load("ppo")), 6, **SETTINGS)
    assert [policy for policy, _ in actual[:2]] == [None, None]
    assert [policy for policy, _ in actual[2:]] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert [critic for _, critic in actual] == pytest.approx([8, 8, 6.4, 4.8, 3.2, 1.6])


def test_a_warm_up_without_a_critic_is_none():
    assert policy_rates(Pipeline.of(algorithm("rollouts")), 3, **SETTINGS) == pytest.approx([1, 1, 0.5])


def test_the_critics_warm_up_is_counted_within_its_stage():
    pipeline = two_stages(algorithm("demonstrations"), algorithms.load("ppo"))
    actual = policy_rates(pipeline, 10, **SETTINGS)
    assert actual[:4] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert actual[4:6] == [None, None]
    assert actual[6:] == pytest.approx([10, 10, 20 / 3, 10 / 3])


# AdamW's moments.


def trained(cls: type) -> Engine | CriticEngine:
    """An engine whose optimizer has moments, in the set in use and in another."""
    module = object.__new__(cls)
    module._moments = Moments(SimpleNamespace(state={}))
    for name in ("interleaved_update", "main"):
        module.use_optimizer(name)
        module._moments._zero.state["weight"] = {"step": 3, "exp_avg": 0.5}
    return module


def moments(module: Engine | CriticEngine) -> dict[str, dict]:
    """Name → the moments that an update with this set would start from."""
    actual = {}
    for name in ("main", "interleaved_update"):
        module.use_optimizer(name)
        actual[name] = dict(module._moments._zero.state)
    return actual


@pytest.mark.parametrize("number", [0, 1])
def test_a_later_stage_starts_with_fresh_moments(number):
    """The policy's, those of interleaved updates, and the critic's; a run's first stage resets nothing."""
    models = Models(trained(Engine), trained(CriticEngine))
    kept = moments(trained(Engine))
    assert all(kept.values())
    trainer = object.__new__(Trainer)
    trainer.parts, trainer.state = SimpleNamespace(models=models), State()
    span = two_stages(algorithm("demonstrations"), algorithm("rollouts")).spans(10)[number]
    memory = trainer._enter_stage(span, SimpleNamespace(memory=lambda: Memory({"mu": 0.5})))
    for module in (models.policy, models.critic):
        assert moments(module) == (kept if number == 0 else {"main": {}, "interleaved_update": {}})
    assert memory == Memory({"mu": 0.5}, [])
