"""What a run records about a step: metrics, a line per prompt and, every N steps, responses and large token weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from upge.data import Example, Prompting
from upge.estimate import Estimate, TermRecord, summarise
from upge.plan import Plan
from upge.train.config import RunConfig
from upge.train.diagnostics import Diagnostics, TopTrajectory, merged, token_line
from upge.train.folder import RunFolder
from upge.train.off_policy import OffPolicySums
from upge.train.packing import packed_length
from upge.train.sample import Trajectory
from upge.train.verdicts import FAILED
from upge.views import PackedTokens


@dataclass(frozen=True)
class MetricSums:
    """Sums that metrics are computed from; `total` adds up those of several observations.

    Attributes:
        records: for each term, what is kept of its tokens.
        loss: the surrogate loss.
        penalties: the value of each regularizer.
        entropy_sum: the sum of entropies over trained tokens, in nats.
        tokens: the number of response tokens that the updates learned from.
        trajectories: the number of trajectories that the updates learned from.
        computed_tokens: the number of tokens that the model computed, prompts included.
        gap_sum, gap_max, gap_tokens: sum, maximum and number of |log π_trainer - log π_sampler| on tokens of rollouts.
        value_loss: the critic's loss.
        off_policy: how far the rollouts are from the policy that learns from them.
    """

    records: Mapping[str, Sequence[TermRecord]] = field(default_factory=dict)
    loss: float = 0.0
    penalties: Mapping[str, float] = field(default_factory=dict)
    entropy_sum: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    computed_tokens: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: int = 0
    value_loss: float = 0.0
    off_policy: OffPolicySums = field(default_factory=OffPolicySums)

    @staticmethod
    def total(parts: Iterable[MetricSums]) -> MetricSums:
        """The sum of all parts, added in their order."""
        parts = list(parts)
        records: dict[str, list[TermRecord]] = {}
        penalties: dict[str, float] = {}
        for part in parts:
            for name, one in part.records.items():
                records.setdefault(name, []).extend(one)
            for name, value in part.penalties.items():
                penalties[name] = penalties.get(name, 0.0) + value
        zero, numbers = MetricSums(), {f.name for f in fields(MetricSums)} - {"records", "penalties", "gap_max"}
        sums: dict[str, Any] = {n: sum((getattr(part, n) for part in parts), getattr(zero, n)) for n in numbers}
        # torch's maximum keeps NaN, which Python's `max` may drop.
        largest = float(torch.tensor([0.0, *(part.gap_max for part in parts)], dtype=torch.float64).max())
        return MetricSums(records=records, penalties=penalties, gap_max=largest, **sums)

    @staticmethod
    def of_estimate(estimate: Estimate, update: int, trajectories: Sequence[Trajectory]) -> MetricSums:
        """The sums of an algorithm's estimate for a micro-batch or a chunk of its tokens.

        `update` is the update's number within the step: a trajectory that two updates learn from counts twice.
        `trajectories` are those of the update's batch, by row.
        """
        records = {}
        for name, record in estimate.records.items():
            masses = {}
            for row, mass in record.trajectories.items():
                assert isinstance(row, int)
                masses[update, trajectories[row].index] = mass
            records[name] = [record._replace(trajectories=masses)]
        given = {"penalties": dict(estimate.penalties), "off_policy": OffPolicySums.of_estimate(estimate, trajectories)}
        return MetricSums(records=records, loss=float(estimate.loss.detach()), **given)

    @staticmethod
    def of_tokens(tokens: PackedTokens, trajectories: int, computed_tokens: int) -> MetricSums:
        """The sums over the tokens of a micro-batch, which hold the results of the forward pass."""
        assert tokens.entropies is not None
        return MetricSums(
            entropy_sum=float(tokens.entropies.double().sum()),
            tokens=len(tokens),
            trajectories=trajectories,
            computed_tokens=computed_tokens,
        )

    @staticmethod
    def of_sampler_gap(
        tokens: PackedTokens, of_rollouts: Bool[Tensor, "n"], trajectories: Sequence[Trajectory]
    ) -> MetricSums:
        """How far the sampler's log-probs are from the trainer's, on the tokens of rollouts."""
        if tokens.sampler_logprobs is None or not bool(of_rollouts.any()):
            return MetricSums()
        assert tokens.logprobs is not None
        gap = (tokens.logprobs.float() - tokens.sampler_logprobs.float()).abs()[of_rollouts]
        off_policy = OffPolicySums.of_sampler(tokens, of_rollouts, trajectories)
        sums = {"gap_sum": float(gap.double().sum()), "gap_tokens": gap.numel(), "off_policy": off_policy}
        return MetricSums(gap_max=float(gap.max()), **sums)

    def metrics(self) -> dict[str, float]:
        """Metrics of the step; docs/metrics.md lists them."""
        metrics = summarise(self.records) | self.off_policy.metrics()
        metrics |= {f"{name}/value": value for name, value in self.penalties.items()}
        metrics |= {"loss": self.loss, "trained/trajectories": self.trajectories, "trained/tokens": self.tokens}
        metrics["trained/computed_tokens"] = self.computed_tokens
        if self.tokens:
            metrics["trained/entropy"] = self.entropy_sum / self.tokens
        if self.gap_tokens:
            metrics["sampler/logprob_diff_mean"] = self.gap_sum / self.gap_tokens
            metrics["sampler/logprob_diff_max"] = self.gap_max
        return metrics


@dataclass(frozen=True)
class ActiveTrajectories:
    """Which of a step's B trajectories its updates learned from, excluding interleaved updates.

    Attributes:
        trajectories: the step's trajectories.
        active: [B] True for those with a non-zero coefficient in some term.
        contributing: [B] True for those that can contribute to the gradient; only these reach the model.
    """

    trajectories: Sequence[Trajectory]
    active: Bool[Tensor, "B"]
    contributing: Bool[Tensor, "B"]

    @staticmethod
    def of(trajectories: Sequence[Trajectory], rows: Sequence[Tensor], plans: Sequence[Plan]) -> ActiveTrajectories:
        """Combine the plans of a step's updates; `rows` are the rows of the step's batch that each learns from."""
        active, contributing = (torch.zeros(len(trajectories), dtype=torch.bool) for _ in range(2))
        for chosen, plan in zip(rows, plans, strict=True):
            active[chosen], contributing[chosen] = plan.active, plan.contributing
        return ActiveTrajectories(trajectories, active, contributing)

    @property
    def demonstration_share(self) -> float:
        """Share of demonstrations among the active trajectories."""
        demonstrations = [self.trajectories[row].is_demonstration for row in self.active.nonzero()[:, 0].tolist()]
        return sum(demonstrations) / max(1, len(demonstrations))

    @property
    def no_signal_prompts(self) -> float:
        """Share of the prompts none of whose trajectories can contribute to the gradient."""
        with_signal = {self.trajectories[row].group for row in self.contributing.nonzero()[:, 0].tolist()}
        return 1 - len(with_signal) / max(1, len({t.group for t in self.trajectories}))

    @property
    def skipped_tokens(self) -> float:
        """Share of the step's tokens, prompts included, whose trajectories have no weight in any update."""
        lengths = [packed_length(t.prompt_ids, t.response_ids) for t in self.trajectories]
        tokens = torch.tensor(lengths, dtype=torch.float64)
        return float(tokens[~self.contributing].sum() / tokens.sum().clamp(min=1))

    def prompt_lines(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """One line of prompts.jsonl for each of the step's prompts; `examples` are the training set.

        docs/metrics.md lists the fields.
        """
        groups: dict[int, list[int]] = {}
        for row, trajectory in enumerate(self.trajectories):
            groups.setdefault(trajectory.group, []).append(row)
        for _, rows in sorted(groups.items()):
            members = [self.trajectories[row] for row in rows]
            problem = examples[members[0].example].problem
            passed = [t.passed for t in members if not t.is_demonstration]
            yield {
                "prompt": members[0].example,
                "id": problem.id,
                "level": problem.level,
                "rollouts": len(passed),
                "successes": sum(passed),
                "gate": self._kinds(rows, self.active),
                "learned": self._kinds(rows, self.active & self.contributing),
            }

    def _kinds(self, rows: Sequence[int], chosen: Tensor) -> str:
        """What kind the chosen rows are: 'rollouts', 'demonstrations', 'both' or 'nothing'."""
        kinds = {self.trajectories[row].is_demonstration for row in rows if bool(chosen[row])}
        if len(kinds) == 2:
            return "both"
        return "demonstrations" if True in kinds else "rollouts" if False in kinds else "nothing"


@dataclass(frozen=True)
class UpdateReport:
    """What the updates of a step did.

    Attributes:
        grad_norms: the gradient norm of each policy update, before clipping; infinite if the gradient was not finite.
        skipped: the number of updates (policy, critic, interleaved) skipped because their gradient was not finite.
        above_limit: the number of policy updates skipped because their gradient norm exceeded
            `optimizer.skip_grad_norm`.
        active: which trajectories the updates learned from.
        sums: this rank's sums.
        tops: this rank's trajectories with the largest token weights, if requested.
        metrics: metrics that every rank knows: coefficients of the terms, the critic's fit, the terms' gradients.
        critic_norms, interleaved_norms: as `grad_norms`, for the critic and for interleaved updates.
    """

    grad_norms: Sequence[float]
    skipped: int
    above_limit: int
    active: ActiveTrajectories
    sums: MetricSums
    tops: Sequence[TopTrajectory] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    critic_norms: Sequence[float] = ()
    interleaved_norms: Sequence[float] = ()


def step_metrics(report: UpdateReport, sums: Sequence[MetricSums]) -> dict[str, float]:
    """Metrics of a step's updates; `sums` are those of all ranks."""
    total = MetricSums.total(sums)
    metrics = total.metrics() | dict(report.metrics)
    metrics["gate/demonstration_share"] = report.active.demonstration_share
    metrics["gate/no_signal_prompts"] = report.active.no_signal_prompts
    metrics["trained/skipped_share"] = report.active.skipped_tokens
    metrics["grad_norm"] = _mean_finite(report.grad_norms)
    metrics["updates"] = sum(norm != math.inf for norm in report.grad_norms) - report.above_limit
    metrics["updates_above_limit"] = report.above_limit
    if report.critic_norms:
        metrics["critic/loss"] = total.value_loss / len(report.critic_norms)
        metrics["critic/grad_norm"] = _mean_finite(report.critic_norms)
    return metrics


def nonfinite(metrics: Mapping[str, float], report: UpdateReport) -> str:
    """Name a metric of the step that is unexpectedly NaN or infinite; empty if there is none.

    Two cases are expected: `stop.nonfinite_updates` handles updates skipped because their gradient was not finite, and
    the slope in `state/` is NaN in a step in which the policy does not learn.
    """
    if report.skipped:
        return ""
    bad = [name for name, value in metrics.items() if not math.isfinite(value) and not name.startswith("state/")]
    return f"the metric {bad[0]} is not finite" if bad else ""


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Metrics of all rollouts among a step's trajectories that it sampled itself, even if they never reach the model.

    `entropy` is the mean of -log π over sampled tokens, as the sampler reports it: at temperature 1 an unbiased
    estimate of the policy's token entropy (nats) on its own responses.
    """
    rollouts = [t for t in trajectories if t.is_fresh]
    if not rollouts:
        return {}
    n, tokens = len(rollouts), sum(len(t.response_ids) - t.prefix_tokens for t in rollouts)
    groups, solved = {t.group for t in rollouts}, {t.group for t in rollouts if t.passed}
    sampled = [t.sampler_logprobs or () for t in rollouts]
    return {
        "reward/mean": sum(t.reward for t in rollouts) / n,
        "pass_rate": sum(t.passed for t in rollouts) / n,
        "prompts_solved": len(solved) / len(groups),
        "entropy": -sum(map(sum, sampled)) / max(sum(map(len, sampled)), 1),
        "response_length": tokens / n,
        "response_cut_share": sum(not t.finished for t in rollouts) / n,
        "verify/failed_share": sum(t.status in FAILED for t in rollouts) / n,
        **_of_guided(rollouts),
        **_part_means(rollouts),
        **_same_answer(rollouts),
    }


def _of_guided(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """The share of rollouts that continue a demonstration, its mean length and their pass rate; empty if none do."""
    guided = [(t.guiding_tokens, t.passed) for t in rollouts if t.guiding_tokens]
    tokens, passed = (sum(column) / len(guided) for column in zip(*guided, strict=True)) if guided else (0.0, 0.0)
    values = {"share": len(guided) / len(rollouts), "prefix_tokens": tokens, "pass_rate": passed}
    return {f"guidance/{name}": value for name, value in values.items()} if guided else {}


def _part_means(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """The mean reward of each verifier of a sum, over the rollouts that it has verified."""
    parts: dict[str, list[float]] = {}
    for one in (one for t in rollouts for one in t.summands):
        parts.setdefault(one.name, []).append(one.reward)
    return {f"reward/{name}": sum(rewards) / len(rewards) for name, rewards in sorted(parts.items())}


#: With fewer prompts in a step, equal answers are no sign of a problem.
_FEWEST_PROMPTS = 4


def _same_answer(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """The share of rollouts with the most frequent answer; where no answer was read, the response counts as one."""
    if len({t.group for t in rollouts}) < _FEWEST_PROMPTS:
        return {}
    answers = Counter(t.extracted if t.extracted is not None else t.text_ids for t in rollouts)
    return {"same_answer_share": answers.most_common(1)[0][1] / len(rollouts)}


def _mean_finite(norms: Sequence[float]) -> float:
    """The mean of the finite norms; 0 without updates, NaN if all were skipped."""
    finite = [norm for norm in norms if norm != math.inf]
    return sum(finite) / len(finite) if finite else (math.nan if norms else 0.0)


class Recorder:
    """Decides what is measured in a step, and writes it to the run's folder; only the main rank writes.

    `examples` are the training set, and `prompting` decodes responses.
    """

    def __init__(self, config: RunConfig, examples: Sequence[Example], prompting: Prompting, folder: RunFolder) -> None:
        self.config, self.examples, self.prompting, self.folder = config, examples, prompting, folder

    def diagnostics(self, step: int) -> Diagnostics:
        """What to measure in a step, counted from 1; the same on every rank."""
        asked, edge = self.config.diagnose, step in (1, self.config.steps)
        periods = (self.config.log_rollouts, asked.gradients_every, asked.split_every)
        return Diagnostics(*(every > 0 and (edge or step % every == 0) for every in periods))

    def record_failed(self, step: int, trajectories: Sequence[Trajectory], failed: Sequence[Trajectory]) -> None:
        """Write the responses of a step whose verification failed, if there are any; `record` writes them again.

        Args:
            step: counted from 1.
            trajectories: the step's trajectories.
            failed: the rollouts whose verification failed, including those that are not among the step's trajectories.
        """
        if failed:
            kept = [t for t in trajectories if t.status in FAILED]
            self.folder.write_rows("rollouts", step, self._response_lines([*kept, *_dropped(failed, trajectories)]))

    def record(
        self,
        metrics: Mapping[str, float],
        active: ActiveTrajectories,
        tops: Sequence[TopTrajectory],
        failed: Sequence[Trajectory] = (),
    ) -> None:
        """Write the lines of a step.

        Args:
            metrics: the line of metrics.jsonl.
            active: the step's trajectories.
            tops: the trajectories with the largest token weights, of all ranks.
            failed: as for `record_failed`.
        """
        step = int(metrics["step"])
        self.folder.append("metrics.jsonl", metrics)
        self.folder.append("prompts.jsonl", *({"step": step, **line} for line in active.prompt_lines(self.examples)))
        if self.diagnostics(step).top_tokens:
            responses = [*active.trajectories, *_dropped(failed, active.trajectories)]
            self.folder.write_rows("rollouts", step, self._response_lines(responses))
            lines = (token_line(top, self.examples, self.prompting.read) for top in merged(tops))
            self.folder.write_rows("tokens", step, lines)

    def _response_lines(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
        """Lines of rollouts/step_*.jsonl; docs/metrics.md lists their fields."""
        texts = self.prompting.decode([t.text_ids for t in trajectories])
        problems = [self.examples[t.example].problem for t in trajectories]
        return [
            {
                "index": trajectory.index,
                "prompt": problem.prompt,
                "response": text,
                "answer": problem.answer,
                "reward": trajectory.reward,
                **({"rewards": {one.name: one.reward for one in own}} if (own := trajectory.summands) else {}),
                "level": problem.level,
                "status": trajectory.status,
                "detail": trajectory.detail,
                **{name: getattr(trajectory, name) for name in ("is_demonstration", "group")},
                **({"is_replayed": True} if trajectory.is_replayed else {}),
                **({"prefix_tokens": trajectory.guiding_tokens} if trajectory.guiding_tokens else {}),
                "tokens": len(trajectory.response_ids),
                "finished": trajectory.finished,
            }
            for trajectory, problem, text in zip(trajectories, problems, texts, strict=True)
        ]


def _dropped(failed: Sequence[Trajectory], trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The rollouts in `failed` that are not among the step's trajectories, because their prompts were redrawn."""
    kept = {(t.example, t.response_ids) for t in trajectories}
    return [replace(t, index=-1) for t in failed if (t.example, t.response_ids) not in kept]
