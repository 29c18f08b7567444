"""The learning rates of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from upge.pipeline import Span
from upge.train.config import OptimizerConfig, RunConfig


class Rates(NamedTuple):
    """The learning rates of a step; a policy's rate of None leaves it as it is."""

    policy: float | None
    critic: float = 0.0


def rates_of(config: RunConfig, span: Span, step: int) -> Rates:
    """Those of a step (counted from 0) by its place in its stage; a critic that warms up learns alone at first."""
    place = step - span.first
    waiting = config.critic.warmup_steps if span.stage.algorithm.critic is not None else 0
    course = learning_rate(config.optimizer, max(0, place - waiting), max(1, span.end - span.first - waiting))
    critic = learning_rate(replace(config.optimizer, lr=config.critic.lr), place, span.end - span.first)
    return Rates(None if place < waiting else course * span.stage.lr_factor, critic)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (counted from 0): linear warm-up, then constant, or falling towards 0, which the
    step after the last would have."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * ((1 - share) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))
