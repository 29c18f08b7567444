"""The training loop: collect, update, refresh the sampler, measure, save."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upge.algorithm import Algorithm
from upge.data import Example
from upge.rollout import Sampler
from upge.train.collect import Collector, Trajectory, decode, stream_seed
from upge.train.config import OptimizerConfig, RunConfig
from upge.train.distributed import World
from upge.train.engine import Engine
from upge.train.evaluate import evaluate
from upge.train.folder import RunFolder
from upge.train.update import Updater, step_metrics
from upge.trajectories import SUCCESS_REWARD
from upge.verify import VerifierPool

#: Exit codes of a run.
DONE, BAD_INPUT, NOT_FINITE = 0, 2, 3


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizer. All randomness follows from the seed and the step."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Parts:
    """What a run is made of; each is usable alone."""

    config: RunConfig
    algorithm: Algorithm
    train: Sequence[Example]
    evaluation: Sequence[Example]
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    engine: Engine
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
        p = parts
        self.collector = Collector(
            p.config, p.algorithm, p.train, p.sampler, p.pool, p.tokenizer, p.stop_token_ids, p.world
        )
        self.updater = Updater(p.engine, p.algorithm, p.config.optimizer)
        self.state = State()
        self.sampler_is_stale = True
        self.sampler_sleeps = False
        self.saved_step: int | None = None
        self._signal = 0

    def restore(self, step: int) -> None:
        """Continues from the checkpoint of `step`. A run that was stopped for non-finite updates gets a new chance."""
        folder = self.parts.folder
        self.state = State(**self.parts.engine.load(folder.checkpoints, folder.tag(step)))
        self.saved_step = step
        if self.state.skipped_in_a_row >= self.parts.config.stop.nonfinite_updates:
            self.state.skipped_in_a_row = 0

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
            if _due(step, config.evaluation.every) and not last:
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
        self.parts.engine.export(folder.final_partial)
        if world.is_main:
            self.parts.tokenizer.save_pretrained(folder.final_partial)
            folder.finish(self.state.step)

    def save(self) -> None:
        """A checkpoint of the present state; a half-written one never counts."""
        folder, step = self.parts.folder, self.state.step
        if step == self.saved_step:
            return
        self.saved_step = step
        self.parts.engine.save(folder.checkpoints, f"{folder.tag(step)}.partial", vars(self.state))
        self.parts.world.barrier()
        if self.parts.world.is_main:
            folder.settle(step, self.parts.config.checkpoint.keep)
        self.parts.world.barrier()

    def _step(self) -> bool:
        """One step; True if too many updates in a row were not finite."""
        config, world, state = self.parts.config, self.parts.world, self.state
        began = time.perf_counter()
        torch.manual_seed(stream_seed(config.seed, "step", state.step, world.rank))
        sync = self._refresh_sampler() if self.collector.needs.rollouts else 0.0
        trajectories, times = self.collector.collect(state.step)
        self._sleep_sampler()
        lr = learning_rate(config.optimizer, state.step, config.steps)
        start = time.perf_counter()
        report = self.updater.update(trajectories, state.step, lr)
        times["time/train"] = time.perf_counter() - start
        self.sampler_is_stale = True
        state.step += 1
        state.skipped += report.skipped
        for norm in report.grad_norms:
            state.skipped_in_a_row = 0 if math.isfinite(norm) else state.skipped_in_a_row + 1
        too_many = report.skipped > 0 and state.skipped_in_a_row >= config.stop.nonfinite_updates
        tallies = world.gather_to_main(report.tally)
        if not world.is_main:
            return too_many
        metrics = {"step": state.step, **rollout_metrics(trajectories), **step_metrics(report, tallies)}
        metrics |= {"learning_rate": lr, "skipped_updates": state.skipped, **times, "time/sync": sync}
        metrics["time/total"] = time.perf_counter() - began
        self.parts.folder.append("metrics.jsonl", metrics)
        if config.log_rollouts and (state.step % config.log_rollouts == 0 or state.step in (1, config.steps)):
            self.parts.folder.write_rollouts(state.step, self._rows(trajectories))
        self.report_step(metrics)
        return too_many

    def _refresh_sampler(self) -> float:
        """Gives the sampler the trainer's weights if they have changed; returns the seconds it took."""
        if not self.sampler_is_stale:
            return 0.0
        began = time.perf_counter()
        if self.sampler_sleeps:
            self.parts.sampler.wake()
            self.sampler_sleeps = False
        self.parts.sampler.load_weights(self.parts.engine.named_weights())
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
        if p.world.share(p.world.is_main and p.folder.is_evaluated(self.state.step)):
            return  # by the run that this one continues, after the same update
        self._refresh_sampler()
        figures = evaluate(p.config, p.evaluation, p.sampler, p.pool, p.tokenizer, p.stop_token_ids, p.world)
        if p.world.is_main:
            line = {"step": self.state.step, **figures, "time": time.perf_counter() - began}
            p.folder.append("evaluations.jsonl", line)
            self.report_evaluation(line)

    def _rows(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
        texts = decode(self.parts.tokenizer, [t.response_ids for t in trajectories])
        found = []
        for trajectory, text in zip(trajectories, texts, strict=True):
            problem = self.parts.train[trajectory.example].problem
            found.append(
                {
                    "prompt": problem.prompt,
                    "response": text,
                    "answer": problem.answer,
                    "reward": trajectory.reward,
                    "level": problem.level,
                    "status": trajectory.status,
                    "is_demonstration": trajectory.is_demonstration,
                    "group": trajectory.group,
                    "tokens": len(trajectory.response_ids),
                    "finished": trajectory.finished,
                }
            )
        return found

    def _note_signal(self, number: int, frame: Any) -> None:
        """The step in progress is finished and saved first; a second signal of the same kind ends the run at once."""
        self._signal = number
        signal.signal(number, signal.SIG_DFL)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (counted from 0): linear warm-up, then constant or falling to 0 at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * ((1 - share) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Figures of a step's rollouts, all of them, whether they reached the model or not; empty without rollouts.

    `entropy` is the mean of -log π over sampled tokens as the sampler reports them: at temperature 1 an unbiased
    estimate of the policy's token entropy (nats) on its own responses.
    """
    rollouts = [t for t in trajectories if not t.is_demonstration]
    if not rollouts:
        return {}
    n = len(rollouts)
    solved: dict[int, bool] = {}
    for t in rollouts:
        solved[t.group] = solved.get(t.group, False) or t.reward > SUCCESS_REWARD
    tokens = sum(len(t.response_ids) for t in rollouts)
    return {
        "reward/mean": sum(t.reward for t in rollouts) / n,
        "pass_rate": sum(t.reward > SUCCESS_REWARD for t in rollouts) / n,
        "prompts_solved": sum(solved.values()) / len(solved),
        "entropy": -sum(sum(t.sampler_logprobs) for t in rollouts) / max(tokens, 1),
        "response_length": tokens / n,
        "response_cut_share": sum(not t.finished for t in rollouts) / n,
        "verify/timeouts": sum(t.status == "timeout" for t in rollouts),
        "verify/errors": sum(t.status == "error" for t in rollouts),
    }
