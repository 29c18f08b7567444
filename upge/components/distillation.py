"""Advantages towards another distribution: a teacher, the reference policy, or the uniform distribution.

Each is the derivative of minus a divergence with respect to the policy's probability of a token, up to a constant. On
the whole vocabulary (`upge.FullVocabulary`), the product of the four factors is then the exact gradient at each state.
On the sampled token, with the policy that sampled as denominator, it is a one-sample estimate of this gradient. On part
of the vocabulary (`upge.TopK`), it is the gradient of a divergence between measures that need not add up to 1, such as
Σ_v π log(π/ν) - π + ν over these tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, ReferenceDenominator
from upge.components.denominator import CurrentPolicy, UnitDenominator
from upge.components.mask import RATIO_COLUMNS
from upge.errors import ConfigError
from upge.formula import Formula, tex
from upge.views import TokenView, View

#: The model whose distribution is the target.
Target = Literal["teacher", "reference"]
_SYMBOLS = {"teacher": ("ν", r"\nu"), "reference": ("π_0", r"\pi_0")}


class Divergence(AdvantageEstimator):
    """An advantage that is the derivative of minus a divergence D of the policy's distribution at a state.

    On the whole vocabulary, with `denominator` as the reference denominator, Â/π_ref at a token v is -∂D/∂π_θ(v), up to
    a constant that is equal for all v. `upge.DivergencePenalty` makes a regularizer of it.

    Attributes:
        denominator: class attribute; 1/π_ref.
    """

    denominator: ClassVar[ReferenceDenominator] = UnitDenominator()

    def divergence(self, batch: View, advantages: Float[Tensor, "N K"], mean: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """D at each token in nats, detached, as a sum over the candidates. The default is -`mean`.

        Args:
            batch: a view with [N, K] columns.
            advantages: Â of each candidate.
            mean: Σ_v π_θ(v)·Â_v.
        """
        return -mean


class _TowardsTarget(Divergence):
    """A divergence from a target, whose log-probs it reads."""

    target: Target

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a setting
        """The policy's log-probs and the target's."""
        return frozenset({"logprobs", f"{self.target}_logprobs"})

    def logs(self, batch: TokenView) -> tuple[Tensor, Tensor]:
        """(log π_θ, log of the target), detached."""
        target = batch.teacher_logprobs if self.target == "teacher" else batch.reference_logprobs
        return batch.logprobs.detach(), target.detach()


@dataclass(frozen=True)
class LogRatio(_TowardsTarget):
    """Â = log ν - log π_θ: the gradient of the reverse KL, -KL(π_θ‖ν).

    On sampled tokens with the behavior policy as denominator this is on-policy distillation by policy gradient; on the
    whole vocabulary with `UnitDenominator` it is the exact gradient of -KL(π_θ(·|t)‖ν(·|t)) at each state t.

    Attributes:
        target: ν, the 'teacher' or the 'reference' policy.
    """

    target: Target = "teacher"

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        policy, target = self.logs(batch)
        return target - policy

    def formula(self) -> Formula:
        text, latex = _SYMBOLS[self.target]
        return Formula(f"log({text}/π_θ)", rf"\log\frac{{{latex}}}{{\pi_\theta}}")


@dataclass(frozen=True)
class TargetProbability(_TowardsTarget):
    """Â = ν: with the current policy as denominator the gradient of the forward KL, -KL(ν‖π_θ).

    If ν is 1 at the sampled token, this is maximum likelihood.

    Attributes:
        target: ν, the 'teacher' or the 'reference' policy.
    """

    target: Target = "teacher"
    denominator: ClassVar[ReferenceDenominator] = CurrentPolicy()

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return self.logs(batch)[1].exp()

    def divergence(self, batch: TokenView, advantages: Tensor, mean: Tensor) -> Float[Tensor, "N"]:
        """Σ_v ν·log(ν/π_θ)."""
        policy, target = self.logs(batch)
        return (advantages * (target - policy)).sum(dim=-1)

    def formula(self) -> Formula:
        return Formula(*_SYMBOLS[self.target])


@dataclass(frozen=True)
class JensenShannon(_TowardsTarget):
    """Â = (1 - beta)·log(m/π_θ) with m = beta·ν + (1 - beta)·π_θ: the gradient of minus the generalized JSD.

    JSD = beta·KL(ν‖m) + (1 - beta)·KL(π_θ‖m) (arXiv 2306.13649). For beta towards 0, JSD/beta tends to the forward KL;
    for beta towards 1, JSD/(1 - beta) tends to the reverse KL.

    Attributes:
        beta: the share of the target in the mixture m, between 0 and 1.
        target: ν, the 'teacher' or the 'reference' policy.
    """

    beta: float = 0.5
    target: Target = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"JensenShannon.beta: {self.beta} must be between 0 and 1; the limits are upge.TargetProbability "
                "(forward KL) and upge.LogRatio (reverse KL)"
            )

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        policy, target = self.logs(batch)
        # log(m/π) = log(1 - beta) + softplus(log ν/π + log beta/(1 - beta)), which overflows nowhere.
        odds = target - policy + math.log(self.beta / (1 - self.beta))
        return (1 - self.beta) * (math.log(1 - self.beta) + torch.nn.functional.softplus(odds))

    def divergence(self, batch: TokenView, advantages: Tensor, mean: Tensor) -> Float[Tensor, "N"]:
        """Σ_v beta·ν·log(ν/m) + (1 - beta)·π_θ·log(π_θ/m)."""
        policy, target = self.logs(batch)
        of_target = (target.exp() * (target - policy - advantages / (1 - self.beta))).sum(dim=-1)
        return self.beta * of_target - mean

    def formula(self) -> Formula:
        (text, latex), beta, rest = _SYMBOLS[self.target], self.beta, 1 - self.beta
        return Formula(
            f"{rest:g}·log(({beta:g}·{text} + {rest:g}·π_θ)/π_θ)",
            rf"{tex(rest)}\log\frac{{{tex(beta)}{latex}+{tex(rest)}\pi_\theta}}{{\pi_\theta}}",
        )


@dataclass(frozen=True)
class Surprisal(Divergence):
    """Â = -log π_θ: the gradient of the entropy. On the whole vocabulary, with `UnitDenominator`, it is exact.

    Its divergence is minus the entropy, which is the KL from the uniform distribution up to a constant.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return -batch.logprobs.detach()

    def formula(self) -> Formula:
        return Formula("−log π_θ", r"\left(-\log\pi_\theta\right)")


@dataclass(frozen=True)
class RatioSign(AdvantageEstimator):
    """Â = -sign(log r), r = π_θ/π_behavior: with the current policy as denominator the gradient of -|log r|.

    It is 0 where the policies agree, so it needs data of an older policy, as in a step of several updates.
    """

    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return -batch.log_importance_ratio.sign()

    def formula(self) -> Formula:
        return Formula("−sign(log r)", r"\left(-\mathrm{sign}\log r\right)")


@dataclass(frozen=True)
class SampledTarget(AdvantageEstimator):
    """Â = 1 at the sampled token and 0 at the others: maximum likelihood on a support beyond the sampled token.

    Use it in terms whose other parts look at the whole distribution, such as `upge.EntropyLikelihood`. On the sampled
    token alone it is `ConstantAdvantage(1)`. With `upge.TopK`, a position whose sampled token is not among the k
    contributes nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"is_sampled"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return batch.is_sampled.double()

    def formula(self) -> Formula:
        return Formula("[v = y]", "[v=y]")


@dataclass(frozen=True)
class TiltedReference(AdvantageEstimator):
    """Â = π_0·exp(beta·[v = y])/Σ: the reference policy with the log-odds of the sampled token y raised by beta.

    With the current policy as denominator this is the gradient of minus the cross-entropy of that target, on the whole
    vocabulary (arXiv 2601.09233). beta = 0 keeps the reference policy; a large beta is maximum likelihood.

    Attributes:
        beta: in nats, not negative.
    """

    beta: float = 20.0
    reads: ClassVar[frozenset[str]] = frozenset({"reference_logprobs", "is_sampled"})
    needs_vocabulary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"TiltedReference.beta: {self.beta} must be finite and not negative")

    def __call__(self, batch: TokenView) -> Float[Tensor, "N V"]:
        return (batch.reference_logprobs.detach() + self.beta * batch.is_sampled).softmax(dim=-1)

    def formula(self) -> Formula:
        beta = f"{self.beta:g}"
        return Formula(f"softmax(log π_0 + {beta}·[v = y])", rf"\mathrm{{softmax}}(\log\pi_0+{beta}\,[v=y])")
