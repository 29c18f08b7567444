"""From a step's trajectories to updates: fill columns, plan on the whole batch, cut, forward, backward, step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.components.base import Precomputed
from upge.needs import COMPUTED
from upge.plan import Plan
from upge.train.config import OptimizerConfig
from upge.train.critic import CriticEngine
from upge.train.engine import Engine
from upge.train.frozen import FrozenPolicy
from upge.train.heard import Heard
from upge.train.micro_batches import distribute
from upge.train.piece import Piece, told
from upge.train.pulls import pull_figures
from upge.train.rates import Rates
from upge.train.tally import Tally, UpdateReport, fit_of
from upge.train.trajectory import Trajectory, assemble
from upge.train.witness import NOTHING, Watch, Witness
from upge.trajectories import Trajectories
from upge.views import PackedTokens, TokenView


class Batch(NamedTuple):
    """The trajectories of one update, as columns and as they were collected, in the same order."""

    columns: Trajectories
    members: list[Trajectory]

    def taken(self, rows: Tensor) -> Batch:
        """The trajectories of one of several updates."""
        columns = self.columns.select(rows, row=torch.arange(len(rows)))
        return Batch(columns, [self.members[i] for i in rows.tolist()])


#: Some rows of a batch with a number for each of their tokens, [b, t].
Found = tuple[list[int], Tensor]


class Updater:
    """Runs the updates of a step. It sees an algorithm's plan and its estimates, never which algorithm it is."""

    def __init__(
        self,
        engine: Engine,
        algorithm: Algorithm,
        config: OptimizerConfig,
        critic: CriticEngine | None = None,
        frozen: FrozenPolicy | None = None,
    ) -> None:
        self.engine, self.algorithm, self.config, self.critic, self.frozen = engine, algorithm, config, critic, frozen
        self.needs = algorithm.step_needs
        self.off_policy = config.mini_batches * config.epochs > 1

    def update(
        self,
        trajectories: Sequence[Trajectory],
        step: int,
        rates: Rates,
        state: Mapping[str, float] | None = None,
        watch: Watch = NOTHING,
    ) -> UpdateReport:
        """All updates of a step; every rank passes the same trajectories.

        With several updates the policy moves away from the one that sampled, so its log-probs on what the later ones
        learn from are computed before the first. In the first itself they are the current ones, and what its forward
        pass finds serves the epochs after it: nothing is computed twice.
        """
        whole = self.fill(trajectories, step, state)
        cuts = split(whole.members, self.config.mini_batches)
        plans = self.algorithm.plans(whole.columns, cuts)
        first = next((i for i, plan in enumerate(plans) if bool(plan.contributing.any())), None)
        batches = [
            self._completed(whole.taken(rows), plan, number != first) if rates.policy is not None else whole.taken(rows)
            for number, (rows, plan) in enumerate(zip(cuts, plans, strict=True))
        ]
        tally, norms, critic_norms, above_limit, pulls = Tally(), [], [], 0, {}
        if rates.policy is None or first is None or not _has_rollouts(batches[first], plans[first]):
            self._probe(trajectories, step, tally)
        goals = self._goals(whole, cuts, batches, plans)
        for _ in range(self.config.epochs):
            for number, (plan, goal) in enumerate(zip(plans, goals, strict=True)):
                if rates.policy is not None and bool(plan.contributing.any()):
                    if watch.pulls and not norms:
                        pulls = pull_figures(plan, partial(self._gradient, batches[number]), self.engine)
                    witness = Witness() if watch.tokens and not norms else None
                    mine = self.accumulate(batches[number], plan, tally, not norms, witness)
                    if not norms and self.config.epochs > 1 and "behavior_logprobs" in self._late_columns():
                        batches[number] = self._joined(batches[number], {"behavior_logprobs": mine})
                    result = self.engine.step(rates.policy, self.config.skip_grad_norm)
                    norms.append(_norm(result))
                    above_limit += not result.applied and norms[-1] != float("inf")
                if goal is not None and bool((goal[1] != 0).any()):
                    self._accumulate_values(batches[number], *goal, tally)
                    critic_norms.append(_norm(self.critic.step(rates.critic)))
        skipped = [*norms, *critic_norms].count(float("inf"))
        figures = _coefficients(plans) | self._fit(batches, goals) | pulls
        heard = Heard.of(whole.members, cuts, plans)
        return UpdateReport(norms, skipped, above_limit, heard, tally, figures, critic_norms)

    def fill(self, trajectories: Sequence[Trajectory], step: int, state: Mapping[str, float] | None = None) -> Batch:
        """The whole step's batch with the columns that parts read before the forward pass, on all trajectories."""
        columns = dataclasses.replace(assemble(trajectories, step), state=dict(state or {}))
        batch = Batch(columns, list(trajectories))
        everything = list(range(len(batch.members)))
        return self._with_columns(batch, everything, self.needs.before) if everything else batch

    def gradient(self, batch: Batch, plans: Sequence[tuple[float, Plan]]) -> list[Tensor]:
        """This rank's partitions of ∇ Σ factor·L over `plans` of one algorithm and batch; the policy stays as it is."""
        for name in sorted(self._late_columns() - {"behavior_logprobs"}):
            read = torch.stack([plan.reading(name) for _, plan in plans]).any(dim=0)
            batch = self._with_columns(batch, read.nonzero()[:, 0].tolist(), {name})
        return self._gradient(batch, *plans)

    def _gradient(self, batch: Batch, *plans: tuple[float, Plan]) -> list[Tensor]:
        """`gradient` on a batch that has all columns."""
        keep = torch.stack([plan.contributing for _, plan in plans]).any(dim=0)
        there = [(factor, plan.to(self.engine.world.device)) for factor, plan in plans]
        self._accumulate(batch, keep, lambda view: sum(factor * plan.estimate(view).loss for factor, plan in there))
        return self.engine.take_gradient()

    def accumulate(
        self, batch: Batch, plan: Plan, tally: Tally, on_policy: bool, witness: Witness | None = None
    ) -> list[Found]:
        """Adds the gradient of the planned batch, piece by piece.

        Args:
            on_policy: the sampler had the same weights.
            witness: sees the estimates; what it finds is the tally's.

        Returns:
            The trajectories of this rank's pieces with their log-probs [b, t].
        """
        plan = plan.to(self.engine.world.device)
        tally.update += 1

        def loss(view: TokenView) -> Tensor:
            estimate = plan.estimate(view)
            tally.count(estimate)
            if witness is not None:
                witness.see(estimate)
            return estimate.loss

        found: list[Found] = []
        for rows, piece, tokens in self._accumulate(batch, plan.contributing, loss):
            tally.see(tokens, len(rows), piece.packed.input_ids.numel())
            if on_policy:
                tally.compare(tokens, piece.sampled)
            found.append((rows, piece.packed.pad(tokens.logprobs).float().cpu()))
        if witness is not None:
            tally.heaviest += witness.heaviest(batch.members)
        return found

    def _accumulate(
        self, batch: Batch, keep: Tensor, loss_of: Callable[[TokenView], Tensor]
    ) -> list[tuple[list[int], Piece, PackedTokens]]:
        """The gradient of a loss of the rows to be kept; this rank's pieces with what the forward pass found."""
        pieces, found = self._pieces(batch, keep.nonzero()[:, 0].tolist(), self.algorithm.reach == "group"), []
        for number, rows in enumerate(pieces):
            piece = Piece(batch.columns, rows, self.engine.pack(_pairs(batch, rows)))
            # A rank that has nothing to learn goes along, because ZeRO-3's collectives need all; its loss is 0.
            loss, logprobs, entropies = self.engine.loss(piece.packed, piece.objective(self.algorithm, loss_of))
            self.engine.backward(loss, last=number == len(pieces) - 1)
            if rows:
                found.append((rows, piece, piece.seen(logprobs, entropies)))
        return found

    def _pieces(self, batch: Batch, rows: list[int], whole_groups: bool = False) -> list[list[int]]:
        """This rank's micro-batches, as rows of the batch; as many on every rank."""
        works = [self.engine.costs.work(*pair) for pair in _pairs(batch, rows)]
        blocks = [batch.members[r].group for r in rows] if whole_groups else None
        world = self.engine.world
        cut = distribute(works, world.size, self.config.micro_batch_tokens, blocks)[world.rank]
        return [[rows[i] for i in members] for members in cut]

    # Columns that take a forward pass.

    def _late_columns(self) -> frozenset[str]:
        """Columns that only live parts read: asked for once it is known which trajectories are kept."""
        late = (self.needs.columns & COMPUTED) - self.needs.before
        return late if self.off_policy else late - {"behavior_logprobs"}

    def _completed(self, batch: Batch, plan: Plan, moved: bool) -> Batch:
        """With all columns but, unless the policy will have `moved` by then, its log-probs when it sampled."""
        for name in sorted(self._late_columns() - (set() if moved else {"behavior_logprobs"})):
            batch = self._with_columns(batch, plan.reading(name).nonzero()[:, 0].tolist(), {name})
        return batch

    @torch.no_grad()
    def _with_columns(self, batch: Batch, rows: list[int], names: Set[str]) -> Batch:
        """`batch` with columns computed for `rows`; zero elsewhere, where nobody looks."""
        sources = {
            "behavior_logprobs": lambda pairs: self.engine.forward(pairs).logprobs,
            "reference_logprobs": lambda pairs: self.frozen.forward(pairs).logprobs,
            "values": lambda pairs: self.critic.forward(pairs).values,
        }
        return self._joined(batch, {name: self._computed(batch, rows, sources[name]) for name in sorted(names)})

    def _computed(self, batch: Batch, rows: list[int], forward: Callable[[list], Tensor]) -> list[Found]:
        found = []
        for piece in self._pieces(batch, rows) if rows else ():
            values = forward(_pairs(batch, piece))
            if piece:
                found.append((piece, values.float().cpu()))
        return found

    def _joined(self, batch: Batch, found: Mapping[str, list[Found]]) -> Batch:
        """`batch` with columns put together from what each rank has found."""
        columns = {}
        for name, mine in found.items():
            columns[name] = torch.zeros(batch.columns.response_mask.shape)
            for part in self.engine.world.gather(mine):
                for piece, values in part:
                    columns[name][torch.tensor(piece), : values.shape[1]] = values
        return batch._replace(columns=dataclasses.replace(batch.columns, **columns)) if columns else batch

    @torch.no_grad()
    def _probe(self, trajectories: Sequence[Trajectory], step: int, tally: Tally) -> None:
        """Compares sampler and trainer on a rollout a rank, for steps whose first update has none: a sampler with
        stale weights must show in every step."""
        rollouts = [t for t in trajectories if not t.is_demonstration]
        if not rollouts:
            return
        world = self.engine.world
        mine = rollouts[world.rank : world.rank + 1]
        packed = self.engine.pack([(t.prompt_ids, t.response_ids) for t in mine])
        logprobs, entropies = self.engine.logprobs(packed, entropy=True)
        if mine:
            piece = Piece(assemble(mine, step), list(range(len(mine))), packed)
            tally.compare(piece.seen(logprobs, entropies), piece.sampled)

    # The critic.

    def _goals(
        self, whole: Batch, cuts: Sequence[Tensor], batches: Sequence[Batch], plans: Sequence[Plan]
    ) -> list[tuple[Tensor, Tensor] | None]:
        """(returns, weights), each [B, T], of the critic's loss in each update; None without a critic. The returns are
        those of the whole step, as the advantages are."""
        loss = self.algorithm.critic
        if loss is None:
            return [None] * len(batches)
        targets, found = loss.targets(whole.columns), []
        for rows, batch, plan in zip(cuts, batches, plans, strict=True):
            width = batch.columns.response_mask.shape[1]
            found.append((targets[rows][:, :width], loss.weights(batch.columns, plan.active)))
        return found

    def _accumulate_values(self, batch: Batch, targets: Tensor, weights: Tensor, tally: Tally) -> None:
        pieces = self._pieces(batch, (weights != 0).any(dim=1).nonzero()[:, 0].tolist())
        for number, rows in enumerate(pieces):
            values = self.critic.forward(_pairs(batch, rows)).values
            if rows:
                width = values.shape[1]
                old, target, weight = (
                    column[rows][:, :width].to(values.device) for column in (batch.columns.values, targets, weights)
                )
                loss = (self.algorithm.critic(values.double(), old.double(), target) * weight).sum()
                tally.value_loss += float(loss.detach())
            else:
                loss = values.sum() * 0.0
            self.critic.backward(told(loss), last=number == len(pieces) - 1)

    def _fit(self, batches: Sequence[Batch], goals: Sequence[tuple[Tensor, Tensor] | None]) -> dict[str, float]:
        if self.algorithm.critic is None:
            return {}
        values, targets, masks = (
            torch.cat([column.flatten() for column in columns])
            for columns in (
                [b.columns.values for b in batches],
                [goal[0] for goal in goals],
                [(goal[1] != 0) & b.columns.response_mask for b, goal in zip(batches, goals, strict=True)],
            )
        )
        return fit_of(values, targets, masks)


def split(members: Sequence[Trajectory], updates: int) -> list[Tensor]:
    """The rows of each update: consecutive prompts, as many for each (the last may have fewer); a group stays whole."""
    groups = sorted({t.group for t in members})
    size = max(1, -(-len(groups) // updates))
    chunks = [set(groups[i : i + size]) for i in range(0, len(groups), size)] or [set()]
    return [torch.tensor([i for i, t in enumerate(members) if t.group in chunk], dtype=torch.long) for chunk in chunks]


def _pairs(batch: Batch, rows: Sequence[int]) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [(batch.members[r].prompt_ids, batch.members[r].response_ids) for r in rows]


def _norm(result: NamedTuple) -> float:
    """The gradient's norm, infinite where the gradient was not finite."""
    return result.grad_norm if result.applied or math.isfinite(result.grad_norm) else float("inf")


def _has_rollouts(batch: Batch, plan: Plan) -> bool:
    return bool((plan.contributing & ~batch.columns.is_demonstration).any())


def _coefficients(plans: Sequence[Plan]) -> dict[str, float]:
    """Per term, the mean coefficient of its source's trajectories, where it is known before the forward pass."""
    found: dict[str, float] = {}
    for name, term in plans[0].terms.items():
        if isinstance(term.gate, Precomputed):
            values = torch.cat([plan.terms[name].gate.values for plan in plans])
            rows = torch.cat([plan.terms[name].source for plan in plans])
            if bool(rows.any()):
                found[f"{name}/coefficient"] = term.coefficient * float(values[rows].mean())
    return found
