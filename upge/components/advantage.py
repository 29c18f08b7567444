"""Â: how good a token was. Advantages of rewards and groups are computed once, on the whole batch, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from upge.components.base import AdvantageEstimator, like
from upge.errors import ConfigError
from upge.formula import Formula, tex
from upge.views import Members, TokenView, TrajectoryView, group_sum, masked_mean

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
    """Â = `success` for a success of the batch, by default a reward above 0.5, else `failure`.

    The default ±1 is that of arXiv 2509.04419, table 1.
    """

    success: float = 1.0
    failure: float = -1.0
    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})
    graded: ClassVar[bool] = False

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        succeeded = batch.success.double()
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
        baseline: the trajectories whose rewards give mean and std: the group's 'rollouts', or the whole 'group',
            including its demonstrations (arXiv 2504.14945).
    """

    normalize_std: bool = True
    epsilon: float = 1e-6
    unbiased: bool = True
    baseline: Members = "rollouts"
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
        # The mean of equal rewards is exactly one of them: a rounding error would be divided by a tiny std.
        centred = batch.rewards.double() - batch.group_mean(batch.rewards, self.baseline)
        if self.normalize_std:
            number = batch.group_sum(torch.ones_like(centred), self.baseline) - int(self.unbiased)
            deviation = (batch.group_sum(centred.square(), self.baseline) / number.clamp(min=1)).sqrt()
            centred = torch.where(deviation > 0, centred / (deviation + self.epsilon), torch.zeros_like(centred))
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
class GuidedRelative(AdvantageEstimator):
    """Â for groups in which some rollouts, the guided ones, continue a demonstration (arXiv 2507.01679).

    With `baseline` 'alike', Â is R - mean R over the group's rollouts of the same kind, guided or plain. With 'plain',
    Â is (R - mean R over the plain rollouts)/k in a group with k guided rollouts: how much better the policy does with
    the beginning of the demonstration than without. It is 0 in a group without plain rollouts.
    """

    baseline: Literal["alike", "plain"] = "alike"
    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS | {"is_guided"}
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        guided, rewards = batch.is_guided, batch.rewards.double()
        plain = ~guided & ~batch.is_demonstration
        expected = batch.group_mean(rewards, plain)
        if self.baseline == "alike":
            expected = torch.where(guided, batch.group_mean(rewards, guided), expected)
            return _per_token(rewards - expected, batch)
        number = batch.group_sum(guided).clamp(min=1)
        return _per_token((rewards - expected) / number * (batch.group_sum(plain) > 0), batch)

    def formula(self) -> Formula:
        if self.baseline == "alike":
            return Formula("(R − mean_alike R)", r"\left(R-\mathrm{mean}_{alike}R\right)")
        return Formula("(R − mean_plain R)/k", r"\frac{R-\mathrm{mean}_{plain}R}{k}")


@dataclass(frozen=True)
class MeanNormalized(AdvantageEstimator):
    """Â = (R - mean R)/mean R over the group's rollouts; 0 where mean R ≤ 0 (arXiv 2602.02710).

    For rewards of 0 and 1 and on-policy groups of n, the expected mean of Â·∇log π(τ) is the gradient of the first
    n - 1 terms of log P = -Σ_k (1 - P)^k/k, P the probability of success. For n = 2 this is ∇P. For n much larger than
    1/P it is close to the gradient of maximum likelihood, ∇log P.
    """

    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        mean = batch.group_mean(batch.rewards)
        relative = (batch.rewards.double() - mean) / torch.where(mean > 0, mean, torch.ones_like(mean))
        return _per_token(torch.where(mean > 0, relative, torch.zeros_like(mean)), batch)

    def formula(self) -> Formula:
        return Formula("(R − mean R)/mean R", r"\frac{R-\mathrm{mean}R}{\mathrm{mean}R}")


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
    """Â = R_i - mean R_j over the group's other rollouts j ≠ i (arXiv 2402.14740).

    The baseline is independent of the sample, so the estimator is unbiased. It equals n/(n-1)·(R - mean R). For a
    demonstration, the other rollouts are all rollouts of the group.
    """

    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        rewards, is_rollout = batch.rewards.double(), (~batch.is_demonstration).double()
        others = batch.group_sum(is_rollout) - is_rollout
        baseline = (batch.group_sum(rewards) - rewards * is_rollout) / others.clamp(min=1)
        return _per_token((rewards - baseline) * (others > 0), batch)

    def formula(self) -> Formula:
        return Formula("(R_i − mean_{j≠i} R_j)", r"\left(R_i-\mathrm{mean}_{j\ne i}R_j\right)")


@dataclass(frozen=True)
class PromptBaseline(AdvantageEstimator):
    """Â = R - v, v the value of the trajectory's prompt in the memory of prompts before this step.

    v is the column `prompt_value`, so the algorithm needs a `memory`, such as `upge.DecayedMean`. v does not depend on
    the rollouts of this step, so it adds no bias, and one rollout per prompt is enough (arXiv 2509.13232).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "prompt_value"})

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        return _per_token(batch.rewards.double() - batch.prompt_value.double(), batch)

    def formula(self) -> Formula:
        return Formula("(R − v)", r"\left(R-v\right)")


@dataclass(frozen=True)
class OptimalTokenBaseline(AdvantageEstimator):
    """Â_t = R - Σ W_t R/Σ W_t over the group's rollouts that have a token t, W_t = Σ_{k≤t} ‖∂ log π_k/∂z_k‖².

    See arXiv 2602.07078. The baseline at each place t has the smallest variance, if the squared norm of a response's
    score up to t is the sum of the squared norms of its tokens' scores with respect to their logits z. W_t is the
    cumulative sum of the column `score_norms`. The baseline includes the sample itself, which is a bias of order 1/n in
    groups of n, as in `GroupRelative`. A demonstration is compared with the baseline of its group's rollouts.

    Attributes:
        alone: Â_t of a rollout that is the only one of its group with a token t: 'reward' = R, as without a baseline;
            'zero' = 0, which is what the formula gives.
    """

    alone: Literal["reward", "zero"] = "reward"
    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS | {"score_norms"}
    min_group_size: ClassVar[int] = 2

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        mask, place = batch.response_mask, (batch.response_mask.cumsum(dim=1) - 1).clamp(min=0)

        def by_place(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(values).scatter_add(1, place, values * mask)

        weights = by_place(batch.score_norms.double().cumsum(dim=1))
        rewards, total = batch.rewards.double()[:, None], batch.group_sum(weights)
        # The differences of equal rewards are exactly 0, so their sum is not divided by a tiny total.
        centre = batch.group_mean(batch.rewards)[:, None]
        baseline = centre + batch.group_sum(weights * (rewards - centre)) / torch.where(total > 0, total, 1.0)
        number = batch.group_sum(by_place(mask.double()))
        lonely = (number < 1) | (number == 1) & ~batch.is_demonstration[:, None]
        advantages = torch.where(lonely, rewards if self.alone == "reward" else 0.0, rewards - baseline)
        return advantages.gather(1, place)

    def formula(self) -> Formula:
        return Formula("(R − Σ W_t R/Σ W_t)", r"\left(R-\frac{\sum W_t R}{\sum W_t}\right)")


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


@dataclass(frozen=True)
class GroupClassification(AdvantageEstimator):
    """Â = ±(1/temperature)·e^∓z/(1 + Σ e^∓z), z = mean_t log(π_θ/π_behavior)/temperature (arXiv 2602.05630).

    The upper signs and the sum are those of the group's successes, the lower ones those of its failures. A success is
    pushed up more if its likelihood has grown less; for a failure it is the reverse. With the current policy
    as denominator this is minus the gradient of log(1 + Σ_successes e^-z) + log(1 + Σ_failures e^z), a classification
    of the group's rollouts by their likelihood ratio against an anchor at 0. It is 0 where all rollouts succeed or all
    fail. |Â| is below 1/temperature.
    """

    temperature: float = 0.5
    reads: ClassVar[frozenset[str]] = GROUP_COLUMNS | {"logprobs", "behavior_logprobs"}
    reach: ClassVar[str] = "group"
    min_group_size: ClassVar[int] = 2
    graded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"GroupClassification.temperature: {self.temperature} must be positive and finite; 0.5 is customary"
            )

    def __call__(self, batch: TrajectoryView) -> Float[torch.Tensor, "B T"]:
        success = batch.success
        scores = masked_mean(batch.log_importance_ratio, batch.response_mask)
        sign = torch.where(success, 1.0, -1.0).to(scores.dtype)
        z = (-sign * scores[:, 0] / self.temperature).masked_fill(batch.is_demonstration, -math.inf)
        index = 2 * batch.group_index + success.long()  # per group: one for its failures, one for its successes
        largest = group_sum(torch.zeros_like(z), index).scatter_reduce(0, index, z, "amax")  # at least the anchor's 0
        total = torch.exp(-largest) + group_sum(torch.exp(z - largest[index]), index)
        values = sign * torch.exp(z - largest[index]) / (total[index] * self.temperature)
        both = batch.group_sum(success) * batch.group_sum(~success) > 0
        return _per_token(torch.where(both, values, torch.zeros_like(values)), batch)

    def formula(self) -> Formula:
        tau = f"{self.temperature:g}"
        return Formula(
            f"±e^∓z/(1 + Σ e^∓z)/{tau}, z = log(π_θ(τ)/π_old(τ))/({tau}|τ|)",
            rf"\pm\frac{{e^{{\mp z}}}}{{{tau}\,(1+\sum e^{{\mp z}})}},\ "
            rf"z=\frac{{1}}{{{tau}|\tau|}}\log\frac{{\pi_\theta(\tau)}}{{\pi_{{old}}(\tau)}}",
        )
