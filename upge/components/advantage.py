"""Â: how good a token was. Advantages of rewards and groups are computed once, on the whole batch, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from upge.components.base import AdvantageEstimator, like
from upge.errors import ConfigError
from upge.formula import Formula, tex
from upge.views import TokenView, TrajectoryView, group_sum

GROUP_COLUMNS = frozenset({"rewards", "group", "is_demonstration"})


def _per_token(values: torch.Tensor, batch: TrajectoryView) -> torch.Tensor:
    """[B] → [B, T], without copying."""
    return values[:, None].expand(batch.response_mask.shape)


@dataclass(frozen=True)
class ConstantAdvantage(AdvantageEstimator):
    """Â = value on every token. 1 gives maximum likelihood on demonstrations."""

    value: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenView) -> Float[torch.Tensor, "*shape"]:
        return like(batch, self.value)

    def formula(self) -> Formula:
        return Formula(f"{self.value:g}", f"{self.value:g}")


@dataclass(frozen=True)
class SignedReward(AdvantageEstimator):
    """Â = `success` if the reward exceeds the batch's `pass_threshold` (0.5), else `failure`.

    The default ±1 is that of arXiv 2509.04419, table 1.
    """

    success: float = 1.0
    failure: float = -1.0
    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})
    graded: ClassVar[bool] = False

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        succeeded = (batch.rewards > batch.pass_threshold).double()
        return _per_token(succeeded * self.success + (1 - succeeded) * self.failure, batch)

    def formula(self) -> Formula:
        return Formula(
            f"({self.success:+g} if R=1 else {self.failure:+g})",
            rf"\left({self.success:+g}\ \text{{if}}\ R{{=}}1,\ \text{{else}}\ {self.failure:+g}\right)",
        )


@dataclass(frozen=True)
class GroupRelative(AdvantageEstimator):
    """Â = R - mean R over the group, divided by std R + epsilon if `normalize_std`.

    With the division this is the advantage of arXiv 2402.03300, without it that of arXiv 2503.20783. If all rewards of
    the baseline are equal, the advantage is 0, even with epsilon = 0. With `normalize_std` this includes demonstrations
    outside the baseline, because there is no scale for them.

    Attributes:
        normalize_std: True = divide by std R + epsilon.
        epsilon: added to the standard deviation.
        unbiased: True = the variance is divided by n - 1 instead of n.
        baseline: whose rewards mean and std are taken over: the group's 'rollouts', or the whole 'group', including
            its demonstrations (arXiv 2504.14945).
    """

    normalize_std: bool = True
    epsilon: float = 1e-6
    unbiased: bool = True
    baseline: Literal["rollouts", "group"] = "rollouts"
    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0:
            raise ConfigError(f"GroupRelative.epsilon: {self.epsilon} must not be negative; 1e-6 is customary")

    @property
    def counts_demonstrations(self) -> bool:
        return self.baseline == "group"

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        index, rewards = batch.group_index, batch.rewards.double()
        in_baseline = ~batch.is_demonstration
        if self.baseline == "group":
            in_baseline = torch.ones_like(in_baseline)
        counts = in_baseline.double()
        number = group_sum(counts, index)
        mean = group_sum(rewards * counts, index) / number.clamp(min=1)
        # The mean of equal rewards must be exactly one of them: a rounding error would be divided by a tiny std.
        example = mean.clone()
        example[index[in_baseline]] = rewards[in_baseline]
        differs = group_sum(((rewards != example[index]) & in_baseline).double(), index) > 0
        centred = rewards - torch.where(differs, mean, example)[index]
        if self.normalize_std:
            squares = group_sum(centred.square() * counts, index)
            variance = squares / (number - int(self.unbiased)).clamp(min=1)
            divisor = torch.where(differs, variance.sqrt() + self.epsilon, torch.ones_like(variance))[index]
            centred = torch.where(differs[index], centred / divisor, torch.zeros_like(centred))
        return _per_token(centred, batch)

    def formula(self) -> Formula:
        over = "" if self.baseline == "rollouts" else "_{on ∪ off}"
        latex_over = "" if self.baseline == "rollouts" else r"_{on\,\cup\,off}"
        text, latex = f"R − mean{over} R", rf"R-\mathrm{{mean}}{latex_over}R"
        if not self.normalize_std:
            return Formula(f"({text})", rf"\left({latex}\right)")
        return Formula(
            f"({text})/(std{over} R + {self.epsilon:g})",
            rf"\frac{{{latex}}}{{\mathrm{{std}}{latex_over}R+{tex(self.epsilon)}}}",
        )


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
    """Â = R_i - mean R_j over the group's other rollouts j ≠ i (arXiv 2402.14740).

    The baseline is independent of the sample, so the estimator is unbiased. It equals n/(n-1)·(R - mean R). For a
    demonstration, the other rollouts are all rollouts of the group.
    """

    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        index, rewards = batch.group_index, batch.rewards.double()
        is_rollout = (~batch.is_demonstration).double()
        others = group_sum(is_rollout, index)[index] - is_rollout
        baseline = (group_sum(rewards * is_rollout, index)[index] - rewards * is_rollout) / others.clamp(min=1)
        return _per_token((rewards - baseline) * (others > 0), batch)

    def formula(self) -> Formula:
        return Formula("(R_i − mean_{j≠i} R_j)", r"\left(R_i-\mathrm{mean}_{j\ne i}R_j\right)")


@dataclass(frozen=True)
class PairwisePreference(AdvantageEstimator):
    """Â = ±beta·σ(-h), h = beta·[log π_θ/π_0(chosen) - log π_θ/π_0(rejected)].

    With the current policy as denominator this is the gradient of the pairwise objective of arXiv 2305.18290. π_0
    is the reference policy. Log-ratios are summed over tokens, not averaged.

    Raises:
        ValueError: the trajectories of a group that have a preference are not one chosen and one rejected.
    """

    beta: float = 0.1
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "reference_logprobs", "preference", "group"})
    reach: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"PairwisePreference.beta: {self.beta} must be positive; 0.1 is customary")

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        index, sign = batch.group_index, batch.preference.to(batch.logprobs.dtype)
        chosen, rejected = (group_sum((batch.preference == s).double(), index) for s in (1, -1))
        if not torch.equal(chosen, rejected) or bool((chosen > 1).any()):
            bad = int(batch.group[index == int(((chosen != rejected) | (chosen > 1)).nonzero()[0])][0])
            raise ValueError(
                f"preference: group {bad} must hold exactly one chosen (+1) and one rejected (-1) response"
            )
        log_ratio = (batch.logprobs.detach() - batch.reference_logprobs).sum(dim=1)
        margin = self.beta * group_sum(sign * log_ratio, index)
        return _per_token(sign * self.beta * torch.sigmoid(-margin)[index], batch)

    def formula(self) -> Formula:
        return Formula(f"±{self.beta:g}·σ(−h)", rf"\pm{self.beta:g}\,\sigma(-h)")
