"""The training loop: collect, update, refresh the sampler, evaluate, save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from upge.errors import EngineError, Interrupted, NonFiniteError, StorageError
from upge.pipeline import Pipeline, Span
from upge.train.alarms import AlarmMonitor
from upge.train.checkpoint import check as check_checkpoint
from upge.train.checkpoint import seal
from upge.train.engine import WeightSync
from upge.train.files import disk_errors, read_lines
from upge.train.given import demonstration_metrics
from upge.train.lag import EarlierWeights, Weights
from upge.train.learner import Collected, Learner, Memory
from upge.train.lr_schedule import learning_rates
from upge.train.metrics import (
    Recorder,
    nonfinite,
    rollout_metrics,
    step_metrics,
)
from upge.train.parts import Parts, State, learner_of
from upge.train.prompt_order import stream_seed
from upge.train.replay import ReplayBuffer
from upge.train.sample import TokenIds
from upge.train.stopping import BAD_INPUT, DONE, FAILED, NOT_FINITE, Ending
from upge.verify.base import VerifierError

_T = TypeVar("_T")
#: The critic's folder within a checkpoint, because DeepSpeed would give its files the same names as the policy's.
_CRITIC = "critic"


class Trainer:
    """Runs the steps of a run and writes its folder.

    Args:
        parts: the parts of the run.
        report_step: called on the main rank with the metrics of each step.
        report_evaluation: called on the main rank with each evaluation.
        report_note: called on the main rank with a message about something unusual.
        report_alarm: called on the main rank with the text of each alarm.
    """

    def __init__(
        self,
        parts: Parts,
        report_step: Callable[[dict[str, float]], None] = lambda metrics: None,
        report_evaluation: Callable[[dict[str, Any]], None] = lambda line: None,
        report_note: Callable[[str], None] = lambda text: None,
        report_alarm: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.parts, self.report_step, self.report_evaluation = parts, report_step, report_evaluation
        self.report_note, self.report_alarm = report_note, report_alarm
        self._stopping_alarms: list[str] = []
        self.spans = [s for s in Pipeline.of(parts.algorithm).spans(parts.config.steps) if s.end > s.first]
        self.recorder = Recorder(parts.config, parts.train, parts.prompting, parts.folder)
        self.learners = [learner_of(parts, span, self._check_stop) for span in self.spans]
        self.sync = WeightSync(parts.sampler.engine, parts.models.policy)
        lag = parts.config.rollout.lag if parts.algorithm.needs.rollouts else 0
        self.earlier = EarlierWeights(parts.models.policy, lag) if lag else None
        self.state = State()
        self.alarms = AlarmMonitor(parts.config.alarms, parts.config.steps)
        self.saved_step: int | None = None
        self._has_restarted = False
        #: The shortest trajectory of the last step.
        self._probe: TokenIds | None = None

    def restore(self, step: int) -> None:
        """Continue from the checkpoint of `step`, which any number of ranks may have written.

        If the run was stopped because of non-finite updates, their count starts again at 0.

        Raises:
            ModelError: the checkpoint is damaged; the message names the newest earlier one that is whole.
        """
        folder, models = self.parts.folder, self.parts.models
        check_checkpoint(folder, step, self.parts.world)
        saved = dict(models.policy.load(folder.checkpoints, folder.tag(step)))
        memory = saved.pop("memory")
        self.state = State(**saved, memory=None if memory is None else Memory.restored(memory))
        if models.critic is not None:
            models.critic.load(folder.checkpoints / folder.tag(step), _CRITIC)
        for one in self._remembering(step):
            one.load(folder.checkpoints / folder.tag(step))
        self.saved_step = step
        self.alarms = self._alarms(step)
        if self._too_many_skipped():
            self.state.skipped_in_a_row = {}

    def _remembering(self, step: int) -> list[EarlierWeights | ReplayBuffer]:
        """What a checkpoint of `step` holds in separate files: earlier weights, the replay buffer of the stage."""
        of_stages = zip(self.spans, self.learners, strict=True)
        learners = [learner for span, learner in of_stages if step < span.end] or self.learners[-1:]
        return [one for one in (self.earlier, *(learner.replay for learner in learners[:1])) if one is not None]

    def run(self) -> Ending:
        """Train to the last step, or until stopped; return how the run ended."""
        try:
            return self._run()
        except NonFiniteError as error:
            # Nothing is saved, because the state may be damaged and its checkpoint could replace a good one.
            kept = "no checkpoint" if self.saved_step is None else f"the checkpoint of step {self.saved_step}"
            return Ending(
                NOT_FINITE, f"stopped after step {self.state.step}: {error}; the state is not saved; there is {kept}"
            )

    def _run(self) -> Ending:
        """As `run`.

        Raises:
            NonFiniteError: a sampler's log-prob, a weight or a metric is not finite.
        """
        try:
            ending = self._train()
        except Interrupted:
            number = self._stop_signal()
            self.save()
            return Ending(128 + number, f"stopped by signal {number}; the state is saved")
        except VerifierError as error:
            self.save()
            return Ending(BAD_INPUT, f"{error}; the state before the step is saved")
        except EngineError as error:
            self.save()
            return Ending(FAILED, f"stopped: {error} again after a restart; the state is saved")
        if ending.code == DONE:
            self._export(self.parts.folder.final_partial)
            with self.parts.world.together():
                if self.parts.world.is_main:
                    self.parts.folder.finish(self.state.step)
        return ending

    def _train(self) -> Ending:
        """Run the remaining steps, with their evaluations and checkpoints.

        Raises:
            Interrupted: a rank has received a signal.
            EngineError: the sampler's engine has failed twice.
            VerifierError: verifiers cannot run, or fail too often.
        """
        config, every = self.parts.config, self.parts.config.checkpoint.every
        # This may be an evaluation that was interrupted.
        if self._is_evaluation_due():
            self._evaluate()
        while self.state.step < config.steps:
            self._check_stop()
            too_many = self._step()
            step, last = self.state.step, self.state.step == config.steps
            if not last and self._is_evaluation_due():
                self._evaluate()
            reason = ""
            if too_many:
                reason = "stopped after too many non-finite updates in a row (stop.nonfinite_updates)"
            elif self._stopping_alarms:
                reason = f"stopped by the alarm {', '.join(self._stopping_alarms)} (stop.alarms)"
            if reason or (every and (last or _due(step, every))):
                self.save()
            if reason:
                return Ending(NOT_FINITE, f"{reason}; the state is saved")
        self._evaluate()
        self._check_stop()
        return Ending(DONE, "done")

    def _is_evaluation_due(self) -> bool:
        step = self.state.step
        return step == 0 or _due(step, self.parts.config.eval.every) or any(step == span.end for span in self.spans)

    def _stop_signal(self) -> int:
        """A signal that some rank has received, or 0; the same on every rank."""
        return max(self.parts.world.gather(self.parts.stop.number))

    def _check_stop(self) -> None:
        """Raise Interrupted on all ranks if one of them has received a signal."""
        if self._stop_signal():
            raise Interrupted("stopped by a signal")

    def _check_policy(self) -> None:
        """Compute the log-probs of one trajectory, so that a broken policy never replaces a good one on the disk.

        Weights can be finite but too large for the model. `_step` checks the weights themselves.

        Raises:
            NonFiniteError: on all ranks, if the log-probs on some rank are not finite.
        """
        if self._probe is None:
            return
        policy = self.parts.models.policy
        with torch.no_grad():
            logprobs, _ = policy.logprobs(policy.pack([self._probe]))
        finite = bool(logprobs.isfinite().all())
        self._check_finite("" if finite else "the policy's log-probs of its last trajectories are not finite")

    def _check_finite(self, problem: str) -> None:
        """Raise NonFiniteError on all ranks if `problem` is not empty on one of them."""
        found = next(filter(None, self.parts.world.gather(problem)), None)
        if found is not None:
            raise NonFiniteError(found)

    def _sampling(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which samples on all ranks. Once per run, an engine that fails is restarted."""
        try:
            return work()
        except EngineError as error:
            if self._has_restarted:
                raise
            self._has_restarted = True
            if self.parts.world.is_main:
                self.report_note(f"{error}; it is restarted with the same weights")
        self.sync.restart()
        return work()

    def _export(self, folder: Path) -> None:
        """Write model and tokenizer."""
        self._check_policy()
        self.parts.models.policy.export(folder)
        with self.parts.world.together(), disk_errors(folder):
            if self.parts.world.is_main:
                self.parts.prompting.tokenizer.save_pretrained(folder)
                self.parts.fault.mark(folder)

    def _keep_if_best(self, line: dict[str, Any]) -> None:
        """Write the weights to best/ if the evaluation `line` is the best so far."""
        folder, world = self.parts.folder, self.parts.world
        if world.broadcast(world.is_main and folder.is_best(line)):
            self._export(folder.best_partial)
            with world.together():
                if world.is_main:
                    folder.settle_best(line)

    def save(self) -> None:
        """Save a checkpoint of the current state, unless there is one.

        It is written under a temporary name and renamed when complete, so that an incomplete one is never read.

        Raises:
            StorageError: the disk has no room for it, or a file cannot be written; all ranks raise it.
        """
        folder, models, world, step = self.parts.folder, self.parts.models, self.parts.world, self.state.step
        if step == self.saved_step:
            return
        self._check_policy()
        trained = [models.policy] if models.critic is None else [models.policy, models.critic]
        own = sum(model.checkpoint_bytes for model in trained) + (self.earlier.bytes if self.earlier else 0)
        needed = sum(world.gather(own))
        with world.together():
            if world.is_main:
                folder.make_room(step, needed, self.parts.config.checkpoint.keep)
        partial = f"{folder.tag(step)}.partial"
        try:
            models.policy.save(folder.checkpoints, partial, asdict(self.state))
            if models.critic is not None:
                models.critic.save(folder.checkpoints / partial, _CRITIC, {})
            for one in self._remembering(step):
                one.save(folder.checkpoints / partial, step)
            seal(folder.checkpoints / partial, step, world)
        except StorageError:
            shutil.rmtree(folder.checkpoints / partial, ignore_errors=True)
            raise
        with world.together():
            if world.is_main:
                folder.settle(step, self.parts.config.checkpoint.keep)
        self.saved_step = step

    def _enter_stage(self, span: Span, learner: Learner) -> Memory:
        """Reset the optimizers and return the memory for a stage's first step. Only weights carry over."""
        if span.first > 0:
            self.parts.models.policy.reset_optimizer(everything=True)
            if self.parts.models.critic is not None:
                self.parts.models.critic.reset_optimizer(everything=True)
        return learner.memory()

    def _step(self) -> bool:
        """Run one step; True if too many updates in a row were not finite."""
        config, world, state = self.parts.config, self.parts.world, self.state
        stage = next(i for i, span in enumerate(self.spans) if state.step < span.end)
        span, learner = self.spans[stage], self.learners[stage]
        began = time.perf_counter()
        torch.manual_seed(stream_seed(config.seed, "step", state.step, world.rank))
        step_in_stage, memory = state.step - span.first, state.memory
        if memory is None or step_in_stage == 0:
            memory = state.memory = self._enter_stage(span, learner)
        noise, weights = config.rollout.noise, self._sampler_weights()
        sync_seconds = self.sync.refresh(weights, noise.weight_bits) if learner.samples else 0.0
        collected = self._sampling(lambda: learner.collect(state.step, step_in_stage, memory))
        self._check_stop()
        self.sync.sleep()
        self._check_verdicts(collected)
        rates, diagnostics = learning_rates(config, span, state.step), self.recorder.diagnostics(state.step + 1)
        start = time.perf_counter()
        report, more = learner.update(collected, step_in_stage, rates, memory, diagnostics, weights)
        times = {"time/train": time.perf_counter() - start, "time/sync": sync_seconds}
        extra = more | collected.metrics | times | {"learning_rate": rates.policy or 0.0} | self.parts.fault.metrics()
        extra |= noise.metrics() if learner.samples else {}
        if len(self.spans) > 1:
            extra["stage"] = stage + 1
        state.step += 1
        state.count_skipped(report)
        self._probe = min(
            (t.ids for t in collected.trajectories), key=lambda ids: len(ids[0]) + len(ids[1]), default=None
        )
        of_ranks = world.gather_to_main((report.sums, report.tops))
        metrics: dict[str, float] = {}
        if world.is_main:
            metrics = {"step": state.step, **rollout_metrics(report.active.trajectories)}
            metrics |= collected.verdicts.metrics()
            metrics |= step_metrics(report, [sums for sums, _ in of_ranks])
            metrics |= {"skipped_updates": state.skipped, **extra}
            if learner.algorithm.step_needs.data_demonstrations:
                metrics |= demonstration_metrics(
                    report.active.trajectories, self.parts.train, self.parts.prompting.stop_token_ids
                )
        if learner.algorithm.stateful:
            learner.remember(world.broadcast(metrics), step_in_stage, memory)
        with world.together():
            if world.is_main:
                metrics["time/total"] = time.perf_counter() - began
                tops = [top for _, tops in of_ranks for top in tops]
                self.recorder.record(metrics, report.active, tops, collected.verdicts.failed)
                self.report_step(metrics)
        self._check_finite(nonfinite(metrics, report) or self._weights_problem())
        self._raise_alarms(metrics)
        return report.skipped > 0 and self._too_many_skipped()

    def _sampler_weights(self) -> Weights | None:
        """The weights that this step samples with; None = the current weights."""
        if self.earlier is None:
            return None
        self.earlier.remember(self.state.step)
        return self.earlier.of_sampler(self.state.step)

    def _weights_problem(self) -> str:
        """Name a model whose weights are not finite on this rank; empty if all are finite."""
        models = {"policy": self.parts.models.policy, "critic": self.parts.models.critic}
        ruined = [name for name, model in models.items() if model is not None and not model.is_finite()]
        return f"the weights of the {ruined[0]} are not finite after the update" if ruined else ""

    def _check_verdicts(self, collected: Collected) -> None:
        """Report and record failed verdicts of the step in progress; raise VerifierError if there are too many."""
        p, step, verdicts = self.parts, self.state.step + 1, collected.verdicts
        with p.world.together():
            if p.world.is_main:
                p.sampler.first_error(verdicts.first_error)
                self.recorder.record_failed(step, collected.trajectories, verdicts.failed)
            verdicts.check(p.config.stop.verifier_errors, step)

    def _alarms(self, step: int) -> AlarmMonitor:
        """The alarms of this run, with the recorded metrics and alarms of the steps up to `step`."""
        before = []
        for file in (self.parts.folder.path / name for name in ("metrics.jsonl", "alarms.jsonl")):
            lines = read_lines(file) if file.is_file() else []
            before.append([line for line in lines if line["step"] <= step])
        config = self.parts.config
        return AlarmMonitor(config.alarms, config.steps, before[0], [line["alarm"] for line in before[1]])

    def _raise_alarms(self, metrics: Mapping[str, float]) -> None:
        """Report a step's new alarms. Those of `stop.alarms` stop the run, on all ranks."""
        world = self.parts.world
        new = self.alarms.step(metrics) if world.is_main else {}
        with world.together():
            for name, problem in new.items():
                self.parts.folder.append("alarms.jsonl", {"step": self.state.step, "alarm": name, "problem": problem})
                self.report_alarm(problem)
        if stopping := self.parts.config.stop.alarms:
            self._stopping_alarms = world.broadcast([name for name in new if name in stopping])

    def _too_many_skipped(self) -> bool:
        """True if one kind of update (policy, critic or interleaved) has failed too often in a row."""
        return self.state.most_skipped_in_a_row >= self.parts.config.stop.nonfinite_updates

    def _evaluate(self) -> None:
        p = self.parts
        began = time.perf_counter()
        if p.config.eval.every < 0:
            return
        if p.world.broadcast(p.world.is_main and p.folder.is_evaluated(self.state.step)):
            return  # the run that this one continues has evaluated it after the same update
        self.sync.refresh()
        line = {"step": self.state.step, **self._sampling(p.evaluate), "time": time.perf_counter() - began}
        if p.config.eval.keep_best:
            # Before the line is written, so that after an interruption the evaluation is repeated and no model is lost.
            self._keep_if_best(line)
        with p.world.together():
            if p.world.is_main:
                p.folder.append("evaluations.jsonl", line)
                self.report_evaluation(line)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
