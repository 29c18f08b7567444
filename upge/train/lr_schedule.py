"""The learning rates of a step: warm-up, decay, and a schedule for each stage."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from upge.pipeline import Span
from upge.train.config import OptimizerConfig, RunConfig


class LearningRates(NamedTuple):
    """The learning rates of a step.

    Attributes:
        policy: None if the policy does not learn in this step.
        critic: ignored without a critic.
    """

    policy: float | None
    critic: float = 0.0


def learning_rates(config: RunConfig, span: Span, step: int) -> LearningRates:
    """The learning rates of a step; the schedules start anew in each stage.

    In the first `critic.warmup_steps` steps of a stage with a critic, only the critic learns. The policy's schedule
    begins after them.

    Args:
        config: the run's settings.
        span: the stage and its steps.
        step: the step of the run, counted from 0.
    """
    step_in_stage, steps = step - span.first, span.end - span.first
    critic_only = config.critic.warmup_steps if span.stage.algorithm.critic is not None else 0
    policy = learning_rate(config.optimizer, max(0, step_in_stage - critic_only), max(1, steps - critic_only))
    critic = learning_rate(replace(config.optimizer, lr=config.critic.lr), step_in_stage, steps)
    return LearningRates(None if step_in_stage < critic_only else policy * span.stage.lr_factor, critic)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0) of `steps`.

    After a linear warm-up the rate is constant, or it falls to 0, which it would reach one step after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * ((1 - progress) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
