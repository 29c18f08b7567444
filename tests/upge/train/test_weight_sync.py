"""When the sampler's weights are refreshed, and when it sleeps."""

from __future__ import annotations

import torch

from upge.rollout.noise import rounded
from upge.train.engine import SamplerState, WeightSync


class RecordingSampler:
    """Records the calls that it gets."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def load_weights(self, weights) -> None:
        self.calls.append(list(weights))

    def sleep(self) -> None:
        self.calls.append("sleep")

    def restart(self) -> None:
        self.calls.append("restart")


class CountingPolicy:
    """Its weights are the number of times that they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def named_weights(self):
        self.asked += 1
        return iter([("w", self.asked)])


def test_weights_are_loaded_once_per_update():
    sampler, policy = RecordingSampler(), CountingPolicy()
    sync = WeightSync(sampler, policy)
    assert sync.state is SamplerState.STALE
    assert sync.refresh() > 0 and sync.state is SamplerState.FRESH
    assert sync.refresh() == 0.0 and policy.asked == 1, "an evaluation and the step after it share the weights"
    sync.sleep()
    sync.sleep()
    assert sync.state is SamplerState.ASLEEP
    sync.refresh()
    assert sync.state is SamplerState.FRESH
    assert sampler.calls == [[("w", 1)], "sleep", [("w", 2)]]


def test_a_sampler_that_was_never_loaded_can_sleep():
    """As in a run of demonstrations without an evaluation before its first step."""
    sampler = RecordingSampler()
    sync = WeightSync(sampler, CountingPolicy())
    sync.sleep()
    sync.refresh()
    assert sampler.calls == ["sleep", [("w", 1)]]


MATRIX = torch.tensor([[1.0, 0.4, -0.3], [0.2, 0.05, 0.1]])


class MatrixPolicy:
    """It always has the same weights."""

    def named_weights(self):
        return iter([("w", MATRIX)])


def test_rounded_weights_are_for_training_rollouts_only():
    """Whatever the sampler holds, a refresh without rounding loads the exact weights: that of evaluations."""
    sampler, exact, noisy = RecordingSampler(), MATRIX.clone(), rounded(MATRIX, 3)
    sync = WeightSync(sampler, MatrixPolicy())
    for bits in (0, 3, 3, 0, 0, 3):
        sync.refresh(bits=bits)
    loaded = [weight for ((_, weight),) in sampler.calls]
    assert [torch.equal(weight, exact) for weight in loaded] == [True, False, True, False]
    assert all(torch.equal(weight, noisy) for weight in loaded[1::2])
    assert torch.equal(MATRIX, exact), "the trainer's weights are not touched"


def test_a_restarted_engine_gets_the_weights_that_it_had():
    sampler = RecordingSampler()
    sync = WeightSync(sampler, MatrixPolicy())
    for bits in (3, 0):
        sync.refresh(bits=bits)
        sync.restart()
        before, restart, after = sampler.calls[-3:]
        assert restart == "restart" and torch.equal(before[0][1], after[0][1])
