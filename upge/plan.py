"""An algorithm bound to a batch: everything static is computed, and any piece of the batch can be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from upge.components.base import live_reads, mapped
from upge.estimate import Estimate, TermFactors
from upge.estimator import UnifiedGradient
from upge.gates import Gate
from upge.regularizers import Regularizer
from upge.views import TokenView


def _penalty(regularizer: Regularizer, scale: Tensor, batch: TokenView) -> Tensor:
    """The value of a regularizer on a piece; `scale`, one number per token, is coefficient·w.

    Trajectories outside its source are hidden from it as padding is: their penalty may overflow, and 0 times infinity
    is NaN in value and gradient. A penalty of reach 'group' may want to read them, so it sees all.
    """
    if regularizer.live_reach != "group":
        counted = scale != 0
        if counted.ndim == 2:
            counted = counted.any(dim=1, keepdim=True)
        batch = replace(batch, response_mask=batch.response_mask & counted)
    values = regularizer(regularizer.view(batch))
    return torch.where(scale == 0, torch.zeros_like(values), values * scale).sum()


@dataclass(frozen=True)
class PlannedTerm:
    """A term with everything static computed: `weights` [B, T] is w, zero outside the rows of `own` [B]; `source` [B]
    are the trajectories of its source, whether they count or not."""

    gate: Gate
    estimator: UnifiedGradient
    weights: Tensor
    own: Tensor
    coefficient: float
    source: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> PlannedTerm:
        """The same with `change` applied to all that was computed beforehand, in its parts, too."""
        own = [getattr(self, field.name) for field in fields(self)]
        return PlannedTerm(*(change(v) if isinstance(v, Tensor) else mapped(v, change) for v in own))

    def taken(self, rows: Int[Tensor, "b"]) -> PlannedTerm:
        """The same for some rows of the batch."""
        return self.changed(lambda values: values[rows])

    def factors(self, batch: TokenView) -> TermFactors:
        """The factors on a piece of the batch, each with one number per token."""
        shape = batch.response_mask.shape
        factors = self.estimator.factors(batch)
        gate = self.gate(self.gate.view(batch)).detach().double() * self.coefficient
        gate = batch.per_token(torch.where(batch.look_up(self.own), gate, torch.zeros_like(gate)))
        w = batch.look_up(self.weights)
        product = self.estimator.weight(batch, factors)
        scale = gate * w
        weight = torch.where(scale == 0, torch.zeros_like(scale), scale * product)
        expanded = {name: value.expand(shape) for name, value in factors._asdict().items()}
        return TermFactors(**expanded, gate=gate.expand(shape), reduction=w, weights=weight)


@dataclass(frozen=True)
class Plan:
    """An algorithm bound to a batch.

    Attributes:
        keep: [B] trajectories that can contribute to the gradient; no other needs a forward pass.
        counted: [B] trajectories with a coefficient other than zero in some term, those without a signal included.
        reach: of the algorithm; with 'group', the widest, a part may read what has no weight of its own.
    """

    terms: Mapping[str, PlannedTerm]
    penalties: Mapping[str, tuple[Regularizer, Tensor]]
    keep: Bool[Tensor, "B"]
    counted: Bool[Tensor, "B"]
    reach: str = "group"

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its values on `device`, where the pieces of the batch are."""
        if self.contributing.device == torch.device(device):
            return self
        terms = {name: term.changed(lambda values: values.to(device)) for name, term in self.terms.items()}
        penalties = {
            name: (mapped(regularizer, lambda values: values.to(device)), scale.to(device))
            for name, (regularizer, scale) in self.penalties.items()
        }
        return Plan(terms, penalties, self.contributing.to(device), self.counted.to(device), self.reach)

    def alone(self, name: str) -> Plan:
        """The part of one term or regularizer: these parts' losses and gradients add up to the whole plan's."""
        terms = {n: term for n, term in self.terms.items() if n == name}
        penalties = {n: penalty for n, penalty in self.penalties.items() if n == name}
        scales = [term.weights for term in terms.values()] + [scale for _, scale in penalties.values()]
        heard = torch.stack([(scale != 0).any(dim=1) for scale in scales]).any(dim=0)
        keep = self.contributing if self.reach == "group" else self.contributing & heard
        return Plan(terms, penalties, keep, self.counted, self.reach)

    def reading(self, column: str) -> Bool[Tensor, "B"]:
        """[B] kept trajectories on which some part reads a column after the forward pass; nobody looks elsewhere."""
        if self.reach == "group":
            return self.contributing
        found = torch.zeros_like(self.contributing)
        for term in self.terms.values():
            if column in live_reads(term.gate).union(*map(live_reads, term.estimator.parts.values())):
                found |= (term.weights != 0).any(dim=1)
        for regularizer, scale in self.penalties.values():
            if column in live_reads(regularizer):
                found |= (scale != 0).any(dim=1)
        return found & self.contributing

    def estimate(self, batch: TokenView) -> Estimate:
        """The estimate on a piece of the planned batch (`batch.row` says which); pieces add up.

        A piece is some of the trajectories, or, where the algorithm `takes_chunks`, any of their tokens packed.

        Raises:
            ValueError: the batch has no log-probs of the current policy.
        """
        if batch.logprobs is None:
            raise ValueError("logprobs: an estimate needs them, but this batch has none; pass `logprobs=...` [B, T]")
        terms = {name: term.factors(batch) for name, term in self.terms.items()}
        logprobs = batch.logprobs
        # Weights in half precision would lose what their divisors need.
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        found = [t.weights for t in terms.values()] or [torch.zeros_like(logprobs.detach())]
        weights = torch.stack(found).sum(dim=0).to(dtype)
        # Where nothing is to be learned the log-prob may be -inf, and 0 times that is NaN.
        loss = -(weights * torch.where(weights == 0, torch.zeros_like(logprobs), logprobs)).sum()
        penalties = {}
        for name, (regularizer, scale) in self.penalties.items():
            penalties[name] = _penalty(regularizer, batch.look_up(scale).to(dtype), batch)
            loss = loss + penalties[name]
        values = {name: float(value.detach()) for name, value in penalties.items()}
        return Estimate(loss, weights, terms, values, batch, self._compared)

    @property
    def _compared(self) -> frozenset[str]:
        """The terms whose mask reads the behaviour policy's log-probs, so that a ratio decides what it stops."""
        masks = {name: term.estimator.parts["mask"] for name, term in self.terms.items()}
        return frozenset(name for name, mask in masks.items() if "behavior_logprobs" in live_reads(mask))
