"""When the sampler's weights are refreshed, and when it sleeps."""

from __future__ import annotations

from upge.train.engine import SamplerState, WeightSync


class RecordingSampler:
    """Records the calls that it gets."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def load_weights(self, weights) -> None:
        self.calls.append(list(weights))

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")


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
    assert sampler.calls == [[("w", 1)], "sleep", "wake", [("w", 2)]]


def test_a_sampler_that_was_never_loaded_can_sleep():
    """As in a run of demonstrations without an evaluation before its first step."""
    sampler = RecordingSampler()
    sync = WeightSync(sampler, CountingPolicy())
    sync.sleep()
    sync.refresh()
    assert sampler.calls == ["sleep", "wake", [("w", 1)]]
