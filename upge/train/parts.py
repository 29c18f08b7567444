"""The parts of a run, and the state that its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upge.algorithm import Algorithm
from upge.data import Example, Prompting
from upge.pipeline import Pipeline
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.folder import RunFolder
from upge.train.learner import Memory, Models
from upge.train.stopping import StopSignals


@dataclass
class State:
    """What a checkpoint holds in addition to weights and optimizer. All randomness follows from the seed and the step.

    Attributes:
        step: training steps so far.
        skipped: updates so far whose gradient was not finite.
        skipped_in_a_row: for each kind of update, those of them since the last finite one.
        memory: of the stage's algorithm; None before its first step.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    memory: Memory | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of a run; each can be used alone.

    Attributes:
        algorithm: or a pipeline of several.
        train: the training set.
        weights: the share of the prompts that each source of a mixture gets; empty without a mixture.
        prompting: tokenizer, template and stop tokens.
        evaluate: measures the accuracy of the sampler's weights: `upge.evaluation.evaluator.training_accuracy`. All
            ranks call it, and it returns the same on each.
        stop: asks the run to stop. If `sampler` also asks it, a step or evaluation in progress is left out at once.
    """

    config: RunConfig
    algorithm: Algorithm | Pipeline
    train: Sequence[Example]
    weights: Mapping[str, float]
    prompting: Prompting
    models: Models
    sampler: VerifiedSampler
    evaluate: Callable[[], Mapping[str, Any]]
    folder: RunFolder
    world: World
    stop: StopSignals = field(default_factory=StopSignals)
