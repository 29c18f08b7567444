"""One algorithm in training: it collects trajectories, updates the models, and carries its state between steps."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from upge.algorithm import Algorithm, InterleavedUpdate
from upge.data import Example
from upge.gradient_noise import gradient_noise, measured_terms
from upge.stateful import GRADIENT_NOISE, UTILITY_SLOPE, StatefulGate
from upge.train.collect import HELD_OUT, Collector
from upge.train.config import Behavior, OptimizerConfig
from upge.train.diagnostics import NO_DIAGNOSTICS, Diagnostics
from upge.train.engine import CriticEngine, Engine, FrozenPolicy, Teacher
from upge.train.lag import Weights
from upge.train.lr_schedule import LearningRates
from upge.train.metrics import UpdateReport
from upge.train.prompt_records import NO_DRIFT, Drift, PromptReader, Prompts, Visit, compared, drift, remember, visits
from upge.train.replay import ReplayBuffer
from upge.train.sample import Trajectory, assemble
from upge.train.update import Updater
from upge.train.verdicts import StepVerdicts

#: The name of the optimizer moments of interleaved updates.
_INTERLEAVED = "interleaved_update"
#: Half the distance between the two values of a gate's variable in the central difference of the loss.
_SHIFT = 0.04


@dataclass
class Memory:
    """What an algorithm carries from step to step.

    Attributes:
        variables: the current value of each stateful gate's variable, and of the signals that it tracks.
        remembered: indices of the training examples that wait for an interleaved update.
        prompts: what is remembered of each prompt; empty if the algorithm has no memory of prompts.
    """

    variables: dict[str, float] = field(default_factory=dict)
    remembered: list[int] = field(default_factory=list)
    prompts: Prompts = field(default_factory=Prompts)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Memory:
        """The memory, from its `dataclasses.asdict` in a checkpoint."""
        prompts = Prompts.restored(saved["prompts"]) if "prompts" in saved else Prompts()
        return cls(**{**saved, "prompts": prompts})


@dataclass(frozen=True)
class Models:
    """The policy, and the critic, the reference policy and the teacher if the algorithm needs them."""

    policy: Engine
    critic: CriticEngine | None = None
    reference: FrozenPolicy | None = None
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Collected:
    """What was collected for a step.

    Attributes:
        trajectories: those that the step learns from.
        held_out: trajectories of held-out prompts; None unless a gate needs them in this step.
        metrics: metrics of the collection.
        verdicts: the verdicts on all rollouts, held-out ones included.
        sampled: all rollouts except held-out ones, including those of prompts that were replaced.
    """

    trajectories: list[Trajectory]
    held_out: list[Trajectory] | None
    metrics: dict[str, float]
    verdicts: StepVerdicts
    sampled: Sequence[Trajectory] = ()


class Learner:
    """Collects and learns with one algorithm; the trainer decides when.

    Args:
        algorithm: the algorithm to learn with.
        models: the models that it updates and reads.
        config: the optimizer's settings.
        examples: the training set.
        collector_for: makes a collector for an algorithm; with True, some examples are reserved for its validation.
        poll: called on all ranks before each forward pass until the first optimizer step of a step; raises
            `Interrupted` on all ranks to abandon the step.
        replay: the buffer of the algorithm's `replay`; None without one.
        behavior: the policy whose log-probs are `behavior_logprobs` on stale and replayed rollouts.
        adapt: a function that is applied to each updater.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        models: Models,
        config: OptimizerConfig,
        examples: Sequence[Example],
        collector_for: Callable[[Algorithm, bool], Collector],
        poll: Callable[[], None] | None = None,
        replay: ReplayBuffer | None = None,
        behavior: Behavior = "sampling",
        adapt: Callable[[Updater], Updater] = lambda updater: updater,
    ) -> None:
        self.algorithm, self.models, self.examples = algorithm, models, examples
        self.replay, self.behavior = replay, behavior
        self.collector: Collector = collector_for(algorithm, algorithm.validation is not None)
        frozen: dict[str, Any] = {"reference": models.reference, "teacher": models.teacher}
        self.updater = adapt(Updater(models.policy, algorithm, config, models.critic, poll=poll, **frozen))
        once = dataclasses.replace(config, mini_batches=1, epochs=1)
        #: For gates that follow a validation objective: collect held-out trajectories and evaluate them.
        self.validation: tuple[Collector, Updater] | None = None
        if algorithm.validation is not None:
            updater = adapt(Updater(models.policy, algorithm.validation, once, **frozen))
            self.validation = collector_for(algorithm.validation, True), updater
        self.interleaved: Updater | None = None
        if algorithm.interleaved_update is not None:
            objective = algorithm.interleaved_update.algorithm
            self.interleaved = adapt(Updater(models.policy, objective, once, **frozen))

    @property
    def samples(self) -> bool:
        """True if a step needs the sampler."""
        return self.algorithm.needs.rollouts

    def memory(self) -> Memory:
        """The algorithm's state before its first step."""
        return Memory(self.algorithm.initial_state())

    def collect(self, step: int, step_in_stage: int, memory: Memory) -> Collected:
        """The trajectories of a step, the same on every rank.

        Prompts and seeds depend on `step`, the step of the run; gates and schedules depend on `step_in_stage`. Both
        numbers count from 0.
        """
        prompts = None
        if self.algorithm.memory is not None:
            prompts = PromptReader(self.algorithm.memory, memory.prompts, self.examples, step_in_stage)
        trajectories, metrics, verdicts, sampled = self.collector.collect(
            step, step_in_stage=step_in_stage, prompts=prompts, replay=self.replay
        )
        if self.validation is None or not self._slope_gates(step_in_stage):
            return Collected(trajectories, None, metrics, verdicts, sampled)
        held_out, more, of_held_out, _ = self.validation[0].collect(step, HELD_OUT)
        times = {name: metrics.get(name, 0.0) + more[name] for name in more if name.startswith("time/")}
        return Collected(trajectories, held_out, metrics | times, verdicts + of_held_out, sampled)

    def update(
        self,
        collected: Collected,
        step: int,
        rates: LearningRates,
        memory: Memory,
        diagnostics: Diagnostics = NO_DIAGNOSTICS,
        weights: Weights | None = None,
    ) -> tuple[UpdateReport, dict[str, float]]:
        """Make the step's updates, interleaved ones included.

        Args:
            collected, rates: the step's trajectories and learning rates.
            step: the step within the stage, from 0.
            memory: the algorithm's state. This method updates its tracked signals, the examples that wait for an
                interleaved update, and the records of the sampled prompts.
            diagnostics: what to measure in the first update.
            weights: the weights that the rollouts were sampled with; None = the current weights.

        Returns:
            The report of the updates, and the metrics of gates, memory, interleaved updates and replay.
        """
        if weights is not None:
            held_out = None if collected.held_out is None else self._as_sampled(collected.held_out, weights)
            own = self._as_sampled(collected.trajectories, weights)
            collected = dataclasses.replace(collected, trajectories=own, held_out=held_out)
        entering = [] if self.replay is None else self.replay.entering(collected.trajectories)
        kept = self._as_sampled(collected.trajectories, None, entering)
        metrics = {f"state/{name}": memory.variables[name] for name in self.algorithm.stateful}
        for gate in self._slope_gates(step):
            metrics[f"state/{gate.variable}_{UTILITY_SLOPE}"] = self._slope(gate, collected, step, rates, memory)
        measured = self._noise(collected, step)
        seen = visits(collected.sampled, self.examples) if self.algorithm.memory is not None else []
        moved = self._drift(seen, memory)
        report = self.updater.update(collected.trajectories, step, rates, memory.variables, diagnostics)
        memory.variables.update(self._tracked(measured, memory))
        # For the gates' own variables, record the values that this step used.
        metrics = {f"state/{name}": value for name, value in memory.variables.items()} | metrics
        if self.algorithm.memory is not None:
            metrics |= remember(self.algorithm.memory, memory.prompts, seen, step, moved)
        if self.replay is not None:
            self.replay.add(kept, entering, step)
            metrics |= self.replay.metrics(collected.trajectories, step)
        if self.interleaved is None or self.algorithm.interleaved_update is None:
            return report, metrics
        reports = self._interleave(
            self.algorithm.interleaved_update, self.interleaved, collected.trajectories, step, rates, memory
        )
        norms = [norm for one in reports for norm in one.grad_norms]
        skipped, above_limit = norms.count(math.inf), sum(one.above_limit for one in reports)
        metrics["interleaved_update/updates"] = float(len(norms) - skipped - above_limit)
        metrics["interleaved_update/updates_above_limit"] = float(above_limit)
        metrics["interleaved_update/remembered"] = float(len(memory.remembered))
        if norms:
            metrics["interleaved_update/grad_norm"] = norms[-1]
        return dataclasses.replace(report, interleaved_norms=norms, skipped=report.skipped + skipped), metrics

    def _as_sampled(
        self, trajectories: list[Trajectory], weights: Weights | None, rows: Sequence[int] | None = None
    ) -> list[Trajectory]:
        """The trajectories, with `behavior_logprobs` at `rows` from the policy with `weights`, which sampled them.

        By default `rows` are all fresh rollouts. With `behavior` = 'present' the trajectories are unchanged.
        """
        fresh = [row for row, one in enumerate(trajectories) if one.is_fresh] if rows is None else rows
        unknown = [row for row in fresh if trajectories[row].behavior_logprobs is None]
        if not unknown or self.behavior == "present":
            return trajectories
        return self.updater.filler.as_sampled(trajectories, unknown, weights)

    def remember(self, metrics: Mapping[str, float], step: int, memory: Memory) -> None:
        """Update the variables of stateful gates from the metrics of the step that has just ended.

        If one of its signals is missing or not finite, a variable keeps its value, because a single overflow must not
        move it to its bound.
        """
        for name, gate in self.algorithm.stateful.items():
            if not gate.due(step):
                continue
            own = {UTILITY_SLOPE, *GRADIENT_NOISE}
            names = {want: f"state/{name}_{want}" if want in own else want for want in gate.wants}
            signals = {want: metrics.get(metric, math.nan) for want, metric in names.items()}
            signals |= {"step": float(step + 1)} if "step" in gate.wants else {}
            missing = [names[want] for want, value in signals.items() if not math.isfinite(value)]
            if not missing:
                memory.variables[name] = gate.updated(memory.variables[name], signals)
            elif self.models.policy.world.is_main:
                warnings.warn(
                    f"step {step + 1}: the gate's variable '{name}' stays {memory.variables[name]:g}, because the "
                    f"metric '{missing[0]}' has no finite value in this step",
                    stacklevel=2,
                )

    def _drift(self, seen: Sequence[Visit], memory: Memory) -> Drift:
        """How far the policy has moved on the step's prompts before its updates; empty unless the memory needs it."""
        if self.algorithm.memory is None or not self.algorithm.memory.wants_drift:
            return NO_DRIFT
        return drift(seen, memory.prompts, self.updater.filler.current_logprobs(compared(seen, memory.prompts)))

    # Gates that follow a validation objective.

    def _slope_gates(self, step: int) -> list[StatefulGate]:
        """The gates that need the slope of the utility in this step."""
        return [g for g in self.algorithm.stateful.values() if UTILITY_SLOPE in g.wants and g.due(step)]

    def _slope(
        self, gate: StatefulGate, collected: Collected, step: int, rates: LearningRates, memory: Memory
    ) -> float:
        """The slope lr·⟨∇L_val, ∂∇L/∂variable⟩ of the utility -L_val; NaN if nothing is learned.

        This is the utility's gain from one plain gradient step, per unit of the variable. The derivative of the loss
        with respect to the variable is a central difference around its value, which is exact if the loss is affine or
        quadratic in it. It does not use the end points 0 and 1, where a gate may close and exclude trajectories.
        """
        if rates.policy is None:
            return math.nan
        assert self.validation is not None and collected.held_out is not None
        _, validation = self.validation
        batch, held_out = self.updater.fill(collected.trajectories, step), validation.fill(collected.held_out, step)
        value = memory.variables[gate.variable]
        states = [{**memory.variables, gate.variable: value + shift} for shift in (_SHIFT, -_SHIFT)]
        plans = [self.algorithm.plan(dataclasses.replace(batch.columns, state=state)) for state in states]
        validation_plan = validation.algorithm.plan(held_out.columns)
        if not bool(validation_plan.contributing.any()) or not any(bool(plan.contributing.any()) for plan in plans):
            return math.nan
        derivative = self.updater.gradient(batch, [(0.5 / _SHIFT, plans[0]), (-0.5 / _SHIFT, plans[1])])
        gradient = validation.gradient(held_out, [(1.0, validation_plan)])
        return rates.policy * self.models.policy.dot(gradient, derivative)

    # Gates that follow the gradients' noise.

    def _noise(self, collected: Collected, step: int) -> dict[str, dict[str, float]]:
        """Variable → the signals of `gradient_noise` before the update, for the gates that measure in this step."""
        measured: dict[str, dict[str, float]] = {}
        for name, gate in self.algorithm.stateful.items():
            if gate.wants & set(GRADIENT_NOISE) and gate.measured(step) and collected.trajectories:
                # Otherwise the log-probs of an earlier policy that trajectories carry would be taken for current ones.
                own = [dataclasses.replace(one, behavior_logprobs=None) for one in collected.trajectories]
                columns, logprobs = self.updater.fill(own, step).columns, self.updater.filler.current_logprobs(own)
                padded = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)
                batch = dataclasses.replace(columns, logprobs=padded)
                measured[name] = gradient_noise(*measured_terms(self.algorithm.terms, gate), batch)
        return measured

    def _tracked(self, measured: Mapping[str, Mapping[str, float]], memory: Memory) -> dict[str, float]:
        """The new values of the gates' signals, without those whose measurement is not finite."""
        return {
            f"{name}_{signal}": self.algorithm.stateful[name].tracked(memory.variables.get(f"{name}_{signal}"), value)
            for name, signals in measured.items()
            for signal, value in signals.items()
            if math.isfinite(value)
        }

    # Interleaved updates.

    def _interleave(
        self,
        settings: InterleavedUpdate,
        updater: Updater,
        trajectories: Sequence[Trajectory],
        step: int,
        rates: LearningRates,
        memory: Memory,
    ) -> list[UpdateReport]:
        """Remember prompts whose gate is open, and make the interleaved updates that are due.

        An update's prompts are forgotten even if the update is skipped because of its gradient norm.
        """
        reports: list[UpdateReport] = []
        batch = dataclasses.replace(assemble(trajectories, step), state=memory.variables)
        open_rows = (settings.gate(settings.gate.view(batch)) != 0).tolist()
        examples = {t.group: t.example for t, is_open in zip(trajectories, open_rows, strict=True) if is_open}
        memory.remembered += [example for example in examples.values() if self.examples[example].demonstrations]
        while rates.policy is not None and len(memory.remembered) >= settings.size:
            chosen, memory.remembered = memory.remembered[: settings.size], memory.remembered[settings.size :]
            if settings.own_optimizer:
                self.models.policy.use_optimizer(_INTERLEAVED)
            demonstrations = self.collector.demonstrations(chosen, step)
            reports.append(updater.update(demonstrations, step, LearningRates(rates.policy * settings.lr_factor)))
            if settings.own_optimizer:
                self.models.policy.use_optimizer("main")
        return reports
