"""The support of a term: the candidate tokens at each position whose probabilities the term moves.

The gradient of a term is Σ_t w_t Σ_v c_v ∇π_θ(v|t), where v runs over the support. For each v the four factors give
k_v = π_θ(v)·c_v = 1_stable · (1/π_ref) · Â · f′ · π_θ(v), as they do for the sampled token alone, which is the default.
With z the logits, ∂(Σ_v c_v π_v)/∂z = k - (Σ_v k_v) π.

On a support the parts are evaluated in the shape [N, K]: N packed tokens, K candidates. The columns `logprobs`,
`reference_logprobs` and `teacher_logprobs` are then those of the candidates, and all others are [N, 1]. So the same
part, such as `LogRatio`, serves the sampled token and the whole distribution. V is the size of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import Component, live_reads, walk
from upge.errors import ConfigError
from upge.estimator import Factors, UnifiedGradient
from upge.formula import Formula
from upge.trajectories import Trajectories
from upge.views import LIVE_COLUMNS, TRAJECTORY_COLUMNS, Distributions, PackedTokens, TokenView

#: Rows and columns of a padded batch's tokens, [n] each.
Places = tuple[Tensor, Tensor]
#: Columns whose values on a support are those of the candidates.
CANDIDATE_COLUMNS = frozenset({"logprobs", "reference_logprobs", "teacher_logprobs", "is_sampled"})
#: Columns that are known for the sampled token alone.
_SAMPLED_ONLY = frozenset({"behavior_logprobs", "sampler_logprobs"})


class Support(ABC):
    """The tokens at each position whose probabilities a term moves; a subclass is a frozen dataclass.

    Attributes:
        live: class attribute; the columns that are known only in the policy's forward pass.
        temperature: of the distributions that are compared and moved, beside the sampler's.
    """

    live: ClassVar[frozenset[str]] = LIVE_COLUMNS | CANDIDATE_COLUMNS
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def title(self) -> str:
        """The candidates in words; empty for the sampled token."""

    @abstractmethod
    def candidates(self, given: Distributions) -> Int[Tensor, "N K"] | None:
        """[N, K] the candidate tokens at each position; None for the whole vocabulary."""

    @abstractmethod
    def formula(self, product: Formula) -> Formula:
        """The formula of the sum of `product` over the support."""

    def models(self, part: Component) -> frozenset[str]:
        """Those of 'reference' and 'teacher' whose distributions `part` needs on this support."""
        read = {"reference": "reference_logprobs", "teacher": "teacher_logprobs"}
        return frozenset(model for model, column in read.items() if column in part.columns)

    def check(self, estimator: UnifiedGradient) -> None:
        """Check that the parts of `estimator` can be evaluated on this support.

        Raises:
            ConfigError: a part looks beyond a token, needs what is known for the sampled token alone, or needs the
                whole vocabulary.
        """
        for slot, outer in estimator.parts.items():
            for path, part in walk(outer, f"estimator.{slot}"):
                if reason := self.refuses(part):
                    raise ConfigError(f"{type(part).__name__} {reason}", path)

    def refuses(self, part: Component) -> str | None:
        """Why `part` cannot be evaluated on this support, with the fix; None if it can."""
        name = type(self).__name__
        if part.reads & _SAMPLED_ONLY:
            return (
                "compares with the policy that sampled, whose log-probs are known for the sampled token alone, but the "
                f"support is {name}; give another part, such as upge.UnitDenominator as denominator, or leave out "
                "`support`"
            )
        if part.reach_with(self.live) != "token" or live_reads(part, self.live) & set(TRAJECTORY_COLUMNS):
            return (
                f"looks beyond a token in the forward pass, which the support {name} does not allow; give a part of "
                "reach 'token' that reads only columns with one number per token"
            )
        if part.needs_vocabulary and not isinstance(self, FullVocabulary):
            return (
                f"needs the whole vocabulary, but the support is {name}; set support={{_target_: upge.FullVocabulary}}"
            )
        return None


@dataclass(frozen=True)
class SampledToken(Support):
    """The sampled token alone: the policy gradient of the paper."""

    live: ClassVar[frozenset[str]] = LIVE_COLUMNS

    @property
    def title(self) -> str:
        return ""

    def candidates(self, given: Distributions) -> Int[Tensor, "N K"]:
        return given.tokens[:, None]

    def formula(self, product: Formula) -> Formula:
        return product

    def refuses(self, part: Component) -> str | None:
        if part.needs_vocabulary:
            return "needs the whole vocabulary; set support={_target_: upge.FullVocabulary}"
        return None


@dataclass(frozen=True)
class FullVocabulary(Support):
    """All tokens of the vocabulary, so that the sum over them is exact: nothing has to be divided by a probability.

    Attributes:
        temperature: of the distributions that are compared and moved, beside the sampler's; 1 leaves them as they are.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)

    @property
    def title(self) -> str:
        return "whole vocabulary"

    def candidates(self, given: Distributions) -> None:
        return None

    def formula(self, product: Formula) -> Formula:
        return Formula(f"Σ_v {product.text}{_at(self)}", rf"\sum_v {product.latex}")


@dataclass(frozen=True)
class TopK(Support):
    """The `k` most likely tokens of the policy or of the teacher. Probabilities are not normalized anew.

    The sum over the other tokens is missing, which is a bias; it falls with the mass outside the k tokens.

    Attributes:
        k: number of candidates.
        of: whose most likely tokens.
        temperature: as of `FullVocabulary`.
    """

    k: int = 32
    of: Literal["policy", "reference", "teacher"] = "policy"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)
        if self.k < 1:
            raise ConfigError(f"TopK.k: {self.k} must be at least 1")

    @property
    def title(self) -> str:
        return f"top {self.k} tokens"

    def models(self, part: Component) -> frozenset[str]:
        return super().models(part) | ({self.of} - {"policy"})

    def candidates(self, given: Distributions) -> Int[Tensor, "N K"]:
        ranked: Tensor | None = getattr(given, self.of)
        if ranked is None:
            raise ValueError(f"TopK.of: {self.of}, but the batch has no distribution of it; give `distributions`")
        return ranked.detach().topk(min(self.k, ranked.shape[-1]), dim=-1, sorted=False).indices

    def formula(self, product: Formula) -> Formula:
        whose = {"policy": "π_θ", "reference": "π_0", "teacher": "ν"}[self.of]
        latex = {"policy": r"\pi_\theta", "reference": r"\pi_0", "teacher": r"\nu"}[self.of]
        return Formula(
            f"Σ_{{v ∈ top {self.k} of {whose}}} {product.text}{_at(self)}",
            rf"\sum_{{v\in\mathrm{{top}}_{{{self.k}}}({latex})}} {product.latex}",
        )


def _check_temperature(support: FullVocabulary | TopK) -> None:
    if not 0 < support.temperature < float("inf"):
        raise ConfigError(f"{type(support).__name__}.temperature: {support.temperature} must be positive and finite")


def _at(support: FullVocabulary | TopK) -> str:
    return "" if support.temperature == 1.0 else f" at temperature {support.temperature:g}"


@dataclass(frozen=True, eq=False)
class CandidateView(TokenView):
    """What a part sees on a support: the candidates at some tokens.

    Attributes:
        tokens: the N tokens.
        logprobs, reference_logprobs, teacher_logprobs: [N, K] of the candidates.
        candidates: [N, K] the tokens.
        chosen: [N, 1] the sampled token.
    """

    tokens: PackedTokens
    logprobs: Float[Tensor, "N K"]
    reference_logprobs: Float[Tensor, "N K"] | None  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher_logprobs: Float[Tensor, "N K"] | None  # pyright: ignore[reportIncompatibleVariableOverride]
    candidates: Int[Tensor, "N K"]
    chosen: Int[Tensor, "N 1"]

    @classmethod
    def of(cls, tokens: PackedTokens, given: Distributions, candidates: Tensor | None) -> CandidateView:
        """The view of `candidates`, or of the whole vocabulary."""

        def pick(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            values = values.detach()
            return values if candidates is None else values.gather(-1, candidates)

        policy = pick(given.policy)
        assert policy is not None
        if candidates is None:
            candidates = torch.arange(policy.shape[-1], device=policy.device).expand(policy.shape)
        return cls(tokens, policy, pick(given.reference), pick(given.teacher), candidates, given.tokens[:, None])

    @property
    def is_sampled(self) -> Bool[Tensor, "N K"]:
        """[N, K] True for the sampled token."""
        return self.candidates == self.chosen

    @property
    def response_mask(self) -> Bool[Tensor, "N K"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tokens.response_mask[:, None].expand(self.candidates.shape)

    @property
    def values(self) -> Float[Tensor, "N 1"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _column(self.tokens.values)

    @property
    def entropies(self) -> Float[Tensor, "N 1"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _column(self.tokens.entropies)

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tokens.step

    @property
    def state(self) -> Mapping[str, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tokens.state

    def __len__(self) -> int:
        return len(self.tokens)

    def look_up(self, values: Tensor) -> Float[Tensor, "N 1"]:
        """[N, 1] the entries of [B] or [B, T] `values` that belong to the tokens."""
        return self.tokens.look_up(values)[:, None]

    def per_token(self, values: Tensor) -> Tensor:
        """`values` unchanged, because `look_up` already gives one number per token."""
        return values

    @property
    def places(self) -> tuple[Int[Tensor, "N K"], Int[Tensor, "N K"]]:
        rows, columns = self.tokens.places
        shape = self.candidates.shape
        return rows[:, None].expand(shape), columns[:, None].expand(shape)


def _column(values: Tensor | None) -> Tensor:
    return None if values is None else values[:, None]  # pyright: ignore[reportReturnType] - the view refuses None


def _once(values: Float[Tensor, "N K"]) -> Tensor:
    """[N, 1] of values that are one number per token, expanded to the candidates; all others unchanged."""
    return values[:, :1] if values.stride(-1) == 0 else values


class TermFactors(NamedTuple):
    """The factors of one term, each [B, T] (packed tokens: [N]) and detached.

    Their product is the number in front of each token's ∇log π_θ:

        weights = gate · reduction · mask · advantages · shape · exp(log π_θ - log_denominator)

    `gate` includes the term's coefficient, and `shape` is f′(π_θ). On a support with other candidates than the sampled
    token, `advantages` are Σ_v π_θ(v)·Â_v, `weights` are Σ_v |k_v| with gate and reduction, mask and shape are 1.
    """

    mask: Tensor
    log_denominator: Tensor
    advantages: Tensor
    shape: Tensor
    gate: Tensor
    reduction: Tensor
    weights: Tensor


class SupportCoefficients:
    """The k of a term on some tokens, evaluated for a block of them at a time, where their distributions exist.

    Args:
        estimator: the product of the four factors, precomputed.
        support: other than the sampled token.
        batch: the tokens, padded or packed.
        gate: [*shape] of each token, with the term's coefficient.
        reduction: [*shape] w of each token.
        places: rows and columns of a padded batch's tokens in the order in which blocks are asked for; None = by rows.

    Attributes:
        factors: the figures of each token, for metrics. The calls fill in `advantages` and `weights`.
    """

    def __init__(
        self,
        estimator: UnifiedGradient,
        support: Support,
        batch: Trajectories | PackedTokens,
        gate: Tensor,
        reduction: Tensor,
        places: Places | None,
    ) -> None:
        self._estimator, self._support = estimator, support
        if isinstance(batch, PackedTokens):
            self._tokens, index = batch, torch.arange(len(batch), device=reduction.device)
        else:
            rows, columns = batch.response_mask.nonzero(as_tuple=True) if places is None else places
            self._tokens, index = batch.at(rows, columns), rows * reduction.shape[1] + columns
        self._index, self._scale = index, (gate * reduction).reshape(-1)[index]
        zeros, ones = (torch.full_like(reduction, value) for value in (0.0, 1.0))
        self.factors = TermFactors(ones, zeros, zeros.clone(), ones, gate, reduction, zeros.clone())

    def __call__(self, block: slice, given: Distributions) -> tuple[Int[Tensor, "R K"] | None, Float[Tensor, "R K"]]:
        """The coefficients of R of the tokens.

        Args:
            block: which of the tokens, in the order of `places`.
            given: the distributions at these R tokens.

        Returns:
            The candidates (None: the whole vocabulary) and their k with gate and reduction: the derivative of the
            term's objective with respect to log π_θ of each.
        """
        tempered = given.tempered(self._support.temperature)
        candidates = self._support.candidates(tempered)
        view = CandidateView.of(self._tokens.chunk(block, *self._live(block)), tempered, candidates)
        k = self._product(block, view)
        temperature = self._support.temperature
        if temperature == 1.0:
            return candidates, k
        # The normalization of a tempered distribution involves all tokens of the vocabulary.
        policy = tempered.policy.detach().exp()
        dense = k if candidates is None else torch.zeros_like(policy).scatter_add_(1, candidates, k)
        return None, (dense - k.sum(-1, keepdim=True) * policy) / temperature

    def loss(self, given: Distributions) -> Float[Tensor, ""]:
        """A scalar whose gradient is minus the term's, for all tokens at once, from distributions with a gradient."""
        candidates, k = self(slice(0, len(self._tokens)), given)
        logprobs = given.policy if candidates is None else given.policy.gather(-1, candidates)
        return -torch.where(k == 0, torch.zeros_like(logprobs), k * logprobs).sum()

    def _product(self, block: slice, view: CandidateView) -> Float[Tensor, "R K"]:
        """scale·k of each candidate; also records the figures for metrics."""
        # Everything in the precision of the log-probs: the candidates are too many for float64.
        dtype, shape = view.logprobs.dtype, view.logprobs.shape
        factors = Factors(*(_once(factor).to(dtype) for factor in self._estimator.factors(view)))
        scale, probabilities = self._scale[block, None].to(dtype), view.logprobs.exp()
        offset = factors.shape.log() - factors.log_denominator
        if (
            factors.mask.shape[-1] == offset.shape[-1] == 1
        ):  # equal for all candidates, so few passes over them are needed
            common = factors.mask * scale * offset.exp()
            common = torch.where(scale * factors.mask == 0, torch.zeros_like(common), common)
            k = (factors.advantages * common).mul(probabilities).expand(shape)
            expected = k.sum(dim=-1) / torch.where(common == 0, torch.ones_like(common), common)[:, 0]
        else:
            k = self._estimator.weight(view, factors).expand(shape)
            k = torch.where(scale == 0, torch.zeros_like(k), k * scale)
            expected = torch.where(scale == 0, torch.zeros_like(k), probabilities * factors.advantages).sum(dim=-1)
        index, (advantages, weights) = self._index[block], (self.factors.advantages, self.factors.weights)
        advantages.view(-1)[index] = expected.to(advantages.dtype)
        weights.view(-1)[index] = torch.linalg.vector_norm(k, 1, dim=-1).to(weights.dtype)
        return k

    def _live(self, block: slice) -> tuple[Tensor, Tensor | None]:
        logprobs, entropies = self._tokens.logprobs, self._tokens.entropies
        assert logprobs is not None
        return logprobs.detach()[block], None if entropies is None else entropies.detach()[block]
