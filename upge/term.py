"""A term of an algorithm: a source of tokens × a gate × an estimator × a reduction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import Component
from upge.errors import ConfigError
from upge.estimator import UnifiedGradient
from upge.formula import Formula, tex, weighted_sum
from upge.gates import Gate
from upge.reduction import Reduction
from upge.support import SampledToken, Support
from upge.trajectories import Source, Trajectories


@dataclass(frozen=True)
class Term:
    """coefficient · Σ_τ gate · w · Σ_t 1_stable · (1/π_ref) · Â · f′∇π_θ over the tokens of a source.

    In a rollout that begins with demonstration tokens, the parts see only the tokens of the source.

    Attributes:
        source: the tokens that the term learns from: of 'rollouts', of 'demonstrations', of 'preference_pairs' or
            'all'.
        gate: gives the coefficient of each trajectory, [B].
        estimator: the product of the four factors.
        reduction: gives the weights w, [B, T].
        coefficient: a constant factor of the whole term.
        support: the candidate tokens at each position whose probabilities the term moves.
    """

    source: Source
    gate: Gate
    estimator: UnifiedGradient
    reduction: Reduction
    coefficient: float = 1.0
    support: Support = SampledToken()

    def __post_init__(self) -> None:
        check_fields(self)
        self.support.check({f"estimator.{slot}": part for slot, part in self.estimator.parts.items()})
        if not math.isfinite(self.coefficient):
            raise ConfigError(f"coefficient: found {self.coefficient}; give a finite number")

    @property
    def parts(self) -> dict[str, Component]:
        """Every part, by its path in the term."""
        estimator = {f"estimator.{slot}": part for slot, part in self.estimator.parts.items()}
        return {"gate": self.gate, **estimator, "reduction": self.reduction}

    def active(self, batch: Trajectories) -> Bool[Tensor, "B"]:
        """[B] True for trajectories of the source whose coefficient is not known to be 0 before the forward pass.

        A trajectory that has tokens, but none of the source, is not active.
        """
        tokens = batch.source_tokens(self.source).any(dim=1) | ~batch.response_mask.any(dim=1)
        closed = self.gate.closed(batch.seeing(batch.tokens_seen(self.source)))
        return batch.source_rows(self.source) & tokens & ~closed & (self.coefficient != 0)

    def precompute(self, batch: Trajectories) -> Term:
        """This term with everything known before the forward pass replaced by its values on the whole `batch`."""
        batch = batch.seeing(batch.tokens_seen(self.source))
        estimator = self.estimator.precompute_parts(batch, self.support.live)
        return replace(self, gate=self.gate.precomputed(batch), estimator=estimator)

    def formula(self) -> Formula:
        """The formula of the term's sum."""
        coefficient = Formula(f"{self.coefficient:g}", tex(self.coefficient))
        weights = [coefficient, self.gate.formula(), self.reduction.formula()]
        return weighted_sum(self.source, weights, self.support.formula(self.estimator.formula()))
