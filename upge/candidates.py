"""The candidates of a support at some tokens: what parts see of them, and a coefficient for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.components.distillation import Divergence
from upge.estimator import Factors, TermFactors, UnifiedGradient
from upge.support import Support
from upge.trajectories import Trajectories
from upge.views import Distributions, PackedTokens, TokenView

#: Rows and columns of a padded batch's tokens, [n] each.
Places = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class CandidateView(TokenView):
    """What a part sees on a support: the candidates at some tokens.

    Attributes:
        tokens: the N tokens.
        logprobs, reference_logprobs, teacher_logprobs: [N, K] the candidates' log-probs.
        candidates: [N, K] the candidates' token ids.
        chosen: [N, 1] the sampled tokens' ids.
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
    def score_norms(self) -> Float[Tensor, "N 1"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _column(self.tokens.score_norms)

    @property
    def is_demonstration_token(self) -> Bool[Tensor, "N 1"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _column(self.tokens.is_demonstration_token)

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


class SupportCoefficients:
    """The coefficients k of a term or penalty, evaluated for a block of tokens at a time, where distributions exist.

    Args:
        estimator: the product of the four factors, precomputed.
        support: any support but the sampled token.
        batch: the tokens, padded or packed.
        gate: [*shape] the gate of each token, times the term's coefficient.
        reduction: [*shape] w of each token.
        places: rows and columns of a padded batch's tokens, in the order of the blocks; None = by rows.
        divergence: the divergence of a penalty, whose value is recorded; None for a term.

    Attributes:
        factors: the factors of each token, for metrics. The calls fill in `advantages` and `weights`.
    """

    def __init__(
        self,
        estimator: UnifiedGradient,
        support: Support,
        batch: Trajectories | PackedTokens,
        gate: Tensor,
        reduction: Tensor,
        places: Places | None,
        divergence: Divergence | None = None,
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
        self._divergence, self._values = divergence, torch.zeros_like(self._scale)

    @property
    def value(self) -> Float[Tensor, ""]:
        """Σ gate·w·D of a penalty, over the tokens of the calls so far."""
        return self._values.sum()

    def __call__(self, block: slice, given: Distributions) -> tuple[Int[Tensor, "R K"] | None, Float[Tensor, "R K"]]:
        """The coefficients of R tokens.

        Args:
            block: which of the tokens, in the order of `places`.
            given: the distributions at these R tokens.

        Returns:
            The candidates (None: the whole vocabulary) and their k with gate and reduction: the derivative of the
            objective with respect to log π_θ of each.
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
        """A scalar with minus the gradient, for all tokens at once, from distributions with a gradient."""
        candidates, k = self(slice(0, len(self._tokens)), given)
        logprobs = given.policy if candidates is None else given.policy.gather(-1, candidates)
        return -torch.where(k == 0, torch.zeros_like(logprobs), k * logprobs).sum()

    def _product(self, block: slice, view: CandidateView) -> Float[Tensor, "R K"]:
        """scale·k of each candidate. Also records what metrics need."""
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
        if self._divergence is not None:
            values = self._divergence.divergence(self._divergence.view(view), factors.advantages, expected)
            self._values[block] = torch.where(scale == 0, torch.zeros_like(scale), scale * values[:, None])[:, 0]
        return k

    def _live(self, block: slice) -> tuple[Tensor, Tensor | None]:
        logprobs, entropies = self._tokens.logprobs, self._tokens.entropies
        assert logprobs is not None
        return logprobs.detach()[block], None if entropies is None else entropies.detach()[block]


def _once(values: Float[Tensor, "N K"]) -> Tensor:
    """[N, 1] of values that are one number per token, expanded to the candidates; all others unchanged."""
    return values[:, :1] if values.stride(-1) == 0 else values
