"""Additive penalties, and the critic's loss.

Each penalty adds coefficient · Σ w·penalty to the loss, summed over the trajectories of its source that count in some
term, so the divisors of the terms do not change. A penalty on the sampled tokens gets its gradient by autograd. One on
the whole distribution has the coefficients of a term on a support (`upge.support`). The critic's loss is separate,
because the critic has its own parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, Component
from upge.components.distillation import Divergence
from upge.components.mask import NoMask
from upge.components.returns import KLKind, kl_value
from upge.components.shaping import Whitened
from upge.errors import ConfigError
from upge.estimator import UnifiedGradient
from upge.formula import Formula, tex, weighted_sum
from upge.reduction import Reduction, TokenMean
from upge.support import FullVocabulary, SampledToken, Support
from upge.trajectories import Source
from upge.views import LIVE_COLUMNS, TokenView, TrajectoryView, View


class Regularizer(Component):
    """A penalty per token.

    Every concrete regularizer has these fields:

    Attributes:
        coefficient: the factor of the penalty in the loss.
        reduction: the weights w.
        source: the trajectories that it applies to.
    """

    evaluated_separately: ClassVar[frozenset[str]] = frozenset({"reduction"})

    coefficient: float
    reduction: Reduction
    source: Source

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spans_update:
            raise ConfigError(
                f"{type(self).__name__} has reach 'batch' or wraps a part that has it, but a regularizer is evaluated "
                "in each micro-batch; write the penalty as a term, whose mask selects its tokens"
            )

    @abstractmethod
    def __call__(self, batch: View) -> Float[Tensor, "*shape"]:
        """The penalty of each token, with gradient."""

    def summed_formula(self, factor: float, gradient: Formula) -> Formula:
        """± Σ_τ |factor| · w · Σ_t gradient over the source: what `formula` returns for a gradient of ∇J per token."""
        text, latex = ("−", "-") if factor < 0 else ("+", "+")
        size = Formula(f"{abs(factor):g}", tex(abs(factor)))
        total = weighted_sum(self.source, [size, self.reduction.formula()], gradient)
        return Formula(f"{text} {total.text}", latex + total.latex)

    def formula(self) -> Formula:
        """−coefficient · Σ w · ∇penalty, the penalty by its class name and the settings of its own."""
        penalty = self.named_formula(without=("coefficient", "reduction", "source"))
        return self.summed_formula(-self.coefficient, Formula(f"∇{penalty.text}", rf"\nabla {penalty.latex}"))


@dataclass(frozen=True)
class EntropyBonus(Regularizer):
    """-H(π_θ(·|t)), the negative full-vocabulary entropy.

    It is additive because its gradient is not a multiple of ∇π_θ(y_t). It is `DivergencePenalty` with `Surprisal` on
    the whole vocabulary, k_v = -π_v·log π_v at each candidate v. The output head evaluates this k in place, which is
    faster. A batch with entropies needs no distributions.
    """

    coefficient: float
    reduction: Reduction
    source: Source = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        return -batch.entropies

    def formula(self) -> Formula:
        return self.summed_formula(self.coefficient, Formula("∇H", r"\nabla H"))


@dataclass(frozen=True)
class KLPenalty(Regularizer):
    """A penalty per token on the distance to the reference policy, a function of d = log π_0 - log π_θ.

    `kind` selects the function. The expected gradient on on-policy samples, given the tokens before, is

    - 'k3', e^d - d - 1: the gradient of KL(π_0‖π_θ), the forward KL;
    - 'k2', d²/2: the gradient of KL(π_θ‖π_0), the reverse KL;
    - 'k1', -d: zero, because it is a constant times ∇log π_θ. As a loss, k1 has no effect in expectation if tokens are
      summed. Under a mean over tokens, whose weights depend on the lengths of responses, it lowers the log-probs of
      short responses, whatever the reference policy.

    With `importance` the penalty is multiplied by r = π_θ/π_behavior, with its gradient (arXiv 2512.02556). Then k3
    gives r·log(π_θ/π_0)·∇log π_θ: the gradient of the reverse KL without bias, also on data of an older policy.

    None of them includes the effect of a token on later distances, so for responses of several tokens none is the
    gradient of the KL between whole responses. `upge.KLShaped` with `future` is. See docs/theory.md for numbers.
    """

    coefficient: float
    reduction: Reduction
    kind: KLKind = "k3"
    source: Source = "rollouts"
    importance: bool = False

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a setting
        """The log-probs of the two policies, and those of the behavior policy for the ratio."""
        return frozenset({"logprobs", "reference_logprobs"} | ({"behavior_logprobs"} if self.importance else set()))

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        penalty = kl_value(batch.reference_logprobs.detach() - batch.logprobs, self.kind)
        return torch.exp(batch.logprobs - batch.log_behavior.detach()) * penalty if self.importance else penalty

    def formula(self) -> Formula:
        text, latex = ("∇[r·{}(π_θ, π_0)]", r"\nabla[r\,{}]") if self.importance else ("∇{}(π_θ, π_0)", r"\nabla {}")
        distance = Formula(text.format(self.kind), latex.format(rf"\mathrm{{{self.kind}}}(\pi_\theta,\pi_0)"))
        return self.summed_formula(-self.coefficient, distance)


@dataclass(frozen=True)
class DivergencePenalty(Regularizer):
    """A divergence D of the policy's distribution at each token, exact where a `KLPenalty` has one sample.

    Its gradient has the coefficients k_v = π_θ(v)·Â_v/π_ref(v) of a term with this advantage, its `denominator` and
    this support. Unlike a term, it adds no trajectories to those that count. As with `KLPenalty`, no gradient flows
    through the sampling of the states.

    Attributes:
        advantage: the derivative of minus D: `LogRatio` for KL(π_θ‖ν), `TargetProbability` for KL(ν‖π_θ),
            `JensenShannon` or `Surprisal`, with the reference policy or the teacher as ν.
        support: the candidates; not the sampled token alone.
    """

    coefficient: float
    reduction: Reduction
    advantage: Divergence
    support: Support = FullVocabulary()
    source: Source = "rollouts"
    needs_vocabulary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.support, SampledToken):
            raise ConfigError(
                "SampledToken has no distribution; give upge.FullVocabulary or upge.TopK, or estimate the KL from the "
                "sampled tokens by upge.KLPenalty",
                "support",
            )
        self.support.check({"advantage": self.advantage, "advantage.denominator": self.advantage.denominator})

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride] - follows from a part
        """The columns of the denominator, which is not a field of this class."""
        return self.advantage.denominator.columns

    @property
    def estimator(self) -> UnifiedGradient:
        """The product that gives the coefficients."""
        return UnifiedGradient(NoMask(), self.advantage.denominator, self.advantage)

    def precompute_parts(self, batch: TrajectoryView, live: frozenset[str] = LIVE_COLUMNS) -> Component:
        """As in `Component`; the columns of candidates are known only in the forward pass."""
        return super().precompute_parts(batch, self.support.live)

    def __call__(self, batch: View) -> Float[Tensor, "N"]:
        """D at each of N tokens, detached, from a view of [N, K] candidates."""
        seen = self.advantage.view(batch)
        advantages = self.advantage(seen)
        return self.advantage.divergence(seen, advantages, (seen.logprobs.exp() * advantages).sum(dim=-1))

    def formula(self) -> Formula:
        return self.summed_formula(self.coefficient, self.support.formula(self.estimator.formula()))


@dataclass(frozen=True)
class ValueLoss(Component):
    """½·Σ w·max((V - R)², (clip(V, V_old ± clip) - R)²) over rollouts, with R = Â + V_old.

    V_old is the critic's value before the step's updates, and R is the return that follows from the advantage. This is
    the loss of the implementation of arXiv 1707.06347.

    Attributes:
        returns: the advantage Â, without whitening.
        clip: distance from V_old beyond which moving V further does not lower the loss; None = plain squared error.
        reduction: the weights w, over the rollouts that count.
        coefficient: a constant factor. The critic has its own optimizer, so it matters only for gradient clipping.
    """

    returns: AdvantageEstimator
    clip: float | None = 0.2
    reduction: Reduction = TokenMean()
    coefficient: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset({"values", "is_demonstration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"ValueLoss.clip: {self.clip} must be positive; 0.2 is customary, null for no clipping")
        if not 0 < self.coefficient < math.inf:
            raise ConfigError(f"ValueLoss.coefficient: {self.coefficient} must be positive and finite")
        if isinstance(self.returns, Whitened):
            raise ConfigError("ValueLoss.returns: Whitened is not on the scale of the values; give what it wraps")
        if self.returns.is_live:
            raise ConfigError(
                f"ValueLoss.returns: {type(self.returns).__name__} reads the current policy, but a return must be "
                "known before the forward pass; give the plain advantage, such as upge.GAE"
            )

    def targets(self, batch: TrajectoryView) -> Float[Tensor, "B T"]:
        """[B, T] the returns Â + V_old on the whole batch, before the forward pass."""
        return self.returns(self.returns.view(batch)).detach() + batch.values.double()

    def weights(self, batch: TrajectoryView, active: Tensor) -> Float[Tensor, "B T"]:
        """[B, T] coefficient·w over the active trajectories; demonstrations among them are left out."""
        rows = active & ~batch.is_demonstration
        return self.coefficient * self.reduction(self.reduction.view(batch), rows)

    def __call__(
        self, values: Float[Tensor, "B T"], old: Float[Tensor, "B T"], targets: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """[B, T] the loss before it is multiplied by `weights`; `old` are the values before the step's updates."""
        error = (values - targets).square()
        if self.clip is not None:
            near = torch.minimum(torch.maximum(values, old - self.clip), old + self.clip)
            error = torch.maximum(error, (near - targets).square())
        return error / 2

    def formula(self) -> Formula:
        if self.clip is None:
            return Formula("½(V − R)²", r"\tfrac12(V-R)^2")
        return Formula(
            f"½max((V − R)², (clip(V, V_old ± {self.clip:g}) − R)²)",
            rf"\tfrac12\max((V-R)^2,(\mathrm{{clip}}(V,V_{{old}}\pm {self.clip:g})-R)^2)",
        )
