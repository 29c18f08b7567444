"""An algorithm bound to a batch, with everything that is known before the forward pass computed.

plan = algorithm.plan(batch)          # on the whole batch
plan.estimate(micro_batch)            # on some of its trajectories; the estimates add up

An algorithm with parts of reach 'batch' also needs the current log-probs of the whole batch before the first estimate:
in `batch`, or later by `plan = plan.with_current(batch)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.candidates import Places
from upge.components.base import Component, live_reads, mapped
from upge.errors import ConfigError
from upge.estimate import Estimate
from upge.planned_term import PlannedTerm
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer
from upge.term import Term
from upge.trajectories import Trajectories
from upge.views import PackedTokens


@dataclass(frozen=True)
class Plan:
    """An algorithm bound to a batch.

    Attributes:
        terms: name → term, for the terms with a coefficient other than 0.
        penalties: name → (regularizer, [B, T] its scale coefficient·w).
        contributing: [B] True for trajectories that can contribute to the gradient, or that a part of reach 'batch' has
            yet to see. Only these need a forward pass.
        active: [B] True for trajectories with a non-zero coefficient in some term, whether or not they contribute.
        reach: the algorithm's reach. With 'group', a part may also read trajectories whose own weight is 0.
    """

    terms: Mapping[str, PlannedTerm]
    penalties: Mapping[str, tuple[Regularizer, Tensor]]
    contributing: Bool[Tensor, "B"]
    active: Bool[Tensor, "B"]
    reach: str = "group"

    def to(self, device: torch.device | str) -> Plan:
        """This plan on `device`, which must be the device of the micro-batches."""
        if self.contributing.device == torch.device(device):
            return self
        penalties = {
            name: (mapped(regularizer, lambda values: values.to(device)), scale.to(device))
            for name, (regularizer, scale) in self.penalties.items()
        }
        terms = {name: term.to(device) for name, term in self.terms.items()}
        return Plan(terms, penalties, self.contributing.to(device), self.active.to(device), self.reach)

    def alone(self, name: str) -> Plan:
        """The plan of a single term or regularizer.

        The losses and gradients of these plans add up to those of the whole plan.
        """
        terms = {n: term for n, term in self.terms.items() if n == name}
        penalties = {n: penalty for n, penalty in self.penalties.items() if n == name}
        scales = [term.weights for term in terms.values()] + [scale for _, scale in penalties.values()]
        weighted = torch.stack([(scale != 0).any(dim=1) for scale in scales]).any(dim=0)
        contributing = self.contributing if self.reach == "group" else self.contributing & weighted
        return Plan(terms, penalties, contributing, self.active, self.reach)

    @property
    def pending(self) -> dict[str, Component]:
        """The parts of reach 'batch' that are not evaluated yet, by their path in the algorithm's file."""
        return {f"terms.{n}.{path}": part for n, term in self.terms.items() for path, part in term.pending.items()}

    def with_current(self, batch: Trajectories, share: Callable[[Tensor], Tensor] = lambda values: values) -> Plan:
        """This plan with every part of reach 'batch' evaluated under the current policy; itself if there is none.

        Its estimates are then those of the whole batch for any split into micro-batches. Fewer trajectories may be
        contributing than before. After an optimizer step, evaluate the original plan again.

        Args:
            batch: the planned batch with the log-probs of the current policy, and with entropies if a part reads them.
                Only the entries of the `contributing` trajectories are read.
            share: applied to each result; with several processes it returns the first one's, so that rounding cannot
                make them differ.

        Raises:
            ValueError: `batch` lacks a column, or is not the planned batch.
        """
        if not self.pending:
            return self
        if len(batch) != len(self.contributing):
            raise ValueError(
                f"with_current: found {len(batch)} trajectories, but the plan is of {len(self.contributing)}; give the "
                "whole planned batch with the current log-probs"
            )
        with torch.no_grad():
            terms = {name: term.with_current(batch, share) for name, term in self.terms.items()}
        contributing = _contributing(terms, self.penalties, self.reach, batch)
        return replace(self, terms=terms, contributing=contributing)

    def reading(self, column: str) -> Bool[Tensor, "B"]:
        """[B] contributing trajectories on which some part reads `column` after the forward pass."""
        if self.reach == "group":
            return self.contributing
        rows = torch.zeros_like(self.contributing)
        for term in self.terms.values():
            if column in term.live_reads():
                rows |= (term.weights != 0).any(dim=1)
        for regularizer, scale in self.penalties.values():
            if column in live_reads(regularizer):
                rows |= (scale != 0).any(dim=1)
        return rows & self.contributing

    def estimate(self, batch: Trajectories | PackedTokens) -> Estimate:
        """The estimate on a micro-batch. The estimates of all micro-batches add up to that of the batch.

        Args:
            batch: some trajectories of the planned batch, or any packed tokens of it if the algorithm `takes_chunks`.
                Its `row` says which rows of the planned batch these are.

        Raises:
            ValueError: `batch` has no log-probs of the current policy, or no distributions for a term whose support is
                not the sampled token; or a part of reach 'batch' has not been evaluated.
        """
        estimate = self.estimate_in_head(batch)
        if not estimate.on_support:
            return estimate
        given = batch.distributions if isinstance(batch, Trajectories) else None
        if given is None:
            name = next(iter(estimate.on_support))
            raise ValueError(
                f"distributions: the support of the term '{name}' is {type(self.terms[name].support).__name__}, but "
                "this batch has none; pass `distributions=upge.Distributions(tokens, policy, ...)`"
            )
        loss = estimate.loss
        at_tokens = given.at(batch.response_mask)
        for coefficients in estimate.on_support.values():
            loss = loss + coefficients.loss(at_tokens)
        return replace(estimate, loss=loss)

    def estimate_in_head(self, batch: Trajectories | PackedTokens, places: Places | None = None) -> Estimate:
        """`estimate` where the distributions exist for a few tokens at a time, in the output head.

        The loss lacks the terms of `Estimate.on_support`, whose coefficients the head asks for.

        Args:
            batch: as for `estimate`.
            places: rows and columns of a padded batch's tokens, in the head's order; None = by rows.
        """
        for path, part in self.pending.items():
            raise ValueError(
                f"{path}: {type(part).__name__} has reach 'batch', so before the first estimate it needs the current "
                "log-probs of the whole batch; give them to `algorithm.plan(batch)`, or call "
                "`plan = plan.with_current(batch)` with them"
            )
        if batch.logprobs is None:
            raise ValueError("logprobs: an estimate needs them, but this batch has none; pass `logprobs=...` [B, T]")
        on_support = {n: term.coefficients(batch, places) for n, term in self.terms.items() if term.on_support}
        terms = {n: on_support[n].factors if n in on_support else t.factors(batch) for n, t in self.terms.items()}
        logprobs = batch.logprobs
        # In half precision, weights with large divisors would lose their accuracy.
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        per_term = [t.weights for n, t in terms.items() if n not in on_support]
        per_term = per_term or [torch.zeros_like(logprobs.detach())]
        weights = torch.stack(per_term).sum(dim=0).to(dtype)
        # Where the weight is 0 the log-prob may be -inf, and 0·(-inf) is NaN.
        loss = -(weights * torch.where(weights == 0, torch.zeros_like(logprobs), logprobs)).sum()
        penalties: dict[str, Tensor] = {}
        for name, (regularizer, scale) in self.penalties.items():
            penalties[name] = _penalty(regularizer, batch.look_up(scale).to(dtype), batch)
            loss = loss + penalties[name]
        # As tensors: to read a number would wait for the device, in each chunk of the output head.
        values = {name: value.detach() for name, value in penalties.items()}
        return Estimate(loss, weights, terms, values, batch, self._compared, on_support)

    @property
    def _compared(self) -> frozenset[str]:
        """The terms whose mask compares the policy with the behaviour policy."""
        masks = {name: term.estimator.parts["mask"] for name, term in self.terms.items()}
        return frozenset(name for name, mask in masks.items() if "behavior_logprobs" in live_reads(mask))


def plan_updates(
    terms: Mapping[str, Term],
    regularizers: Mapping[str, Regularizer],
    reach: str,
    batch: Trajectories,
    updates: Sequence[Int[Tensor, "b"] | None],
) -> list[Plan]:
    """One plan per update, see `Algorithm.plans`. No term or regularizer has a coefficient of 0."""
    active = {name: term.active(batch) for name, term in terms.items()}
    ready = {name: term.precompute(batch) for name, term in terms.items()}
    penalties: dict[str, Any] = {name: one.precompute_parts(batch) for name, one in regularizers.items()}
    plans: list[Plan] = []
    for rows in updates:
        if rows is None:
            plans.append(_plan(ready, penalties, reach, batch, active))
            continue

        def take(values: Tensor, rows: Tensor = rows) -> Tensor:
            return values[rows]

        plans.append(
            _plan(
                {name: mapped(term, take) for name, term in ready.items()},
                {name: mapped(one, take) for name, one in penalties.items()},
                reach,
                batch.select(rows, row=torch.arange(len(rows), device=rows.device)),
                {name: take(values) for name, values in active.items()},
            )
        )
    return plans


def _plan(
    terms: Mapping[str, Term],
    regularizers: Mapping[str, Regularizer],
    reach: str,
    batch: Trajectories,
    active: Mapping[str, Tensor],
) -> Plan:
    """The plan of one update on all of `batch`, from terms and regularizers whose parts are precomputed."""
    in_any = torch.stack(list(active.values())).any(dim=0)
    planned: dict[str, PlannedTerm] = {}
    for name, term in terms.items():
        source, rows = batch.source_rows(term.source), active[name]
        weights = _weights(term.reduction, batch, rows, in_any)
        columns = source, rows, weights
        planned[name] = PlannedTerm(term.gate, term.estimator, term.coefficient, *columns, term.support)
    penalties: dict[str, tuple[Regularizer, Tensor]] = {}
    for name, regularizer in regularizers.items():
        rows = batch.source_rows(regularizer.source) & in_any
        weights = _weights(regularizer.reduction, batch, rows, in_any)
        penalties[name] = (regularizer, weights * regularizer.coefficient)
    return Plan(planned, penalties, _contributing(planned, penalties, reach, batch), in_any, reach)


def _contributing(
    terms: Mapping[str, PlannedTerm],
    penalties: Mapping[str, tuple[Regularizer, Tensor]],
    reach: str,
    batch: Trajectories,
) -> Bool[Tensor, "B"]:
    """`Plan.contributing`: the trajectories that need a forward pass."""
    rows = [term.active if term.pending else term.signal for term in terms.values()]
    rows += [(scale != 0).any(dim=1) for _, scale in penalties.values()]
    contributing = torch.stack(rows).any(dim=0)
    if reach == "group":  # a trajectory without a signal may still be read by others of its group
        contributing = torch.isin(batch.group, batch.group[contributing])
    return contributing


def _weights(
    reduction: Reduction, batch: Trajectories, active: Bool[Tensor, "B"], active_in_any: Bool[Tensor, "B"]
) -> Float[Tensor, "B T"]:
    """w on the active rows. The reduction's `over` says which trajectories its divisor counts."""
    if getattr(reduction, "over", None) not in get_args(Over):
        raise ConfigError(
            f"{type(reduction).__name__}.over: found {getattr(reduction, 'over', None)!r}; a reduction has the field "
            "`over`, 'term' or 'batch', which says whose trajectories its divisor counts"
        )
    counting = active if reduction.over == "term" else active_in_any
    return reduction(reduction.view(batch), counting).detach() * active[:, None]


def _penalty(regularizer: Regularizer, scale: Tensor, batch: Trajectories | PackedTokens) -> Tensor:
    """The value of a regularizer on a micro-batch; `scale` is coefficient·w of each token.

    Trajectories outside the regularizer's source are hidden from it like padding, because their penalty may overflow
    and 0·∞ is NaN in value and gradient. A penalty of reach 'group' may need to read them, so it sees all trajectories.
    """
    if regularizer.live_reach != "group":
        weighted = scale != 0
        if weighted.ndim == 2:
            weighted = weighted.any(dim=1, keepdim=True)
        batch = replace(batch, response_mask=batch.response_mask & weighted)
    values = regularizer(regularizer.view(batch))
    return torch.where(scale == 0, torch.zeros_like(values), values * scale).sum()
