"""The updates of a step: fill columns, plan on the whole batch, run micro-batches, step the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from upge.algorithm import Algorithm
from upge.candidates import Places
from upge.components.base import Precomputed
from upge.errors import Interrupted
from upge.estimate import Estimate
from upge.plan import Plan
from upge.train.config import OptimizerConfig
from upge.train.critic import CriticTarget, CriticUpdater, value_metrics
from upge.train.deepspeed_module import StepResult
from upge.train.diagnostics import (
    NO_DIAGNOSTICS,
    Diagnostics,
    TopTrajectory,
    term_gradient_metrics,
    token_weights,
    top_trajectories,
)
from upge.train.engine import CriticEngine, Engine, FrozenPolicy, Teacher
from upge.train.lr_schedule import LearningRates
from upge.train.metrics import ActiveTrajectories, MetricSums, UpdateReport
from upge.train.micro_batches import EstimatesOf, MicroBatch, naming_size
from upge.train.off_policy import OffPolicySums
from upge.train.sample import Trajectory, assemble
from upge.train.step_batch import BatchFiller, RowValues, StepBatch, update_rows
from upge.trajectories import Trajectories
from upge.views import PackedTokens


@dataclass(frozen=True)
class Update:
    """One of a step's updates.

    Attributes:
        batch: the trajectories that the update learns from, with all columns that the plan reads.
        plan: the plan of these trajectories.
        rows: their rows in the step's batch.
        critic_target: the critic's target; None without a critic.
    """

    batch: StepBatch
    plan: Plan
    rows: Int[Tensor, "b"]
    critic_target: CriticTarget | None = None

    @property
    def trains_policy(self) -> bool:
        """True if some trajectory can contribute to the policy's gradient."""
        return bool(self.plan.contributing.any())

    @property
    def has_rollouts(self) -> bool:
        """True if some rollout can contribute to the policy's gradient."""
        return bool((self.plan.contributing & ~self.batch.columns.is_demonstration).any())


class ForwardPass(NamedTuple):
    """A micro-batch of this rank with the results of its forward pass."""

    rows: list[int]
    micro_batch: MicroBatch
    tokens: PackedTokens


@dataclass(frozen=True)
class PolicyPasses:
    """The results of one policy update's micro-batches on this rank.

    Attributes:
        plan: the plan with all parts evaluated.
        sums: the sums of each micro-batch or chunk.
        logprobs: log-probs of the trajectories that contribute to the update's original plan.
        tops: the trajectories with the largest token weights, if requested.
    """

    plan: Plan
    sums: list[MetricSums]
    logprobs: list[RowValues]
    tops: list[TopTrajectory]


class Updater:
    """Runs the updates of a step. It uses an algorithm's plan and estimates, whichever algorithm it is.

    Args:
        engine: the policy.
        algorithm, config: the algorithm to learn with, and the optimizer's settings.
        critic, reference, teacher: the other models; None if the algorithm does not need them.
        poll: called on all ranks before each forward pass until the first optimizer step of a step; raises
            `Interrupted` on all ranks to abandon the step.
    """

    def __init__(
        self,
        engine: Engine,
        algorithm: Algorithm,
        config: OptimizerConfig,
        critic: CriticEngine | None = None,
        reference: FrozenPolicy | None = None,
        poll: Callable[[], None] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.engine, self.algorithm, self.config, self.poll = engine, algorithm, config, poll
        self.filler = BatchFiller(engine, algorithm, config, critic, reference, poll, teacher)
        self.critic = None
        if critic is not None and algorithm.critic is not None:
            self.critic = CriticUpdater(critic, algorithm.critic, self.filler)

    def update(
        self,
        trajectories: Sequence[Trajectory],
        step: int,
        rates: LearningRates,
        state: Mapping[str, float] | None = None,
        diagnostics: Diagnostics = NO_DIAGNOSTICS,
    ) -> UpdateReport:
        """Make all updates of a step; every rank passes the same trajectories.

        Args:
            trajectories: the step's trajectories.
            step: the step within the stage, from 0.
            rates: the learning rates; if the policy has none, only the critic learns.
            state: the value of each stateful gate's variable.
            diagnostics: what to measure in the first update of the policy.

        Raises:
            Interrupted: `poll` raised it, before anything has changed.
        """
        batch = self.fill(trajectories, step, state)
        updates = self.plan(batch, rates)
        first = next((update for update in updates if update.trains_policy), None)
        compares = rates.policy is not None and first is not None and first.has_rollouts
        sums = [] if compares else self._probe(batch)
        metrics = _coefficients(updates)
        if self.critic is not None:
            targets = [update.critic_target for update in updates if update.critic_target is not None]
            metrics |= value_metrics(targets, [update.batch.columns.response_mask for update in updates])
        tops: list[TopTrajectory] = []
        steps, critic_steps = list[StepResult](), list[StepResult]()
        plans = [update.plan for update in updates]
        for number in [*range(len(updates))] * self.config.epochs:
            update, is_first = updates[number], not steps
            poll = None if steps or critic_steps else self.poll
            if rates.policy is not None and update.trains_policy:
                if is_first:
                    metrics |= self._diagnosed(update, diagnostics)
                passes = self.run_micro_batches(update, len(steps) + 1, is_first and diagnostics.top_tokens, poll)
                sums, tops, plans[number] = sums + passes.sums, tops + passes.tops, passes.plan
                if is_first and self.config.epochs > 1:
                    updates[number] = replace(update, batch=self.filler.with_behavior(update.batch, passes.logprobs))
                if bool(passes.plan.contributing.any()):
                    steps.append(self.engine.step(rates.policy, self.config.skip_grad_norm))
            if self.critic is not None and update.critic_target is not None and update.critic_target.rows:
                poll = None if steps else poll
                more, result = self.critic.update(update.batch, update.critic_target, rates.critic, poll)
                sums = sums + more
                critic_steps.append(result)
        if compares and not steps:  # parts of reach 'batch' have left nothing to learn from
            sums = sums + self._probe(batch)
        norms, critic_norms = ([result.norm for result in some] for some in (steps, critic_steps))
        return UpdateReport(
            grad_norms=norms,
            skipped=[*norms, *critic_norms].count(float("inf")),
            above_limit=sum(result.is_above_limit for result in steps),
            active=ActiveTrajectories.of(batch.trajectories, [u.rows for u in updates], plans),
            sums=MetricSums.total(sums),
            tops=tops,
            metrics=metrics,
            critic_norms=critic_norms,
        )

    def fill(
        self, trajectories: Sequence[Trajectory], step: int, state: Mapping[str, float] | None = None
    ) -> StepBatch:
        """The step's batch; `BatchFiller.fill` has the arguments."""
        return self.filler.fill(trajectories, step, state)

    def plan(self, batch: StepBatch, rates: LearningRates) -> list[Update]:
        """The step's updates, planned on the whole batch, each with all columns that its plan reads.

        After the first of several updates the policy is no longer the one that sampled. So this method computes the
        log-probs of the trajectories that later updates learn from. The first update gets them from its own forward
        pass, and later epochs use these.
        """
        rows = update_rows(batch.trajectories, self.config.mini_batches)
        plans = self.algorithm.plans(batch.columns, rows)
        first = next((number for number, plan in enumerate(plans) if bool(plan.contributing.any())), None)
        batches = [batch.select(some) for some in rows]
        if rates.policy is not None:
            batches = [
                self.filler.complete(one, plan, behavior=number != first)
                for number, (one, plan) in enumerate(zip(batches, plans, strict=True))
            ]
        targets = [None] * len(rows) if self.critic is None else self.critic.targets(batch, rows, batches, plans)
        return [Update(*parts) for parts in zip(batches, plans, rows, targets, strict=True)]

    def run_micro_batches(
        self,
        update: Update,
        number: int = 1,
        find_top_tokens: bool = False,
        poll: Callable[[], None] | None = None,
    ) -> PolicyPasses:
        """Accumulate the policy gradient of an update over micro-batches, without the optimizer step.

        If parts of reach 'batch' leave nothing to learn from, there is no gradient.

        Args:
            update: the update, with all columns.
            number: the update's number within the step, from 1. In the first one the policy is still the one that
                sampled, so sampler and trainer are compared.
            find_top_tokens: also return the trajectories with the largest token weights.
            poll: called before each micro-batch; may raise `Interrupted`, which drops the gradient so far.
        """
        ready, current = self.filler.evaluated(update.batch, update.plan, poll)
        plan, trajectories = ready.to(self.engine.world.device), update.batch.trajectories
        estimates: list[Estimate] = []

        def estimates_of(view: Trajectories | PackedTokens, places: Places) -> list[tuple[float, Estimate]]:
            # Its numbers are read after the passes, because reading them here would synchronize with the device in each
            # of the head's chunks.
            estimates.append(plan.estimate_in_head(view, places))
            return [(1.0, estimates[-1])]

        try:
            contributing = ready.contributing
            passes = self._run(update.batch, contributing, estimates_of, poll) if bool(contributing.any()) else []
        except Interrupted:
            self.engine.drop_gradient()
            raise
        sums = [MetricSums.of_estimate(estimate, number, trajectories) for estimate in estimates]
        # In other rows the column holds zeros and is not read.
        with_behavior = ready.reading("behavior_logprobs").to(self.engine.world.device)
        weights = [token_weights(estimate) for estimate in estimates] if find_top_tokens else []
        logprobs: list[RowValues] = []
        for rows, micro_batch, tokens in passes:
            sums.append(MetricSums.of_tokens(tokens, len(rows), micro_batch.packed.input_ids.numel()))
            if number == 1:
                sums.append(_sampler_gap(micro_batch, tokens, trajectories))
            of_rollouts = micro_batch.of_rollouts & tokens.look_up(with_behavior)
            sums.append(MetricSums(off_policy=OffPolicySums.of_behavior(tokens, of_rollouts, trajectories)))
            assert tokens.logprobs is not None
            logprobs.append((rows, micro_batch.packed.pad(tokens.logprobs).float().cpu()))
        return PolicyPasses(ready, sums, current or logprobs, top_trajectories(weights, trajectories))

    def gradient(self, batch: StepBatch, plans: Sequence[tuple[float, Plan]]) -> list[Tensor]:
        """This rank's partitions of ∇ Σ factor·L over `plans` of one algorithm and batch; the policy is unchanged."""
        return self._gradient(self.filler.complete_any(batch, [plan for _, plan in plans]), *plans)

    def _gradient(self, batch: StepBatch, *plans: tuple[float, Plan]) -> list[Tensor]:
        """As `gradient`, on a batch that has all columns."""
        plans = tuple((factor, self.filler.evaluated(batch, plan)[0]) for factor, plan in plans)
        contributing = torch.stack([plan.contributing for _, plan in plans]).any(dim=0)
        on_device = [(factor, plan.to(self.engine.world.device)) for factor, plan in plans]

        def estimates_of(view: Trajectories | PackedTokens, places: Places) -> list[tuple[float, Estimate]]:
            return [(factor, plan.estimate_in_head(view, places)) for factor, plan in on_device]

        self._run(batch, contributing, estimates_of)
        return self.engine.take_gradient()

    def _diagnosed(self, update: Update, diagnostics: Diagnostics) -> dict[str, float]:
        """Metrics from gradients of the update, computed before it is made."""
        metrics: dict[str, float] = {}
        if diagnostics.term_gradients:
            metrics |= term_gradient_metrics(update.plan, partial(self._gradient, update.batch), self.engine)
        return metrics | (self._split_error(update) if diagnostics.split else {})

    def _split_error(self, update: Update) -> dict[str, float]:
        """The distance of the gradient from that of smaller micro-batches, relative to its norm; 0 up to rounding."""
        own = self._gradient(update.batch, (1.0, update.plan))
        with self.filler.smaller_micro_batches(update.batch):
            other = self._gradient(update.batch, (1.0, update.plan))
        away = [a - b for a, b in zip(own, other, strict=True)]
        size, distance = (math.sqrt(self.engine.dot(vector, vector)) for vector in (own, away))
        return {"gradient/split_error": distance / size if size else 0.0}

    def _run(
        self,
        batch: StepBatch,
        contributing: Bool[Tensor, "B"],
        estimates_of: EstimatesOf,
        poll: Callable[[], None] | None = None,
    ) -> list[ForwardPass]:
        """Run the forward and backward passes of this rank's micro-batches; return those with trajectories.

        A rank without work runs an empty micro-batch with a loss of zero, because ZeRO-3's collectives need all ranks.
        """
        rows = contributing.nonzero()[:, 0].tolist()
        micro_batches = self.filler.micro_batch_rows(batch, rows, whole_groups=self.algorithm.reach == "group") or [[]]
        passes = []
        for number, some in enumerate(micro_batches):
            if poll is not None:
                poll()
            with naming_size(batch.ids(some)):
                micro_batch = MicroBatch(batch.columns, some, self.engine.pack(batch.ids(some)))
                objective = micro_batch.objective(self.algorithm, estimates_of)
                with self.filler.outputs(batch, some, micro_batch.packed) as others:
                    objective = objective._replace(others=others)
                    loss, logprobs, entropies = self.engine.loss(micro_batch.packed, objective)
                self.engine.backward(loss, last=number == len(micro_batches) - 1)
            if some:
                passes.append(ForwardPass(some, micro_batch, micro_batch.with_forward(logprobs, entropies)))
        return passes

    @torch.no_grad()
    def _probe(self, batch: StepBatch) -> list[MetricSums]:
        """Compare sampler and trainer on one rollout per rank, if the first update of the policy does not.

        This reveals a sampler with stale weights in every step.
        """
        rollouts = [t for t in batch.trajectories if t.is_fresh]
        if not rollouts:
            return []
        world = self.engine.world
        chosen = rollouts[world.rank : world.rank + 1]
        packed = self.engine.pack([trajectory.ids for trajectory in chosen])
        logprobs, entropies = self.engine.logprobs(packed, entropy=True)
        if not chosen:
            return []
        assert entropies is not None
        micro_batch = MicroBatch(assemble(chosen, batch.columns.step), [0], packed)
        tokens = micro_batch.with_forward(logprobs, entropies)
        return [_sampler_gap(micro_batch, tokens, chosen)]


def _sampler_gap(micro_batch: MicroBatch, tokens: PackedTokens, trajectories: Sequence[Trajectory]) -> MetricSums:
    """How far the sampler is from the trainer on a micro-batch, both with the weights that the sampler had.

    `trajectories` are those of the whole batch.
    """
    fresh = torch.tensor([not one.is_replayed for one in trajectories], device=micro_batch.of_rollouts.device)
    if any(one.is_fresh and one.behavior_logprobs is not None for one in trajectories):
        tokens = replace(tokens, logprobs=tokens.behavior_logprobs)
    return MetricSums.of_sampler_gap(tokens, micro_batch.of_rollouts & tokens.look_up(fresh), trajectories)


def _coefficients(updates: Sequence[Update]) -> dict[str, float]:
    """For each term, the mean coefficient of its source's trajectories, if it is known before the forward pass."""
    metrics: dict[str, float] = {}
    plans = [update.plan for update in updates]
    for name, term in plans[0].terms.items():
        gates = [gate for plan in plans if isinstance(gate := plan.terms[name].gate, Precomputed)]
        of_source = torch.cat([plan.terms[name].source for plan in plans])
        if gates and bool(of_source.any()):
            values = torch.cat([gate.values for gate in gates])
            metrics[f"{name}/coefficient"] = term.coefficient * float(values[of_source].mean())
    return metrics
