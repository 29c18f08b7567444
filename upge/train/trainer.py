"""The training loop: collect, update, refresh the sampler, measure, save."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from upge.algorithm import Algorithm
from upge.data import Example, Prompting
from upge.pipeline import Pipeline, Span
from upge.rollout import Sampler
from upge.train.collect import Collector
from upge.train.config import RunConfig
from upge.train.distributed import World
from upge.train.evaluate import evaluate
from upge.train.folder import RunFolder
from upge.train.journal import Journal
from upge.train.learner import Learner, Memory, Models
from upge.train.order import stream_seed
from upge.train.rates import rates_of
from upge.train.tally import Tally, UpdateReport, rollout_metrics, step_metrics
from upge.train.verified import Responder
from upge.verify import VerifierPool

#: Exit codes of a run that has begun.
DONE, NOT_FINITE = 0, 3


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizer. All randomness follows from the seed and the step."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    memory: Memory | None = None


@dataclass(frozen=True)
class Parts:
    """What a run is made of; each is usable alone."""

    config: RunConfig
    algorithm: Algorithm | Pipeline
    train: Sequence[Example]
    evaluation: Sequence[Example]
    weights: Mapping[str, float]
    prompting: Prompting
    models: Models
    sampler: Sampler
    pool: VerifierPool
    folder: RunFolder
    world: World


class Trainer:
    """Runs the steps of a run and leaves its folder complete.

    Args:
        parts: model, data, engines and folder.
        report_step: called on the main rank with the step's metrics, for progress.
        report_evaluation: called on the main rank with each evaluation.
    """

    def __init__(
        self,
        parts: Parts,
        report_step: Callable[[dict], None] = lambda metrics: None,
        report_evaluation: Callable[[dict], None] = lambda line: None,
    ) -> None:
        self.parts, self.report_step, self.report_evaluation = parts, report_step, report_evaluation
        self.spans = [s for s in Pipeline.of(parts.algorithm).spans(parts.config.steps) if s.end > s.first]
        self.responder = Responder(parts.sampler, parts.pool, parts.prompting)
        self.journal = Journal(parts.config, parts.train, parts.prompting, parts.folder)
        self.learners = [self._learner(span) for span in self.spans]
        self.state = State()
        self.sampler_is_stale = True
        self.sampler_sleeps = False
        self.saved_step: int | None = None
        self._signal = 0

    def restore(self, step: int) -> None:
        """Continues from the checkpoint of `step`. A run that was stopped for non-finite updates gets a new chance."""
        folder, models = self.parts.folder, self.parts.models
        saved = dict(models.policy.load(folder.checkpoints, folder.tag(step)))
        memory = saved.pop("memory")
        self.state = State(**saved, memory=None if memory is None else Memory(**memory))
        if models.critic is not None:
            models.critic.load(folder.checkpoints, folder.tag(step))
        self.saved_step = step
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
            too_many = self._step()
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
        self._export()
        return DONE

    def _stop_signal(self) -> int:
        """The signal that some rank has received, or 0; the same on every rank."""
        return max(self.parts.world.gather(self._signal))

    def _export(self) -> None:
        folder, world = self.parts.folder, self.parts.world
        self.parts.models.policy.export(folder.final_partial)
        if world.is_main:
            self.parts.prompting.tokenizer.save_pretrained(folder.final_partial)
            folder.finish(self.state.step)

    def _keep_if_best(self, line: dict[str, Any]) -> None:
        """Writes the weights to best/ where the evaluation that has just been recorded is the best so far."""
        folder, world = self.parts.folder, self.parts.world
        if not world.share(world.is_main and folder.is_best(line)):
            return
        self.parts.models.policy.export(folder.best_partial)
        if world.is_main:
            self.parts.prompting.tokenizer.save_pretrained(folder.best_partial)
            folder.settle_best(line)
        world.barrier()

    def save(self) -> None:
        """A checkpoint of the present state; a half-written one never counts."""
        folder, step = self.parts.folder, self.state.step
        if step == self.saved_step:
            return
        self.saved_step = step
        models, partial = self.parts.models, f"{folder.tag(step)}.partial"
        models.policy.save(folder.checkpoints, partial, asdict(self.state))
        if models.critic is not None:
            models.critic.save(folder.checkpoints, partial)
        self.parts.world.barrier()
        if self.parts.world.is_main:
            folder.settle(step, self.parts.config.checkpoint.keep)
        self.parts.world.barrier()

    def _learner(self, span: Span) -> Learner:
        p = self.parts

        def collector_for(algorithm: Algorithm, reserve: bool) -> Collector:
            given = (p.config, algorithm, p.train, self.responder, p.prompting.stop_token_ids, p.world)
            return Collector(*given, p.weights, reserve)

        return Learner(span.stage.algorithm, p.models, p.config.optimizer, p.train, collector_for)

    def _enter_stage(self, span: Span, learner: Learner) -> None:
        """At the first step of a stage: nothing is remembered of the one before but the weights."""
        self.state.memory = learner.memory()
        if span.first > 0:
            self.parts.models.policy.reset_optimizer(everything=True)
            if self.parts.models.critic is not None:
                self.parts.models.critic.reset_optimizer(everything=True)

    def _step(self) -> bool:
        """One step; True if too many updates in a row were not finite."""
        config, world, state = self.parts.config, self.parts.world, self.state
        number = next(i for i, span in enumerate(self.spans) if state.step < span.end)
        span, learner = self.spans[number], self.learners[number]
        began = time.perf_counter()
        torch.manual_seed(stream_seed(config.seed, "step", state.step, world.rank))
        if state.memory is None or state.step == span.first:
            self._enter_stage(span, learner)
        sync = self._refresh_sampler() if learner.samples else 0.0
        place = state.step - span.first
        collected = learner.collect(state.step, place)
        self._sleep_sampler()
        rates = rates_of(config, span, state.step)
        start = time.perf_counter()
        report, figures = learner.update(collected, place, rates, state.memory, self.journal.watch(state.step + 1))
        figures |= collected.figures | {"time/train": time.perf_counter() - start, "time/sync": sync}
        figures |= {"learning_rate": rates.policy or 0.0}
        if len(self.spans) > 1:
            figures["stage"] = number + 1
        self.sampler_is_stale = True
        state.step += 1
        state.skipped += report.skipped
        kinds = {
            "policy": report.grad_norms,
            "critic": report.critic_norms,
            "interleaved_update": report.interleaved_norms,
        }
        for kind, norms in kinds.items():
            for norm in norms:
                row = state.skipped_in_a_row.get(kind, 0)
                state.skipped_in_a_row[kind] = 0 if math.isfinite(norm) else row + 1
        too_many = report.skipped > 0 and self._too_many_skipped()
        tallies = world.gather_to_main(report.tally)
        metrics = self._metrics(report, tallies, figures) if world.is_main else {}
        if learner.algorithm.stateful:
            learner.remember(world.share(metrics), place, state.memory)
        if world.is_main:
            metrics["time/total"] = time.perf_counter() - began
            self.journal.record(metrics, report.heard, tallies)
            self.report_step(metrics)
        return too_many

    def _too_many_skipped(self) -> bool:
        """True if one kind of update, the policy's, the critic's or the interleaved updates', has failed too often in a row."""
        return max(self.state.skipped_in_a_row.values(), default=0) >= self.parts.config.stop.nonfinite_updates

    def _metrics(self, report: UpdateReport, tallies: Sequence[Tally], figures: dict) -> dict[str, float]:
        """A step's line, from what all ranks have added up."""
        found = {"step": self.state.step, **rollout_metrics(report.heard.trajectories), **step_metrics(report, tallies)}
        return found | {"skipped_updates": self.state.skipped, **figures}

    def _refresh_sampler(self) -> float:
        """Gives the sampler the trainer's weights if they have changed; returns the seconds it took."""
        if not self.sampler_is_stale:
            return 0.0
        began = time.perf_counter()
        if self.sampler_sleeps:
            self.parts.sampler.wake()
            self.sampler_sleeps = False
        self.parts.sampler.load_weights(self.parts.models.policy.named_weights())
        self.sampler_is_stale = False
        return time.perf_counter() - began

    def _sleep_sampler(self) -> None:
        """Lets the sampler free its GPU memory for the update, which makes its weights stale anyway."""
        if not self.sampler_sleeps:
            self.parts.sampler.sleep()
            self.sampler_sleeps = True

    def _evaluate(self) -> None:
        p = self.parts
        began = time.perf_counter()
        if p.config.eval.every < 0:
            return
        if p.world.share(p.world.is_main and p.folder.is_evaluated(self.state.step)):
            return  # by the run that this one continues, after the same update
        self._refresh_sampler()
        figures = evaluate(p.config, p.evaluation, self.responder, p.prompting.stop_token_ids, p.world)
        line = {"step": self.state.step, **figures, "time": time.perf_counter() - began}
        if p.config.eval.keep_best:
            # Before the line is there: an interruption in between leads to another evaluation, not to a missing model.
            self._keep_if_best(line)
        if p.world.is_main:
            p.folder.append("evaluations.jsonl", line)
            self.report_evaluation(line)

    def _note_signal(self, number: int, frame: Any) -> None:
        """The step in progress is finished and saved first; a second signal of the same kind ends the run at once."""
        self._signal = number
        signal.signal(number, signal.SIG_DFL)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
