"""From a step's trajectories to updates: fill columns, plan on the whole batch, cut, forward, backward, step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from upge.algorithm import Algorithm, Plan
from upge.components.base import Precomputed
from upge.needs import COMPUTED
from upge.train.config import OptimizerConfig
from upge.train.critic import CriticEngine
from upge.train.engine import Engine
from upge.train.frozen import FrozenPolicy
from upge.train.packing import distribute, packed_length
from upge.train.rates import Rates
from upge.train.tally import Tally, UpdateReport, fit_of
from upge.train.trajectory import Trajectory, assemble
from upge.trajectories import Trajectories


class Batch(NamedTuple):
    """The trajectories of one update, as columns and as they were collected, in the same order."""

    columns: Trajectories
    members: list[Trajectory]

    def taken(self, rows: Tensor) -> Batch:
        """The trajectories of one of several updates."""
        columns = self.columns.select(rows, row=torch.arange(len(rows)))
        return Batch(columns, [self.members[i] for i in rows.tolist()])


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
        self, trajectories: Sequence[Trajectory], step: int, rates: Rates, state: Mapping[str, float] | None = None
    ) -> UpdateReport:
        """All updates of a step; every rank passes the same trajectories.

        With several updates the policy moves away from the one that sampled, so its log-probs are computed before the
        first; with a single one they are the current ones and nothing is computed twice.
        """
        whole = self.fill(trajectories, step, state)
        cuts = split(whole.members, self.config.mini_batches)
        plans = self.algorithm.plans(whole.columns, cuts)
        batches = [whole.taken(rows) for rows in cuts]
        batches = [self._completed(batch, plan) for batch, plan in zip(batches, plans, strict=True)]
        tally, norms, critic_norms, above_limit = Tally(), [], [], 0
        first = next(((b, p) for b, p in zip(batches, plans, strict=True) if bool(p.keep.any())), None)
        if rates.policy is None or first is None or not _has_rollouts(*first):
            self._probe(trajectories, step, tally)
        goals = self._goals(whole, cuts, batches, plans)
        for _ in range(self.config.epochs):
            for batch, plan, goal in zip(batches, plans, goals, strict=True):
                if rates.policy is not None and bool(plan.keep.any()):
                    self.accumulate(batch, plan, tally, on_policy=not norms)
                    result = self.engine.step(rates.policy, self.config.skip_grad_norm)
                    norms.append(_norm(result))
                    above_limit += not result.applied and norms[-1] != float("inf")
                if goal is not None and bool((goal[1] != 0).any()):
                    self._accumulate_values(batch, *goal, tally)
                    critic_norms.append(_norm(self.critic.step(rates.critic)))
        skipped = [*norms, *critic_norms].count(float("inf"))
        figures = _coefficients(plans) | self._fit(batches, goals)
        return UpdateReport(norms, skipped, above_limit, *_shares(batches, plans), tally, figures, critic_norms)

    def fill(self, trajectories: Sequence[Trajectory], step: int, state: Mapping[str, float] | None = None) -> Batch:
        """The whole step's batch with the columns that parts read before the forward pass, on all trajectories."""
        columns = dataclasses.replace(assemble(trajectories, step), state=dict(state or {}))
        batch = Batch(columns, list(trajectories))
        everything = list(range(len(batch.members)))
        return self._with_columns(batch, everything, self.needs.before) if everything else batch

    def gradient(self, batch: Batch, plans: Sequence[tuple[float, Plan]]) -> list[Tensor]:
        """This rank's partitions of ∇ Σ factor·L over `plans` of one algorithm and batch; the policy stays as it is."""
        keep = torch.stack([plan.keep for _, plan in plans]).any(dim=0)
        batch = self._with_columns(batch, keep.nonzero()[:, 0].tolist(), self._late_columns())
        self._accumulate(batch, keep, lambda piece: sum(f * _on(p, piece).estimate(piece).loss for f, p in plans))
        return self.engine.take_gradient()

    def accumulate(self, batch: Batch, plan: Plan, tally: Tally, on_policy: bool) -> None:
        """Adds the gradient of the planned batch, piece by piece."""

        def loss(piece: Trajectories) -> Tensor:
            estimate = _on(plan, piece).estimate(piece)
            tally.count(piece, estimate, on_policy)
            return estimate.loss

        self._accumulate(batch, plan.keep, loss)

    def _accumulate(self, batch: Batch, keep: Tensor, loss_of: Callable[[Trajectories], Tensor]) -> None:
        pieces = self._pieces(batch, keep.nonzero()[:, 0].tolist(), self.algorithm.reach)
        for number, rows in enumerate(pieces):
            forward = self.engine.forward(_pairs(batch, rows), entropy=True)
            if rows:
                loss = loss_of(_piece(batch, rows, logprobs=forward.logprobs, entropies=forward.entropies))
            else:
                # ZeRO-3's collectives need this rank's forward and backward although it has nothing to learn.
                loss = forward.logprobs_packed.sum() * 0.0
            self.engine.backward(_told(loss), last=number == len(pieces) - 1)

    def _pieces(self, batch: Batch, rows: list[int], reach: str = "token") -> list[list[int]]:
        """This rank's micro-batches, as rows of the batch; as many on every rank."""
        lengths = [packed_length(*pair) for pair in _pairs(batch, rows)]
        blocks = [batch.members[r].group for r in rows] if reach == "group" else None
        world = self.engine.world
        cut = distribute(lengths, world.size, self.config.micro_batch_tokens, blocks)[world.rank]
        return [[rows[i] for i in members] for members in cut]

    # Columns that take a forward pass.

    def _late_columns(self) -> frozenset[str]:
        """Columns that only live parts read: asked for once it is known which trajectories are kept."""
        late = (self.needs.columns & COMPUTED) - self.needs.before
        return late if self.off_policy else late - {"behavior_logprobs"}

    def _completed(self, batch: Batch, plan: Plan) -> Batch:
        return self._with_columns(batch, plan.keep.nonzero()[:, 0].tolist(), self._late_columns())

    @torch.no_grad()
    def _with_columns(self, batch: Batch, rows: list[int], names: frozenset[str]) -> Batch:
        """`batch` with columns computed for `rows`; zero elsewhere, where nobody looks."""
        sources = {
            "behavior_logprobs": lambda pairs: self.engine.forward(pairs).logprobs,
            "reference_logprobs": lambda pairs: self.frozen.forward(pairs).logprobs,
            "values": lambda pairs: self.critic.forward(pairs).values,
        }
        found = {name: self._column(batch, rows, sources[name]) for name in sorted(names)}
        return batch._replace(columns=dataclasses.replace(batch.columns, **found)) if found else batch

    def _column(self, batch: Batch, rows: list[int], forward: Callable[[list], Tensor]) -> Tensor:
        column = torch.zeros(batch.columns.response_mask.shape)
        mine = []
        for piece in self._pieces(batch, rows) if rows else ():
            values = forward(_pairs(batch, piece))
            if piece:
                mine.append((piece, values.float().cpu()))
        for part in self.engine.world.gather(mine):
            for piece, values in part:
                column[torch.tensor(piece), : values.shape[1]] = values
        return column

    @torch.no_grad()
    def _probe(self, trajectories: Sequence[Trajectory], step: int, tally: Tally) -> None:
        """Compares sampler and trainer on a rollout a rank, for steps whose first update has none: a sampler with
        stale weights must show in every step."""
        rollouts = [t for t in trajectories if not t.is_demonstration]
        if not rollouts:
            return
        world = self.engine.world
        mine = rollouts[world.rank : world.rank + 1]
        forward = self.engine.forward([(t.prompt_ids, t.response_ids) for t in mine])
        if mine:
            tally.compare(assemble(mine, step), forward.logprobs.float().cpu())

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
            found.append((targets[rows][:, :width], loss.weights(batch.columns, plan.counted)))
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
            self.critic.backward(_told(loss), last=number == len(pieces) - 1)

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


def _piece(batch: Batch, rows: Sequence[int], **live: Tensor) -> Trajectories:
    """A piece of the batch on the model's device, with the columns of the forward pass."""
    piece = batch.columns.select(torch.tensor(rows))
    columns = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece)}
    device = live["logprobs"].device
    moved = {n: c.to(device) if isinstance(c, Tensor) else c for n, c in columns.items()}
    return Trajectories(**{**moved, **live})


def _on(plan: Plan, piece: Trajectories) -> Plan:
    return plan.to(piece.response_mask.device)


def _told(loss: Tensor) -> Tensor:
    """A loss that is not finite becomes NaN, so that the gradient norm, which all ranks share, tells of it too."""
    return loss if bool(torch.isfinite(loss.detach())) else loss * float("nan")


def _norm(result: NamedTuple) -> float:
    """The gradient's norm, infinite where the gradient was not finite."""
    return result.grad_norm if result.applied or math.isfinite(result.grad_norm) else float("inf")


def _has_rollouts(batch: Batch, plan: Plan) -> bool:
    return bool((plan.keep & ~batch.columns.is_demonstration).any())


def _shares(batches: Sequence[Batch], plans: Sequence[Plan]) -> tuple[tuple[int, int], float]:
    """(demonstrations, all) that count, and the share of prompts without any gradient."""
    counted = torch.cat([plan.counted for plan in plans])
    demonstrations = torch.cat([batch.columns.is_demonstration for batch in batches])
    members = [t for batch in batches for t in batch.members]
    keep = torch.cat([plan.keep for plan in plans]).tolist()
    heard = {t.group for t, kept in zip(members, keep, strict=True) if kept}
    silent = 1 - len(heard) / max(1, len({t.group for t in members}))
    return (int((counted & demonstrations).sum()), int(counted.sum())), silent


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
