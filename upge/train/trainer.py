"""The training loop: collect, update, refresh the sampler, evaluate, save."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from upge.algorithm import Algorithm
from upge.data import Example, Prompting
from upge.pipeline import Pipeline, Span
from upge.rollout.verified_sampling import VerifiedSampler
from upge.train.alarms import Watch
from upge.train.collect import Collector
from upge.train.config import RunConfig, learning_rates
from upge.train.distributed import World
from upge.train.engine import WeightSync
from upge.train.folder import RunFolder, read_lines
from upge.train.learner import Learner, Memory, Models
from upge.train.metrics import Recorder, UpdateReport, dropped_demonstrations, rollout_metrics, step_metrics
from upge.train.prompt_order import stream_seed

#: Exit codes of a run that has begun.
DONE, NOT_FINITE = 0, 3
#: The critic's folder inside a checkpoint's; DeepSpeed's file names would be those of the policy's.
_CRITIC = "critic"


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


class Trainer:
    """Runs the steps of a run and leaves its folder complete.

    Args:
        parts: of the run.
        report_step: called on the main rank with the step's metrics, for progress.
        report_evaluation: called on the main rank with each evaluation.
        report_alarm: called on the main rank with the text of each alarm.

    Attributes:
        stopping_alarms: names of the alarms that stopped the run (`stop.alarms`).
    """

    def __init__(
        self,
        parts: Parts,
        report_step: Callable[[dict[str, float]], None] = lambda metrics: None,
        report_evaluation: Callable[[dict[str, Any]], None] = lambda line: None,
        report_alarm: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.parts, self.report_step, self.report_evaluation = parts, report_step, report_evaluation
        self.report_alarm, self.stopping_alarms = report_alarm, list[str]()
        self.spans = [s for s in Pipeline.of(parts.algorithm).spans(parts.config.steps) if s.end > s.first]
        self.recorder = Recorder(parts.config, parts.train, parts.prompting, parts.folder)
        self.learners = [self._learner(span) for span in self.spans]
        self.sync = WeightSync(parts.sampler.engine, parts.models.policy)
        self.state = State()
        self.watch = Watch(parts.config.alarms, parts.config.steps)
        self.saved_step: int | None = None
        self._signal = 0

    def restore(self, step: int) -> None:
        """Continues from the checkpoint of `step`, which any number of ranks may have written.

        A run that was stopped for non-finite updates starts counting them anew.
        """
        folder, models = self.parts.folder, self.parts.models
        saved = dict(models.policy.load(folder.checkpoints, folder.tag(step)))
        memory = saved.pop("memory")
        self.state = State(**saved, memory=None if memory is None else Memory(**memory))
        if models.critic is not None:
            models.critic.load(folder.checkpoints / folder.tag(step), _CRITIC)
        self.saved_step = step
        self.watch = self._watch(step)
        if self._too_many_skipped():
            self.state.skipped_in_a_row = {}

    def run(self) -> int:
        """Trains to the last step; returns the exit code: 0, 3, or 128 + the signal that stopped it."""
        config = self.parts.config
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        if self.state.step == 0:
            self._evaluate()
        stopped = self._stop_signal()
        while self.state.step < config.steps and not stopped:
            too_many = self._step() or bool(self.stopping_alarms)
            step, last = self.state.step, self.state.step == config.steps
            stage_ends = any(step == span.end for span in self.spans)
            if (_due(step, config.eval.every) or stage_ends) and not last:
                self._evaluate()
            stopped = self._stop_signal()
            if too_many or (config.checkpoint.every and (last or _due(step, config.checkpoint.every))):
                self.save()
            if too_many:
                return NOT_FINITE
        if not stopped:
            self._evaluate()
            stopped = self._stop_signal()
        if stopped:
            self.save()
            return 128 + stopped
        self._export(self.parts.folder.final_partial)
        if self.parts.world.is_main:
            self.parts.folder.finish(self.state.step)
        return DONE

    def _stop_signal(self) -> int:
        """A signal that some rank has received, or 0; the same on every rank."""
        return max(self.parts.world.gather(self._signal))

    def _export(self, folder: Path) -> None:
        """Writes model and tokenizer."""
        self.parts.models.policy.export(folder)
        if self.parts.world.is_main:
            self.parts.prompting.tokenizer.save_pretrained(folder)

    def _keep_if_best(self, line: dict[str, Any]) -> None:
        """Writes the weights to best/ if the evaluation `line` is the best so far."""
        folder, world = self.parts.folder, self.parts.world
        if world.broadcast(world.is_main and folder.is_best(line)):
            self._export(folder.best_partial)
            if world.is_main:
                folder.settle_best(line)
            world.barrier()

    def save(self) -> None:
        """Saves a checkpoint of the present state, unless there is one.

        It is written under another name and renamed when complete, so that a half-written one is never read.
        """
        folder, models, world, step = self.parts.folder, self.parts.models, self.parts.world, self.state.step
        if step == self.saved_step:
            return
        self.saved_step = step
        partial = f"{folder.tag(step)}.partial"
        models.policy.save(folder.checkpoints, partial, asdict(self.state))
        if models.critic is not None:
            models.critic.save(folder.checkpoints / partial, _CRITIC, {})
        world.barrier()
        if world.is_main:
            folder.settle(step, self.parts.config.checkpoint.keep)
        world.barrier()

    def _learner(self, span: Span) -> Learner:
        p, stop_token_ids = self.parts, self.parts.prompting.stop_token_ids

        def collector_for(algorithm: Algorithm, reserve: bool) -> Collector:
            return Collector(p.config, algorithm, p.train, p.sampler, stop_token_ids, p.world, p.weights, reserve)

        return Learner(span.stage.algorithm, p.models, p.config.optimizer, p.train, collector_for)

    def _enter_stage(self, span: Span, learner: Learner) -> Memory:
        """The memory at a stage's first step. Of the stage before only the weights remain."""
        if span.first > 0:
            self.parts.models.policy.reset_optimizer(everything=True)
            if self.parts.models.critic is not None:
                self.parts.models.critic.reset_optimizer(everything=True)
        return learner.memory()

    def _step(self) -> bool:
        """Makes one step; True if too many updates in a row were not finite."""
        config, world, state = self.parts.config, self.parts.world, self.state
        stage = next(i for i, span in enumerate(self.spans) if state.step < span.end)
        span, learner = self.spans[stage], self.learners[stage]
        began = time.perf_counter()
        torch.manual_seed(stream_seed(config.seed, "step", state.step, world.rank))
        step_in_stage, memory = state.step - span.first, state.memory
        if memory is None or step_in_stage == 0:
            memory = state.memory = self._enter_stage(span, learner)
        sync_seconds = self.sync.refresh() if learner.samples else 0.0
        collected = learner.collect(state.step, step_in_stage)
        self.sync.sleep()
        rates, diagnostics = learning_rates(config, span, state.step), self.recorder.diagnostics(state.step + 1)
        start = time.perf_counter()
        report, more = learner.update(collected, step_in_stage, rates, memory, diagnostics)
        times = {"time/train": time.perf_counter() - start, "time/sync": sync_seconds}
        extra = more | collected.metrics | times | {"learning_rate": rates.policy or 0.0}
        if len(self.spans) > 1:
            extra["stage"] = stage + 1
        state.step += 1
        self._count_skipped(report)
        of_ranks = world.gather_to_main((report.sums, report.tops))
        metrics: dict[str, float] = {}
        if world.is_main:
            metrics = {"step": state.step, **rollout_metrics(report.active.trajectories)}
            metrics |= step_metrics(report, [sums for sums, _ in of_ranks])
            metrics |= {"skipped_updates": state.skipped, **extra}
            if learner.algorithm.step_needs.demonstrations:
                metrics |= dropped_demonstrations(report.active.trajectories, self.parts.train)
        if learner.algorithm.stateful:
            learner.remember(world.broadcast(metrics), step_in_stage, memory)
        if world.is_main:
            metrics["time/total"] = time.perf_counter() - began
            self.recorder.record(metrics, report.active, [top for _, tops in of_ranks for top in tops])
            self.report_step(metrics)
        self._raise_alarms(metrics)
        return report.skipped > 0 and self._too_many_skipped()

    def _watch(self, step: int) -> Watch:
        """The alarms of this run, which know what the folder has of the steps up to `step`."""
        before = []
        for file in (self.parts.folder.path / name for name in ("metrics.jsonl", "alarms.jsonl")):
            lines = read_lines(file) if file.is_file() else []
            before.append([line for line in lines if line["step"] <= step])
        config = self.parts.config
        return Watch(config.alarms, config.steps, before[0], [line["alarm"] for line in before[1]])

    def _raise_alarms(self, metrics: Mapping[str, float]) -> None:
        """Reports a step's new alarms. Those of `stop.alarms` stop the run, on all ranks."""
        new = self.watch.step(metrics) if self.parts.world.is_main else {}
        for name, problem in new.items():
            self.parts.folder.append("alarms.jsonl", {"step": self.state.step, "alarm": name, "problem": problem})
            self.report_alarm(problem)
        if stopping := self.parts.config.stop.alarms:
            self.stopping_alarms = self.parts.world.broadcast([name for name in new if name in stopping])

    def _count_skipped(self, report: UpdateReport) -> None:
        state = self.state
        state.skipped += report.skipped
        norms = {"policy": report.grad_norms, "critic": report.critic_norms}
        for kind, of_kind in (norms | {"interleaved_update": report.interleaved_norms}).items():
            for norm in of_kind:
                in_a_row = state.skipped_in_a_row.get(kind, 0)
                state.skipped_in_a_row[kind] = 0 if math.isfinite(norm) else in_a_row + 1

    def _too_many_skipped(self) -> bool:
        """True if one kind of update (policy, critic or interleaved) has failed too often in a row."""
        return max(self.state.skipped_in_a_row.values(), default=0) >= self.parts.config.stop.nonfinite_updates

    def _evaluate(self) -> None:
        p = self.parts
        began = time.perf_counter()
        if p.config.eval.every < 0:
            return
        if p.world.broadcast(p.world.is_main and p.folder.is_evaluated(self.state.step)):
            return  # by the run that this one continues, after the same update
        self.sync.refresh()
        line = {"step": self.state.step, **p.evaluate(), "time": time.perf_counter() - began}
        if p.config.eval.keep_best:
            # Before the line is written: an interruption in between repeats the evaluation and loses no model.
            self._keep_if_best(line)
        if p.world.is_main:
            p.folder.append("evaluations.jsonl", line)
            self.report_evaluation(line)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal: the run stops after the step in progress. A second one of the same kind ends it at once."""
        self._signal = number
        signal.signal(number, signal.SIG_DFL)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
