"""The batch of a step or of one of its updates, and the columns that take a forward pass to fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.logprobs import Output
from upge.needs import COMPUTED
from upge.plan import Plan
from upge.train.config import OptimizerConfig
from upge.train.engine import CriticEngine, Engine, FrozenPolicy, OutputWeights, Teacher
from upge.train.lag import Weights, exchanged
from upge.train.micro_batches import distribute, naming_size
from upge.train.packing import PackedBatch
from upge.train.sample import TokenIds, Trajectory, assemble
from upge.trajectories import Trajectories

#: Some rows of a batch with a number for each of their tokens, [b, t].
RowValues = tuple[list[int], Tensor]

_BEHAVIOR = "behavior_logprobs"
_T = TypeVar("_T")


class StepBatch(NamedTuple):
    """The trajectories of a step or of one update, as columns and as they were collected, in the same order.

    Plans, micro-batches and `RowValues` refer to its rows by number. Across updates, `Trajectory.index` identifies a
    trajectory.
    """

    columns: Trajectories
    trajectories: list[Trajectory]

    @property
    def carries_behavior(self) -> bool:
        """Whether some trajectory carries the log-probs of the policy that sampled it."""
        return any(t.behavior_logprobs is not None for t in self.trajectories)

    def select(self, rows: Tensor) -> StepBatch:
        """The batch of one update; its rows are numbered from 0."""
        columns = self.columns.select(rows, row=torch.arange(len(rows)))
        return StepBatch(columns, [self.trajectories[row] for row in rows.tolist()])

    def ids(self, rows: Sequence[int]) -> list[TokenIds]:
        """(prompt_ids, response_ids) of some rows."""
        return [self.trajectories[row].ids for row in rows]

    def teacher_ids(self, rows: Sequence[int]) -> list[TokenIds]:
        """(prompt_ids, response_ids) of some rows, with the prompts that the teacher reads."""
        return [self.trajectories[row].teacher_ids for row in rows]


def update_rows(trajectories: Sequence[Trajectory], updates: int) -> list[Tensor]:
    """The rows of each update of a step.

    Each update gets the same number of consecutive prompts (the last one may get fewer) with their whole groups.
    """
    groups = sorted({t.group for t in trajectories})
    size = max(1, -(-len(groups) // updates))
    chunks = [set(groups[i : i + size]) for i in range(0, len(groups), size)] or [set()]
    rows = [[i for i, t in enumerate(trajectories) if t.group in chunk] for chunk in chunks]
    return [torch.tensor(some, dtype=torch.long) for some in rows]


class BatchFiller:
    """Fills the columns that an algorithm reads and that take a forward pass; all ranks call its methods together.

    `fill` fills the columns that are read before the policy's forward pass, for all trajectories of the step.
    `complete` later fills those that only live parts read, only for the trajectories on which they are read.

    Args:
        policy: the model for `behavior_logprobs` and `score_norms`.
        algorithm: the algorithm that reads the columns.
        config: the optimizer's settings, with the size of micro-batches and the number of updates.
        critic: the model for `values`; None if the algorithm reads none.
        reference: the model for `reference_logprobs`; None if the algorithm reads none.
        teacher: the model for `teacher_logprobs`; None if the algorithm reads none.
        poll: called before each forward pass; may raise an error, on all ranks.
    """

    def __init__(
        self,
        policy: Engine,
        algorithm: Algorithm,
        config: OptimizerConfig,
        critic: CriticEngine | None = None,
        reference: FrozenPolicy | None = None,
        poll: Callable[[], None] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.policy, self.config, self.critic, self.reference, self.poll = policy, config, critic, reference, poll
        self.teacher = teacher
        self.needs = algorithm.step_needs
        self.has_later_updates = config.mini_batches * config.epochs > 1
        #: Columns that only live parts read, filled once it is known which trajectories contribute.
        self.late_columns = (self.needs.columns & COMPUTED) - self.needs.precomputed

    def fill(
        self, trajectories: Sequence[Trajectory], step: int, state: Mapping[str, float] | None = None
    ) -> StepBatch:
        """The step's batch with the columns that are read before the forward pass.

        Args:
            trajectories: the step's trajectories, the same on every rank.
            step: the step within the stage, from 0, for schedules.
            state: the value of each stateful gate's variable.
        """
        columns = dataclasses.replace(assemble(trajectories, step), state=dict(state or {}))
        batch = StepBatch(columns, list(trajectories))
        rows = list(range(len(trajectories)))
        return self._with_columns(batch, rows, self.needs.precomputed) if rows else batch

    def complete(self, batch: StepBatch, plan: Plan, behavior: bool) -> StepBatch:
        """The batch of an update with all columns that the plan of its rows reads.

        With `behavior`, `behavior_logprobs` are the current policy's log-probs. It is False for the update in which the
        policy is still the one that sampled. If some trajectories carry log-probs of another policy, the column is
        filled in any case, with the current policy's for all other trajectories.
        """
        fills = behavior and self.has_later_updates or batch.carries_behavior
        for name in sorted(self.late_columns - (set() if fills else {_BEHAVIOR})):
            batch = self._with_columns(batch, _rows(plan.reading(name)), {name})
        return batch

    def complete_any(self, batch: StepBatch, plans: Sequence[Plan]) -> StepBatch:
        """The batch with the columns that any of several plans of its rows reads.

        This includes `behavior_logprobs` only if some trajectories carry those of a policy other than the current one.
        """
        for name in sorted(self.late_columns - (set() if batch.carries_behavior else {_BEHAVIOR})):
            read = torch.stack([plan.reading(name) for plan in plans]).any(dim=0)
            batch = self._with_columns(batch, _rows(read), {name})
        return batch

    @torch.no_grad()
    def evaluated(
        self, batch: StepBatch, plan: Plan, poll: Callable[[], None] | None = None
    ) -> tuple[Plan, list[RowValues]]:
        """The plan of an update with its parts of reach 'batch' evaluated by a forward pass of the current policy.

        Args:
            batch: the update's batch, with all columns.
            plan: the update's plan; returned unchanged, without a pass, if none of its parts has reach 'batch'.
            poll: called before each micro-batch; may raise an error, on all ranks.

        Returns:
            The plan, and the log-probs that this rank computed for contributing trajectories.
        """
        if not plan.pending:
            return plan, []
        read = frozenset[str]().union(*(term.pending_reads for term in plan.terms.values()))
        names = ["logprobs", "entropies"] if "entropies" in read else ["logprobs"]

        def forward(rows: list[int]) -> Tensor:
            packed = self.policy.pack(batch.ids(rows))
            outputs = self.policy.logprobs(packed, entropy=len(names) > 1)
            return torch.stack([packed.pad(_given(values)) for values in outputs[: len(names)]], dim=-1)

        computed = self._computed(batch, _rows(plan.contributing), forward, poll)
        by_name = {name: [(rows, values[..., k]) for rows, values in computed] for k, name in enumerate(names)}
        current = self._joined(batch, by_name).columns
        return plan.with_current(current, self.policy.world.broadcast), by_name["logprobs"]

    def with_behavior(self, batch: StepBatch, logprobs: list[RowValues]) -> StepBatch:
        """The first update's batch with `behavior_logprobs` from the update's own forward passes, for later epochs.

        The batch is unchanged if nothing reads them or if it has them. `logprobs` are those that this rank computed.
        """
        has_none = _BEHAVIOR in self.late_columns and not batch.carries_behavior
        return self._joined(batch, {_BEHAVIOR: logprobs}) if has_none else batch

    @torch.no_grad()
    def as_sampled(
        self, trajectories: Sequence[Trajectory], rows: Sequence[int], weights: Weights | None
    ) -> list[Trajectory]:
        """`trajectories`, with `behavior_logprobs` at `rows` from the policy with `weights`, which sampled them.

        The trainer computes these log-probs. So the importance ratio measures only how stale the policy is, and the
        ratio to the sampler's log-probs only how far the inference engine is from the trainer.

        Args:
            trajectories, rows: the same on every rank.
            weights: the weights of an earlier step; None = the current weights.
        """
        batch = StepBatch(assemble(trajectories, 0), list(trajectories))
        with exchanged(self.policy.zero, weights):
            computed = self._computed(batch, rows, lambda some: self.policy.forward(batch.ids(some)), self.poll)
        filled = list(trajectories)
        for of_rank in self.policy.world.gather(computed):
            for some, values in of_rank:
                for row, of_tokens in zip(some, values.tolist(), strict=True):
                    known = tuple(of_tokens[: len(filled[row].response_ids)])
                    filled[row] = replace(filled[row], behavior_logprobs=known)
        return filled

    def current_logprobs(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """The current policy's log-probs [t] of each response, the same on every rank; takes a forward pass."""
        if not trajectories:
            return []
        batch = StepBatch(assemble(trajectories, 0), list(trajectories))
        columns = self._with_columns(batch, list(range(len(trajectories))), {_BEHAVIOR}).columns
        assert columns.behavior_logprobs is not None
        return [
            row[: len(t.response_ids)].clone() for row, t in zip(columns.behavior_logprobs, trajectories, strict=True)
        ]

    @contextmanager
    def smaller_micro_batches(self, batch: StepBatch) -> Iterator[None]:
        """Halve the maximum tokens of a micro-batch in the block."""
        before = self.config
        total = sum(len(ids) for pair in batch.ids(range(len(batch.trajectories))) for ids in pair)
        half = max(1, min(before.micro_batch_tokens, total) // 2)
        self.config = replace(before, micro_batch_tokens=half)
        try:
            yield
        finally:
            self.config = before

    def micro_batch_rows(self, batch: StepBatch, rows: Sequence[int], whole_groups: bool = False) -> list[list[int]]:
        """The rows of each of this rank's micro-batches; every rank gets the same number of micro-batches."""
        works = [self.policy.costs.work(*ids) for ids in batch.ids(rows)]
        blocks = [batch.trajectories[row].group for row in rows] if whole_groups else None
        world = self.policy.world
        members = distribute(works, world.size, self.config.micro_batch_tokens, blocks)[world.rank]
        return [[rows[i] for i in some] for some in members]

    @torch.no_grad()
    def _with_columns(self, batch: StepBatch, rows: Sequence[int], names: Set[str]) -> StepBatch:
        """`batch` with columns computed for `rows`; elsewhere they are zero and not read.

        Log-probs that trajectories carry are not computed again.
        """
        unknown = [row for row in rows if batch.trajectories[row].behavior_logprobs is None]
        sources: dict[str, Callable[[list[int]], Tensor]] = {
            _BEHAVIOR: lambda rows: self.policy.forward(batch.ids(rows)),
            "reference_logprobs": lambda rows: _given(self.reference).forward(batch.ids(rows)),
            "teacher_logprobs": lambda rows: _given(self.teacher).forward(batch.teacher_ids(rows)),
            "score_norms": lambda rows: self.policy.score_norms(batch.ids(rows)),
            "values": lambda rows: _given(self.critic).forward(batch.ids(rows)),
        }
        computed = {
            name: self._computed(batch, unknown if name == _BEHAVIOR else rows, sources[name], self.poll)
            for name in sorted(names)
        }
        return self._joined(batch, computed)

    def _computed(
        self,
        batch: StepBatch,
        rows: Sequence[int],
        forward: Callable[[list[int]], Tensor],
        poll: Callable[[], None] | None,
    ) -> list[RowValues]:
        computed = []
        for some in self.micro_batch_rows(batch, rows) if rows else ():
            if poll is not None:
                poll()
            with naming_size(batch.ids(some)):
                values = forward(some)
            if some:
                computed.append((some, values.float().cpu()))
        return computed

    @contextmanager
    def outputs(self, batch: StepBatch, rows: Sequence[int], packed: PackedBatch) -> Iterator[dict[str, Output]]:
        """The outputs at the tokens of `packed` of the models whose distributions the algorithm reads, by name.

        Args:
            batch: the update's batch.
            rows: the rows of `packed`, on this rank; all ranks must make the same number of calls.
        """
        with ExitStack() as stack:
            outputs: dict[str, Output] = {}
            # Teacher and reference policy may be the same model, whose weights are gathered once.
            weights: dict[int, OutputWeights] = {}
            for name in sorted(self.needs.distributions):
                model = _given(self.reference if name == "reference" else self.teacher)
                ids = batch.ids(rows) if name == "reference" else batch.teacher_ids(rows)
                own = self.policy.pack(ids)
                states = own.reordered(model.states(own), packed)
                if id(model) not in weights:
                    weights[id(model)] = stack.enter_context(model.output())
                outputs[name] = Output(states, *weights[id(model)])
            yield outputs

    def _joined(self, batch: StepBatch, computed: Mapping[str, list[RowValues]]) -> StepBatch:
        """`batch` with columns assembled from what each rank has computed."""
        columns = {}
        for name, of_this_rank in computed.items():
            known = batch.columns.behavior_logprobs if name == _BEHAVIOR else None
            columns[name] = torch.zeros(batch.columns.response_mask.shape) if known is None else known.clone()
            for of_rank in self.policy.world.gather(of_this_rank):
                for rows, values in of_rank:
                    columns[name][torch.tensor(rows), : values.shape[1]] = values
        return batch._replace(columns=dataclasses.replace(batch.columns, **columns)) if columns else batch


def _rows(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def _given(model: _T | None) -> _T:
    assert model is not None, "the algorithm reads a column of a model that the run does not have"
    return model
