"""Token rewards, and advantages that add them up over time. All of them are known before the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, TokenReward
from upge.errors import ConfigError, nearest
from upge.formula import Formula, tex
from upge.views import TrajectoryView

KLKind = Literal["k1", "k2", "k3"]


def kl_value(log_ratio: Tensor, kind: KLKind) -> Tensor:
    """An estimate of KL(π‖π_0) from samples of π, with d = log π_0 - log π.

    - 'k1', -d: unbiased; can be negative.
    - 'k2', d²/2: biased, but close where d is small.
    - 'k3', e^d - d - 1: unbiased and never negative.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in get_args(KLKind):
        raise ConfigError(f"found {kind!r}; {nearest(str(kind), get_args(KLKind))}", "kind")
    if kind == "k1":
        return -log_ratio
    return log_ratio.square() / 2 if kind == "k2" else torch.expm1(log_ratio) - log_ratio


def discounted_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], discount: float) -> Float[Tensor, "B T"]:
    """[B, T] Σ_{k≥t} discount^(k-t)·values_k, where k and t number the tokens of `mask`; the others are skipped.

    The sums are built from windows of 1, 2, 4, ... tokens, in log₂ T operations on whole columns.
    """
    total, factor, width = values * mask, torch.ones_like(values).masked_fill(mask, discount), 1
    while width < mask.shape[1]:
        later = torch.nn.functional.pad(total[:, width:], (0, width))
        total = total + factor * later
        factor = factor * torch.nn.functional.pad(factor[:, width:], (0, width), value=1.0)
        width *= 2
    return total


@dataclass(frozen=True)
class OutcomeReward(TokenReward):
    """The trajectory's reward on the last token that counts, and 0 before it. An empty response has no reward."""

    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        mask = batch.response_mask
        last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
        return batch.rewards.double()[:, None] * last

    def formula(self) -> Formula:
        return Formula("R", "R")


@dataclass(frozen=True)
class KLPenalizedReward(TokenReward):
    """r_t - coefficient·k(π_old, π_0)_t: a KL penalty on each token's reward, as in arXiv 2009.01325.

    π_old is the policy that generated the data, not the current one, so the penalty is the same in all updates of a
    step. It also applies to demonstrations, where π_old is the policy before the step's updates.

    Attributes:
        coefficient: the reward lost per nat.
        kind: the estimate of `kl_value`. With k1 the sum over a response is its log-probability ratio.
    """

    reward: TokenReward
    coefficient: float = 0.001
    kind: KLKind = "k1"
    reads: ClassVar[frozenset[str]] = frozenset({"behavior_logprobs", "reference_logprobs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient < 0:
            raise ConfigError(
                f"KLPenalizedReward.coefficient: {self.coefficient} would reward a distance from the reference policy; "
                "0.001 is customary with verified rewards"
            )

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        assert batch.behavior_logprobs is not None, "a part that does not read `logprobs` always has this column"
        log_ratio = (batch.reference_logprobs.double() - batch.behavior_logprobs.double()) * batch.response_mask
        return self.reward(batch) - self.coefficient * kl_value(log_ratio, self.kind)

    def formula(self) -> Formula:
        inner = self.reward.formula()
        return Formula(
            f"{inner.text} − {self.coefficient:g}·{self.kind}(π_old, π_0)",
            rf"{inner.latex}-{tex(self.coefficient)}\,\mathrm{{{self.kind}}}(\pi_{{old}},\pi_0)",
        )


def _reward_formula(reward: TokenReward) -> tuple[str, str]:
    """The addition to a formula for a reward other than the outcome's, as text and as LaTeX."""
    inner = reward.formula()
    return ("", "") if isinstance(reward, OutcomeReward) else (f"; r = {inner.text}", rf";\,r={inner.latex}")


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalized advantage estimation: Â_t = Σ_k (discount·lam)^k δ_{t+k} with δ_t = r_t + discount·V_{t+1} - V_t.

    See arXiv 1506.02438. V is 0 after the last token that counts. Tokens that do not count are skipped.
    """

    discount: float = 1.0
    lam: float = 0.95
    reward: TokenReward = OutcomeReward()
    reads: ClassVar[frozenset[str]] = frozenset({"values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.discount <= 1 and 0 <= self.lam <= 1):
            raise ConfigError(f"GAE: discount={self.discount}, lam={self.lam}; both must lie in [0, 1]")

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        mask, values, rewards = batch.response_mask, batch.values.double(), self.reward(batch)
        advantages = torch.zeros_like(values)
        following, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
        for t in reversed(range(mask.shape[1])):
            counts = mask[:, t]
            delta = rewards[:, t] + self.discount * next_value - values[:, t]
            advantages[:, t] = torch.where(counts, delta + self.discount * self.lam * following, 0.0)
            following = torch.where(counts, advantages[:, t], following)
            next_value = torch.where(counts, values[:, t], next_value)
        return advantages

    def formula(self) -> Formula:
        text, latex = _reward_formula(self.reward)
        return Formula(
            f"GAE(γ={self.discount:g}, λ={self.lam:g}{text})", rf"\hat A^{{GAE({self.discount:g},{self.lam:g}{latex})}}"
        )


@dataclass(frozen=True)
class ReturnToGo(AdvantageEstimator):
    """Â_t = Σ_{k≥t} discount^(k-t)·r_k: the return from token t on, without a baseline (arXiv 2501.03262).

    Tokens that do not count are skipped, so k and t number the tokens that count.
    """

    discount: float = 1.0
    reward: TokenReward = OutcomeReward()
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"ReturnToGo.discount: {self.discount} must lie in [0, 1]; 1.0 is customary")

    def __call__(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        mask, rewards = batch.response_mask, self.reward(batch)
        returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        for t in reversed(range(mask.shape[1])):
            following = torch.where(mask[:, t], rewards[:, t] + self.discount * following, following)
            returns[:, t] = torch.where(mask[:, t], following, 0.0)
        return returns

    def formula(self) -> Formula:
        inner, discount = self.reward.formula(), f"{self.discount:g}"
        power = ("", "") if self.discount == 1 else (f"{discount}^(k−t)·", rf"{discount}^{{k-t}}")
        return Formula(
            f"Σ_{{k≥t}} {power[0]}[{inner.text}]_k", rf"\sum_{{k\ge t}}{power[1]}\left[{inner.latex}\right]_k"
        )
