"""The parts of a run, the state that its checkpoints hold, and the learner of each stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upge.algorithm import Algorithm
from upge.data import Example, Prompting
from upge.data.teacher import TeacherPrompts
from upge.pipeline import Pipeline, Span
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.collect import Collector
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.faults import Fault
from upge.train.folder import RunFolder
from upge.train.learner import Learner, Memory, Models
from upge.train.metrics import UpdateReport
from upge.train.replay import ReplayBuffer
from upge.train.stopping import StopSignals


@dataclass
class State:
    """What a checkpoint holds in addition to weights and optimizer. All randomness follows from the seed and the step.

    Attributes:
        step: the number of training steps so far.
        skipped: the number of updates so far whose gradient was not finite.
        skipped_in_a_row: for each kind of update, how many of them since the last one with a finite gradient.
        memory: the memory of the stage's algorithm; None before its first step.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    memory: Memory | None = None

    def count_skipped(self, report: UpdateReport) -> None:
        """Count the updates of a step whose gradient was not finite."""
        self.skipped += report.skipped
        norms = {"policy": report.grad_norms, "critic": report.critic_norms}
        for kind, of_kind in (norms | {"interleaved_update": report.interleaved_norms}).items():
            for norm in of_kind:
                in_a_row = self.skipped_in_a_row.get(kind, 0)
                self.skipped_in_a_row[kind] = 0 if math.isfinite(norm) else in_a_row + 1

    @property
    def most_skipped_in_a_row(self) -> int:
        """The largest of `skipped_in_a_row`."""
        return max(self.skipped_in_a_row.values(), default=0)


@dataclass(frozen=True)
class Parts:
    """The parts of a run; each can be used alone.

    Attributes:
        algorithm: the algorithm, or a pipeline of several.
        train: the training set.
        weights: the share of the prompts that each source of a mixture gets; empty without a mixture.
        prompting: tokenizer, template and stop tokens.
        evaluate: measures the accuracy of the sampler's weights: `upge.evaluation.evaluator.training_accuracy`. All
            ranks call it, and it returns the same result on each.
        stop: the signals that ask the run to stop. If `sampler` also checks them, it abandons a step or evaluation in
            progress at once.
        fault: the fault on purpose; the training set and the sampler already have it.
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
    fault: Fault = Fault()


def learner_of(parts: Parts, span: Span, poll: Callable[[], None]) -> Learner:
    """The learner of a stage; `poll` may abandon a step, as for `Learner`."""
    config, stop_token_ids, algorithm = parts.config, parts.prompting.stop_token_ids, span.stage.algorithm
    template = config.teacher.template
    teacher_prompts = TeacherPrompts(parts.prompting, template) if template else None

    def collector_for(one: Algorithm, reserve: bool) -> Collector:
        own = teacher_prompts if one.step_needs.teacher else None
        sources = parts.train, parts.sampler, stop_token_ids, parts.world, parts.weights
        return Collector(config, one, *sources, reserve, own)

    replay = None
    if algorithm.replay is not None:
        replay = ReplayBuffer(algorithm.replay, config.group_size, config.prompts_per_step, config.seed, parts.world)
    behavior = config.rollout.behavior
    sources = parts.train, collector_for, poll, replay, behavior
    is_faulty = not config.fault_stages or span.name in config.fault_stages
    adapt = parts.fault.updater if is_faulty else Fault().updater
    return Learner(algorithm, parts.models, config.optimizer, *sources, adapt=adapt)
