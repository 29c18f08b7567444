"""Terms and regularizers bound to a batch, with everything that is known before the forward pass computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.candidates import Places, SupportCoefficients
from upge.components.base import Component, Precomputed, live_reads, mapped
from upge.components.distillation import Divergence
from upge.estimator import TermFactors, UnifiedGradient
from upge.gates import Gate
from upge.regularizers import Regularizer
from upge.support import CANDIDATE_COLUMNS, SampledToken, Support
from upge.trajectories import Trajectories
from upge.views import PackedTokens, TokenView


@dataclass(frozen=True)
class PlannedTerm:
    """A term, or a `DivergencePenalty`, bound to a batch, with everything known before the forward pass computed.

    Attributes:
        source: [B] True for the trajectories of the term's source.
        active: [B] True for those of them whose coefficient is not known to be 0.
        weights: [B, T] the reduction's w, 0 outside the active rows and the tokens of the source.
        support: the term's support.
        seen: [B, T] the tokens that the parts see; None = all.
        compares: whether the mask compares the policy with the behavior policy.
    """

    gate: Gate
    estimator: UnifiedGradient
    coefficient: float
    source: Bool[Tensor, "B"]
    active: Bool[Tensor, "B"]
    weights: Float[Tensor, "B T"]
    support: Support = SampledToken()
    seen: Bool[Tensor, "B T"] | None = None
    compares: bool = False

    def to(self, device: torch.device | str) -> PlannedTerm:
        """A copy of this term on `device`."""

        def move(values: Tensor) -> Tensor:
            return values.to(device)

        gate, estimator = mapped(self.gate, move), mapped(self.estimator, move)
        tensors = move(self.source), move(self.active), move(self.weights)
        seen = None if self.seen is None else move(self.seen)
        return PlannedTerm(gate, estimator, self.coefficient, *tensors, self.support, seen, self.compares)

    @property
    def on_support(self) -> bool:
        """True if the term moves tokens other than the sampled one."""
        return not isinstance(self.support, SampledToken)

    def factors(self, batch: TokenView) -> TermFactors:
        """The factors on a micro-batch, one number per token each."""
        batch = batch.seeing(self.seen)
        shape = batch.response_mask.shape
        factors = self.estimator.factors(batch)
        gate, w = self._scales(batch)
        product = self.estimator.weight(batch, factors)
        scale = gate * w
        weight = torch.where(scale == 0, torch.zeros_like(scale), scale * product)
        expanded = {name: value.expand(shape) for name, value in factors._asdict().items()}
        return TermFactors(**expanded, gate=gate.expand(shape), reduction=w, weights=weight)

    def coefficients(
        self, batch: Trajectories | PackedTokens, places: Places | None, penalty: bool = False
    ) -> SupportCoefficients:
        """The coefficients on the support, for the batch's tokens in order or for those at `places`.

        With `penalty` they also record the value of the divergence.
        """
        gate, w = self._scales(batch.seeing(self.seen))
        divergence = self.estimator.advantage if penalty else None
        assert divergence is None or isinstance(divergence, Divergence)
        return SupportCoefficients(self.estimator, self.support, batch, gate.expand(w.shape), w, places, divergence)

    @property
    def models(self) -> frozenset[str]:
        """Those of 'reference' and 'teacher' whose distributions the parts need on the support."""
        return frozenset[str]().union(*(self.support.models(part) for part in self.estimator.parts.values()))

    def _scales(self, batch: TokenView) -> tuple[Tensor, Tensor]:
        """The gate with the term's coefficient, in a shape that broadcasts against tokens, and w of each token."""
        gate = self.gate(self.gate.view(batch)).detach().double() * self.coefficient
        gate = batch.per_token(torch.where(batch.look_up(self.active), gate, torch.zeros_like(gate)))
        return gate, batch.look_up(self.weights)

    def live_reads(self) -> frozenset[str]:
        """The columns that the term's parts read in or after the forward pass, other than those of candidates."""
        reads = frozenset[str]().union(*(live_reads(p, self.support.live) for p in self.estimator.parts.values()))
        return live_reads(self.gate) | (reads - CANDIDATE_COLUMNS if self.on_support else reads)

    @property
    def signal(self) -> Bool[Tensor, "B"]:
        """[B] False where a factor of every token is known to be 0, so that the gradient must be 0."""
        signal = self.weights
        for slot in ("advantage", "mask"):
            part = self.estimator.parts[slot]
            if isinstance(part, Precomputed):
                signal = signal * part.values[:, : signal.shape[1]]
        return (signal != 0).any(dim=1)

    @property
    def pending(self) -> dict[str, Component]:
        """The parts of reach 'batch' that are not evaluated yet, by their path in the term."""
        parts = {"gate": self.gate, **{f"estimator.{slot}": part for slot, part in self.estimator.parts.items()}}
        return {path: part for path, part in parts.items() if part.spans_update}

    @property
    def _ranks_by_advantage(self) -> bool:
        """True if a part of reach 'batch' is called with Â, so that Â must be known in the pass before the update."""
        others = [part for slot, part in self.estimator.parts.items() if slot != "advantage"]
        return any(part.spans_update and part.sees_advantages for part in others)

    @property
    def pending_reads(self) -> frozenset[str]:
        """The columns that `with_current` reads."""
        parts = [*self.pending.values(), *[self.estimator.advantage] * self._ranks_by_advantage]
        return frozenset[str]().union(*(part.columns for part in parts))

    def with_current(self, batch: Trajectories, share: Callable[[Tensor], Tensor]) -> PlannedTerm:
        """This term with its parts of reach 'batch' replaced by their values, see `Plan.with_current`.

        These parts see only the term's active trajectories; the others are masked like padding.
        """
        if not self.pending:
            return self
        batch = batch.seeing(self.seen)
        own = replace(batch, response_mask=batch.response_mask & self.active[:, None])

        def ready(part: Any, *advantages: Tensor) -> Any:
            return Precomputed(share(part(part.view(own), *advantages).detach())) if part.spans_update else part

        advantage, advantages = ready(self.estimator.advantage), []
        if self._ranks_by_advantage:
            advantages = [advantage(advantage.view(batch)).detach() * own.response_mask]
        others = {slot: part for slot, part in self.estimator.parts.items() if slot != "advantage"}
        parts = {slot: ready(part, *advantages * part.sees_advantages) for slot, part in others.items()}
        return replace(self, gate=ready(self.gate), estimator=UnifiedGradient(advantage=advantage, **parts))


@dataclass(frozen=True)
class PlannedPenalty:
    """A regularizer on sampled tokens bound to a batch, with its parts precomputed.

    Attributes:
        scale: [B, T] coefficient·w of each token.
        seen: [B, T] the tokens that it sees; None = all.
    """

    regularizer: Regularizer
    scale: Float[Tensor, "B T"]
    seen: Bool[Tensor, "B T"] | None = None

    def to(self, device: torch.device | str) -> PlannedPenalty:
        """A copy of this penalty on `device`."""
        seen = None if self.seen is None else self.seen.to(device)
        return PlannedPenalty(mapped(self.regularizer, lambda v: v.to(device)), self.scale.to(device), seen)

    def value(self, batch: Trajectories | PackedTokens, dtype: torch.dtype) -> Float[Tensor, ""]:
        """The value of the regularizer on a micro-batch.

        Trajectories on which the regularizer has weight 0 are masked like padding, because their penalty may overflow
        and 0·∞ is NaN in value and gradient. A penalty of reach 'group' may need to read them, so it sees all
        trajectories.
        """
        scale, batch = batch.look_up(self.scale).to(dtype), batch.seeing(self.seen)
        if self.regularizer.live_reach != "group":
            weighted = scale != 0
            if weighted.ndim == 2:
                weighted = weighted.any(dim=1, keepdim=True)
            batch = replace(batch, response_mask=batch.response_mask & weighted)
        values = self.regularizer(self.regularizer.view(batch))
        return torch.where(scale == 0, torch.zeros_like(values), values * scale).sum()
