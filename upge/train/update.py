"""From a step's trajectories to optimizer updates: plan on the whole batch, cut, forward, backward, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upge.algorithm import Algorithm, Plan
from upge.estimate import TokenRecord, summarise
from upge.train.collect import Trajectory, assemble
from upge.train.config import OptimizerConfig
from upge.train.engine import Engine
from upge.train.packing import distribute, packed_length
from upge.trajectories import Trajectories


@dataclass
class Tally:
    """Sums over the pieces of a step on one rank; `merge` adds those of other ranks."""

    records: dict[str, list[TokenRecord]] = field(default_factory=dict)
    loss: float = 0.0
    penalties: dict[str, float] = field(default_factory=dict)
    entropy_sum: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: int = 0

    def merge(self, other: Tally) -> None:
        """Adds another rank's sums."""
        for name, pieces in other.records.items():
            self.records.setdefault(name, []).extend(pieces)
        for name, value in other.penalties.items():
            self.penalties[name] = self.penalties.get(name, 0.0) + value
        for name in ("loss", "entropy_sum", "tokens", "trajectories", "gap_sum", "gap_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gap_max = max(self.gap_max, other.gap_max)

    def metrics(self) -> dict[str, float]:
        """Figures of the step, see docs/metrics.md."""
        found = summarise(self.records) | {f"{n}/value": v for n, v in self.penalties.items()}
        found |= {"loss": self.loss, "trained/trajectories": self.trajectories, "trained/tokens": self.tokens}
        if self.tokens:
            found["trained/entropy"] = self.entropy_sum / self.tokens
        if self.gap_tokens:
            found["sampler/logprob_diff_mean"] = self.gap_sum / self.gap_tokens
            found["sampler/logprob_diff_max"] = self.gap_max
        return found


@dataclass(frozen=True)
class UpdateReport:
    """What the updates of a step did.

    Attributes:
        grad_norms: of each update, before clipping; infinite for one that was skipped.
        skipped: updates dropped because their gradient was not finite.
        counted: (demonstrations, trajectories) with a coefficient other than zero.
        silent_prompts: share of the prompts none of whose trajectories can contribute to the gradient.
        tally: this rank's sums.
    """

    grad_norms: list[float]
    skipped: int
    counted: tuple[int, int]
    silent_prompts: float
    tally: Tally


class Updater:
    """Runs the updates of a step. It sees an algorithm's plan and its estimates, never which algorithm it is."""

    def __init__(self, engine: Engine, algorithm: Algorithm, config: OptimizerConfig) -> None:
        self.engine, self.algorithm, self.config = engine, algorithm, config
        self.columns = algorithm.needs.columns
        self.off_policy = config.mini_batches * config.epochs > 1

    def update(self, trajectories: Sequence[Trajectory], step: int, lr: float) -> UpdateReport:
        """All updates of a step; every rank passes the same trajectories.

        With several updates the policy moves away from the one that sampled, so its log-probs are computed before the
        first; with a single one they are the current ones and nothing is computed twice.
        """
        chunks = split_by_group(trajectories, self.config.mini_batches)
        batches = [assemble(chunk, step) for chunk in chunks]
        plans = [self.algorithm.plan(batch) for batch in batches]
        if self.off_policy and "behavior_logprobs" in self.columns:
            batches = [self._with_behavior(*triple) for triple in zip(batches, plans, chunks, strict=True)]
            plans = [self.algorithm.plan(batch) for batch in batches]
        tally, norms, skipped = Tally(), [], 0
        first = next(((b, p) for b, p in zip(batches, plans, strict=True) if bool(p.keep.any())), None)
        if first is None or not bool((first[1].keep & ~first[0].is_demonstration).any()):
            self._probe(trajectories, step, tally)
        for _ in range(self.config.epochs):
            for batch, plan, chunk in zip(batches, plans, chunks, strict=True):
                if not bool(plan.keep.any()):
                    continue
                self._accumulate(batch, plan, chunk, tally, on_policy=not norms)
                result = self.engine.step(lr)
                norms.append(result.grad_norm if result.applied else float("inf"))
                skipped += not result.applied
        counted = torch.cat([plan.counted for plan in plans])
        demonstrations = torch.cat([batch.is_demonstration for batch in batches])
        keep = [bool(kept) for plan in plans for kept in plan.keep]
        heard = {t.group for t, kept in zip(sum(chunks, []), keep, strict=True) if kept}
        silent = 1 - len(heard) / max(1, len({t.group for t in trajectories}))
        return UpdateReport(norms, skipped, (int((counted & demonstrations).sum()), int(counted.sum())), silent, tally)

    def _pieces(self, plan: Plan, chunk: Sequence[Trajectory]) -> list[list[int]]:
        """This rank's micro-batches, as rows of the batch; as many on every rank."""
        rows = plan.keep.nonzero()[:, 0].tolist()
        lengths = [packed_length(chunk[r].prompt_ids, chunk[r].response_ids) for r in rows]
        blocks = [chunk[r].group for r in rows] if self.algorithm.reach == "group" else None
        world = self.engine.world
        cut = distribute(lengths, world.size, self.config.micro_batch_tokens, blocks)[world.rank]
        return [[rows[i] for i in members] for members in cut]

    def _accumulate(
        self, batch: Trajectories, plan: Plan, chunk: Sequence[Trajectory], tally: Tally, on_policy: bool
    ) -> None:
        pieces = self._pieces(plan, chunk)
        for number, rows in enumerate(pieces):
            forward = self.engine.forward([(chunk[r].prompt_ids, chunk[r].response_ids) for r in rows], entropy=True)
            if rows:
                logprobs, entropies = forward.logprobs, forward.entropies
                piece = _to(batch, torch.tensor(rows), logprobs.device, logprobs, entropies)
                estimate = plan.to(logprobs.device).estimate(piece)
                loss = estimate.loss
                _count(tally, piece, estimate, logprobs.detach(), entropies.detach(), on_policy)
            else:
                # ZeRO-3's collectives need this rank's forward and backward although it has nothing to learn.
                loss = forward.logprobs_packed.sum() * 0.0
            if not bool(torch.isfinite(loss.detach())):
                loss = loss * float("nan")  # so that the gradient norm, which all ranks share, tells of it too
            self.engine.backward(loss, last=number == len(pieces) - 1)

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
            _compare(tally, assemble(mine, step), forward.logprobs.float().cpu())

    @torch.no_grad()
    def _with_behavior(self, batch: Trajectories, plan: Plan, chunk: Sequence[Trajectory]) -> Trajectories:
        """`batch` with the current policy's log-probs as the behaviour column, wherever they can be needed."""
        column = torch.zeros(batch.response_mask.shape)
        mine: list[tuple[list[int], Tensor]] = []
        if bool(plan.keep.any()):
            for rows in self._pieces(plan, chunk):
                forward = self.engine.forward([(chunk[r].prompt_ids, chunk[r].response_ids) for r in rows])
                if rows:
                    mine.append((rows, forward.logprobs.float().cpu()))
        for part in self.engine.world.gather(mine):
            for rows, values in part:
                column[torch.tensor(rows), : values.shape[1]] = values
        return dataclasses.replace(batch, behavior_logprobs=column)


def split_by_group(trajectories: Sequence[Trajectory], parts: int) -> list[list[Trajectory]]:
    """Consecutive chunks with as many prompts each; a group stays whole."""
    groups = sorted({t.group for t in trajectories})
    size = max(1, -(-len(groups) // parts))
    chunks = [set(groups[i : i + size]) for i in range(0, len(groups), size)]
    return [[t for t in trajectories if t.group in chunk] for chunk in chunks]


def step_metrics(report: UpdateReport, tallies: Sequence[Tally]) -> dict[str, float]:
    """Figures of a step's updates from all ranks' sums."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    demonstrations, counted = report.counted
    found = total.metrics()
    found["gate/demonstration_share"] = demonstrations / counted if counted else 0.0
    found["gate/silent_prompts"] = report.silent_prompts
    finite = [n for n in report.grad_norms if n != float("inf")]
    found["grad_norm"] = sum(finite) / len(finite) if finite else (float("nan") if report.grad_norms else 0.0)
    found["updates"] = len(report.grad_norms) - report.skipped
    return found


def _to(batch: Trajectories, rows: Tensor, device: torch.device, logprobs: Tensor, entropies: Tensor) -> Trajectories:
    """A piece of the batch on the model's device, with the columns of the forward pass."""
    piece = batch.select(rows)
    columns = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece)}
    moved = {n: c.to(device) if isinstance(c, Tensor) else c for n, c in columns.items()}
    return Trajectories(**{**moved, "logprobs": logprobs, "entropies": entropies})


def _count(tally: Tally, piece: Trajectories, estimate, logprobs: Tensor, entropies: Tensor, on_policy: bool) -> None:
    for name, record in estimate.records.items():
        tally.records.setdefault(name, []).append(record)
    for name, value in estimate.penalties.items():
        tally.penalties[name] = tally.penalties.get(name, 0.0) + value
    mask = piece.response_mask
    tally.loss += float(estimate.loss.detach())
    tally.entropy_sum += float(entropies[mask].double().sum())
    tally.tokens += int(mask.sum())
    tally.trajectories += len(piece)
    if on_policy:
        _compare(tally, piece, logprobs)


def _compare(tally: Tally, piece: Trajectories, logprobs: Tensor) -> None:
    """Counts how far the sampler's log-probs of a piece's rollouts are from the trainer's."""
    sampled = piece.response_mask & ~piece.is_demonstration[:, None]
    if piece.sampler_logprobs is not None and bool(sampled.any()):
        gap = (logprobs.float() - piece.sampler_logprobs.float()).abs()[sampled]
        tally.gap_sum += float(gap.double().sum())
        tally.gap_max = max(tally.gap_max, float(gap.max()))
        tally.gap_tokens += gap.numel()
