"""What the updates of a step add up to: sums over pieces and ranks, and the figures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upge.estimate import Estimate, TermRecord, summarise
from upge.train.heard import Heard
from upge.train.trajectory import Trajectory
from upge.train.witness import Heavy
from upge.trajectories import SUCCESS_REWARD
from upge.views import PackedTokens


@dataclass
class Tally:
    """Sums over the pieces of a step on one rank; `merge` adds those of other ranks.

    `update` is the number of the update that is counted at present, from 1; `heaviest` is what was witnessed.
    """

    records: dict[str, list[TermRecord]] = field(default_factory=dict)
    update: int = 0
    heaviest: list[Heavy] = field(default_factory=list)
    loss: float = 0.0
    penalties: dict[str, float] = field(default_factory=dict)
    entropy_sum: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    computed: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: int = 0
    value_loss: float = 0.0

    def merge(self, other: Tally) -> None:
        """Adds another rank's sums."""
        for name, pieces in other.records.items():
            self.records.setdefault(name, []).extend(pieces)
        for name, value in other.penalties.items():
            self.penalties[name] = self.penalties.get(name, 0.0) + value
        sums = ("loss", "entropy_sum", "tokens", "trajectories", "computed", "gap_sum", "gap_tokens", "value_loss")
        for name in sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gap_max = max(self.gap_max, other.gap_max)
        self.heaviest.extend(other.heaviest)

    def count(self, estimate: Estimate) -> None:
        """Adds what the algorithm said about some tokens."""
        for name, record in estimate.records.items():
            # Each update numbers its own trajectories.
            trajectories = {(self.update, row): mass for row, mass in record.trajectories.items()}
            self.records.setdefault(name, []).append(record._replace(trajectories=trajectories))
        for name, value in estimate.penalties.items():
            self.penalties[name] = self.penalties.get(name, 0.0) + value
        self.loss += float(estimate.loss.detach())

    def see(self, tokens: PackedTokens, trajectories: int, computed: int) -> None:
        """Adds the tokens of a piece as the forward pass found them: how many trajectories they are of, and how many
        tokens the model computed for them, prompts included."""
        self.entropy_sum += float(tokens.entropies.double().sum())
        self.tokens += len(tokens)
        self.trajectories += trajectories
        self.computed += computed

    def compare(self, tokens: PackedTokens, sampled: Tensor) -> None:
        """Counts how far the sampler's log-probs are from the trainer's, on the tokens of rollouts, [n] `sampled`."""
        if tokens.sampler_logprobs is not None and bool(sampled.any()):
            gap = (tokens.logprobs.float() - tokens.sampler_logprobs.float()).abs()[sampled]
            self.gap_sum += float(gap.double().sum())
            self.gap_max = max(self.gap_max, float(gap.max()))
            self.gap_tokens += gap.numel()

    def metrics(self) -> dict[str, float]:
        """Figures of the step, see docs/metrics.md."""
        found = summarise(self.records) | {f"{n}/value": v for n, v in self.penalties.items()}
        found |= {"loss": self.loss, "trained/trajectories": self.trajectories, "trained/tokens": self.tokens}
        found["trained/computed_tokens"] = self.computed
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
        grad_norms: of each of the policy's updates, before clipping; infinite for one whose gradient was not finite.
        skipped: updates dropped because their gradient was not finite, the critic's and the interleaved updates' included.
        above_limit: the policy's updates left out because the gradient's norm exceeded `optimizer.skip_grad_norm`.
        heard: which trajectories the updates learned from.
        tally: this rank's sums.
        figures: what is known on every rank alike: coefficients of the terms, the critic's fit, the terms' pulls.
        critic_norms, interleaved_norms: as `grad_norms`, of the critic and of interleaved updates.
    """

    grad_norms: list[float]
    skipped: int
    above_limit: int
    heard: Heard
    tally: Tally
    figures: dict[str, float] = field(default_factory=dict)
    critic_norms: list[float] = field(default_factory=list)
    interleaved_norms: list[float] = field(default_factory=list)


def step_metrics(report: UpdateReport, tallies: Sequence[Tally]) -> dict[str, float]:
    """Figures of a step's updates from all ranks' sums."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    found = total.metrics() | report.figures
    found["gate/demonstration_share"] = report.heard.demonstration_share
    found["gate/no_signal_prompts"] = report.heard.no_signal_prompts
    found["trained/skipped_share"] = report.heard.skipped_tokens
    found["grad_norm"] = _mean_finite(report.grad_norms)
    found["updates"] = sum(n != float("inf") for n in report.grad_norms) - report.above_limit
    found["updates_above_limit"] = report.above_limit
    if report.critic_norms:
        found["critic/loss"] = total.value_loss / len(report.critic_norms)
        found["critic/grad_norm"] = _mean_finite(report.critic_norms)
    return found


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


def _mean_finite(norms: Sequence[float]) -> float:
    """0 without updates, NaN if all of them were skipped."""
    finite = [n for n in norms if n != float("inf")]
    return sum(finite) / len(finite) if finite else (float("nan") if norms else 0.0)


def fit_of(values: Tensor, targets: Tensor, mask: Tensor) -> dict[str, float]:
    """How well the critic's values before the step's updates explain the returns, over the rollouts' tokens [n]."""
    value, target = values[mask].double(), targets[mask].double()
    if not len(value):
        return {}
    spread = float(target.var(unbiased=False))
    found = {"critic/value_mean": float(value.mean()), "critic/return_mean": float(target.mean())}
    if spread > 0:
        found["critic/explained_variance"] = 1 - float(torch.var(target - value, unbiased=False)) / spread
    return found
