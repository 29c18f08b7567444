"""One algorithm at work: its trajectories, its updates, and what it carries from step to step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from upge.algorithm import Algorithm
from upge.data import Example
from upge.plan import Plan
from upge.stateful import UTILITY_SLOPE, StatefulGate
from upge.train.collect import HELD_OUT, Collector
from upge.train.config import OptimizerConfig
from upge.train.critic import CriticEngine
from upge.train.engine import Engine
from upge.train.frozen import FrozenPolicy
from upge.train.rates import Rates
from upge.train.tally import UpdateReport
from upge.train.trajectory import Trajectory, assemble
from upge.train.update import Updater
from upge.train.witness import NOTHING, Watch

#: The name of the optimizer moments that belong to interleaved updates.
_INTERLUDE = "interleaved_update"
#: Half the distance of the two values between which the loss's derivative by a gate's variable is taken.
_SHIFT = 0.04


@dataclass
class Memory:
    """What an algorithm carries from step to step.

    Attributes:
        variables: the present value of each stateful gate.
        remembered: indices of the training examples that wait for an interleaved update.
    """

    variables: dict[str, float] = field(default_factory=dict)
    remembered: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Models:
    """The policy and what stands beside it, where the algorithm asks for it."""

    policy: Engine
    critic: CriticEngine | None = None
    frozen: FrozenPolicy | None = None


@dataclass(frozen=True)
class Collected:
    """A step's trajectories, those of held-out prompts if a gate asks for them, and the figures of both."""

    trajectories: list[Trajectory]
    held_out: list[Trajectory] | None
    figures: dict[str, float]


class Learner:
    """Collects and learns with one algorithm; the trainer decides when.

    Args:
        algorithm: what to learn with.
        models: policy, critic and frozen policy.
        config: the optimizer's.
        examples: the training set.
        collector_for: makes a collector for an algorithm; with True some examples are kept apart for its validation.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        models: Models,
        config: OptimizerConfig,
        examples: Sequence[Example],
        collector_for: Callable[[Algorithm, bool], Collector],
    ) -> None:
        self.algorithm, self.models, self.examples = algorithm, models, examples
        self.collector: Collector = collector_for(algorithm, algorithm.validation is not None)
        self.updater = Updater(models.policy, algorithm, config, models.critic, models.frozen)
        once = dataclasses.replace(config, mini_batches=1, epochs=1)
        self.held_out = self.aside = None
        if algorithm.validation is not None:
            validation = algorithm.validation
            updater = Updater(models.policy, validation, once, frozen=models.frozen)
            self.held_out = collector_for(validation, True), updater
        if algorithm.interleaved_update is not None:
            self.aside = Updater(models.policy, algorithm.interleaved_update.algorithm, once, frozen=models.frozen)

    @property
    def samples(self) -> bool:
        """True if a step needs the sampler."""
        return self.algorithm.needs.rollouts

    def memory(self) -> Memory:
        """What it carries before its first step."""
        return Memory(self.algorithm.initial_state())

    def collect(self, step: int, place: int) -> Collected:
        """The trajectories of a step of the run, the same on every rank; `place` is the step's within its stage. Both
        are counted from 0: prompts and seeds follow the run, gates and schedules the stage."""
        trajectories, figures = self.collector.collect(step)
        held_out = None
        if self._asking(place):
            held_out, more = self.held_out[0].collect(step, HELD_OUT)
            figures |= {name: figures.get(name, 0.0) + more[name] for name in more if name.startswith("time/")}
        return Collected(trajectories, held_out, figures)

    def update(
        self, collected: Collected, step: int, rates: Rates, memory: Memory, watch: Watch = NOTHING
    ) -> tuple[UpdateReport, dict]:
        """The step's updates; the report and the figures of everything else that was done."""
        figures = {f"state/{name}": value for name, value in memory.variables.items()}
        for gate in self._asking(step):
            slope = self._slope(gate, collected, step, rates, memory)
            figures[f"state/{gate.variable}_{UTILITY_SLOPE}"] = slope
        report = self.updater.update(collected.trajectories, step, rates, memory.variables, watch)
        if self.algorithm.interleaved_update is not None:
            norms, above_limit = self._interleaved_update(collected.trajectories, step, rates, memory)
            figures |= {"interleaved_update/updates": float(len(norms) - norms.count(float("inf")) - above_limit)}
            figures |= {"interleaved_update/updates_above_limit": float(above_limit)}
            figures |= {"interleaved_update/remembered": float(len(memory.remembered))}
            figures |= {"interleaved_update/grad_norm": norms[-1]} if norms else {}
            skipped = report.skipped + norms.count(float("inf"))
            report = dataclasses.replace(report, interleaved_norms=norms, skipped=skipped)
        return report, figures

    def remember(self, figures: Mapping[str, float], step: int, memory: Memory) -> None:
        """Moves the variables on, from the figures of the step that has just ended. A variable one of whose signals is
        missing or not finite stays as it is: a single overflow must not throw it to its bound."""
        for name, gate in self.algorithm.stateful.items():
            if not gate.due(step):
                continue
            names = {want: f"state/{name}_{want}" if want == UTILITY_SLOPE else want for want in gate.wants}
            signals = {want: figures.get(figure, math.nan) for want, figure in names.items()}
            lacking = [names[want] for want, value in signals.items() if not math.isfinite(value)]
            if not lacking:
                memory.variables[name] = gate.updated(memory.variables[name], signals)
            elif self.models.policy.world.is_main:
                warnings.warn(
                    f"step {step + 1}: the gate's variable '{name}' stays {memory.variables[name]:g}, because the "
                    f"figure '{lacking[0]}' has no finite value in this step (names are those of docs/metrics.md)",
                    stacklevel=2,
                )

    # Gates that follow a held-out objective.

    def _asking(self, step: int) -> list[StatefulGate]:
        return [g for g in self.algorithm.stateful.values() if UTILITY_SLOPE in g.wants and g.due(step)]

    def _slope(self, gate: StatefulGate, collected: Collected, step: int, rates: Rates, memory: Memory) -> float:
        """lr·⟨∇L_val, ∂∇L/∂variable⟩: what the utility -L_val gains by the variable through one plain gradient step;
        NaN where nothing is learned.

        The derivative of the loss by the variable is a central difference around its value, exact where the loss is
        affine or quadratic in it. Not between 0 and 1: there a gate may close, and who counts would change.
        """
        if rates.policy is None:
            return math.nan
        updater = self.held_out[1]
        batch, held_out = self.updater.fill(collected.trajectories, step), updater.fill(collected.held_out, step)
        value = memory.variables[gate.variable]
        at = [{**memory.variables, gate.variable: value + shift} for shift in (_SHIFT, -_SHIFT)]
        plans = [self.algorithm.plan(dataclasses.replace(batch.columns, state=state)) for state in at]
        plan: Plan = updater.algorithm.plan(held_out.columns)
        if not bool(plan.contributing.any()) or not any(bool(p.contributing.any()) for p in plans):
            return math.nan
        own = self.updater.gradient(batch, [(0.5 / _SHIFT, plans[0]), (-0.5 / _SHIFT, plans[1])])
        return rates.policy * self.models.policy.dot(updater.gradient(held_out, [(1.0, plan)]), own)

    # Interleaved updates.

    def _interleaved_update(
        self, trajectories: Sequence[Trajectory], step: int, rates: Rates, memory: Memory
    ) -> tuple[list[float], int]:
        """Remembers prompts, and makes the updates that are due; the norm of each, infinite for one that was not
        finite, and how many were left out for their norm, whose prompts are forgotten all the same."""
        interleaved_update, norms, above_limit = self.algorithm.interleaved_update, [], 0
        batch = dataclasses.replace(assemble(trajectories, step), state=memory.variables)
        open_rows = (interleaved_update.gate(interleaved_update.gate.view(batch)) != 0).tolist()
        prompts = {t.group: t.example for t, is_open in zip(trajectories, open_rows, strict=True) if is_open}
        memory.remembered += [e for e in prompts.values() if self.examples[e].demonstrations]
        while rates.policy is not None and len(memory.remembered) >= interleaved_update.size:
            chosen, memory.remembered = (
                memory.remembered[: interleaved_update.size],
                memory.remembered[interleaved_update.size :],
            )
            if interleaved_update.own_optimizer:
                self.models.policy.use_optimizer(_INTERLUDE)
            demonstrations = self.collector.demonstrations(chosen, step)
            report = self.aside.update(demonstrations, step, Rates(rates.policy * interleaved_update.lr_factor))
            if interleaved_update.own_optimizer:
                self.models.policy.use_optimizer("main")
            norms += report.grad_norms
            above_limit += report.above_limit
        return norms, above_limit
