"""r: what each token earned. Advantages that add up rewards over time take one of these; all are known before the
forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import Formula, TokenReward
from upge.errors import ConfigError
from upge.trajectories import Trajectories

KLKind = Literal["k1", "k2", "k3"]


def kl_value(log_ratio: Tensor, kind: KLKind) -> Tensor:
    """A sample's estimate of KL(π‖π_frozen) from d = log π_frozen - log π: k1 = -d, k2 = d²/2, k3 = e^d - d - 1.

    k1 has the right mean under π and any sign; k3 has it too and is never negative; k2 is close where d is small.
    """
    if kind == "k1":
        return -log_ratio
    return log_ratio.square() / 2 if kind == "k2" else torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True)
class OutcomeReward(TokenReward):
    """The trajectory's reward on the last token that counts, nothing before it. An empty response earns nothing."""

    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        mask = batch.response_mask
        last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
        return batch.rewards.double()[:, None] * last

    def formula(self) -> Formula:
        return Formula("R", "R")


@dataclass(frozen=True)
class KLPenalizedReward(TokenReward):
    """r_t - coefficient·k(π_old, π_frozen)_t: a KL penalty paid token by token, as in arXiv 2009.01325.

    Of the policy that generated the data, not the current one, so it is the same in all updates of a step. `kind` is
    one of the estimators of `kl_value`; with k1 the sum over a response is its log-probability ratio.
    Demonstrations pay it too: for them π_old is the policy before the step's updates.
    """

    reward: TokenReward
    coefficient: float = 0.001
    kind: KLKind = "k1"
    reads: ClassVar[frozenset[str]] = frozenset({"behavior_logprobs", "reference_logprobs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient < 0:
            raise ConfigError(
                f"KLPenalizedReward.coefficient: {self.coefficient} would pay for leaving the frozen policy; "
                "0.001 is customary with verified rewards"
            )

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        log_ratio = (batch.reference_logprobs.double() - batch.behavior_logprobs.double()) * batch.response_mask
        return self.reward(batch) - self.coefficient * kl_value(log_ratio, self.kind)

    def formula(self) -> Formula:
        inner = self.reward.formula()
        return Formula(
            f"{inner.text} − {self.coefficient:g}·{self.kind}(π_old, π_frozen)",
            rf"{inner.latex}-{self.coefficient:g}\,\mathrm{{{self.kind}}}(\pi_{{old}},\pi_{{frozen}})",
        )
