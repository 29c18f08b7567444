"""The sampler's copy of the policy's weights: when it is refreshed, and when it sleeps."""

from __future__ import annotations

import time
from enum import Enum

from upge.rollout import Sampler
from upge.train.engine import Engine


class SamplerState(Enum):
    """What the sampler's weights are worth.

    Attributes:
        STALE: awake, with other weights than the policy's.
        FRESH: awake, with the policy's weights.
        ASLEEP: its GPU memory is free for training; the weights are stale after it.
    """

    STALE = "stale"
    FRESH = "fresh"
    ASLEEP = "asleep"


class WeightSync:
    """Owns the sampler's state and the transfer of weights from the trainer's shards to the sampler.

    The trainer calls `refresh` before anything is sampled and `sleep` before every update:

        stale or asleep -- refresh --> fresh -- sleep --> asleep

    Args:
        sampler: the inference engine.
        policy: the model that is trained.
    """

    def __init__(self, sampler: Sampler, policy: Engine) -> None:
        self.sampler, self.policy = sampler, policy
        self.state = SamplerState.STALE

    def refresh(self) -> float:
        """Makes the sampler's weights those of the policy; returns the seconds it took, 0 if they were fresh.

        All ranks call it.
        """
        if self.state is SamplerState.FRESH:
            return 0.0
        began = time.perf_counter()
        if self.state is SamplerState.ASLEEP:
            self.sampler.wake()
        self.sampler.load_weights(self.policy.named_weights())
        self.state = SamplerState.FRESH
        return time.perf_counter() - began

    def sleep(self) -> None:
        """Frees the sampler's GPU memory for an update; the update makes the sampler's weights stale."""
        if self.state is not SamplerState.ASLEEP:
            self.sampler.sleep()
            self.state = SamplerState.ASLEEP
