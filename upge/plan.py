"""An algorithm bound to a batch, with everything that is known before the forward pass computed.

plan = algorithm.plan(batch)          # on the whole batch
plan.estimate(micro_batch)            # on some of its trajectories; the estimates add up

An algorithm with parts of reach 'batch' also needs the current log-probs of the whole batch before the first estimate:
in `batch`, or later by `plan.with_current(batch)`, which returns the plan to estimate with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.candidates import Places
from upge.components.base import Component, live_reads, mapped
from upge.errors import ConfigError, nearest
from upge.estimate import Estimate
from upge.gates import ConstantGate
from upge.planned_term import PlannedPenalty, PlannedTerm
from upge.reduction import Over, Reduction
from upge.regularizers import DivergencePenalty, Regularizer
from upge.term import Term
from upge.trajectories import Source, Trajectories
from upge.views import Distributions, PackedTokens, TokenView


@dataclass(frozen=True)
class Plan:
    """An algorithm bound to a batch.

    Attributes:
        terms: name → term, for the terms with a coefficient other than 0.
        penalties: name → regularizer on sampled tokens, bound to the batch.
        contributing: [B] True for trajectories that can contribute to the gradient, or that a part of reach 'batch' has
            yet to see. Only these need a forward pass.
        active: [B] True for trajectories with a non-zero coefficient in some term, whether or not they contribute.
        group: [B] the batch's groups.
        reach: the algorithm's reach. With 'group', a part may also read trajectories whose own weight is 0.
        divergences: name → regularizer on whole distributions, bound to the batch as a term is.
    """

    terms: Mapping[str, PlannedTerm]
    penalties: Mapping[str, PlannedPenalty]
    contributing: Bool[Tensor, "B"]
    active: Bool[Tensor, "B"]
    group: Int[Tensor, "B"]
    reach: str = "group"
    divergences: Mapping[str, PlannedTerm] = field(default_factory=dict[str, PlannedTerm])

    def to(self, device: torch.device | str) -> Plan:
        """This plan on `device`, which must be the device of the micro-batches."""
        if self.contributing.device == torch.device(device):
            return self
        penalties = {name: penalty.to(device) for name, penalty in self.penalties.items()}
        terms = {name: term.to(device) for name, term in self.terms.items()}
        divergences = {name: one.to(device) for name, one in self.divergences.items()}
        contributing, active, group = (c.to(device) for c in (self.contributing, self.active, self.group))
        return Plan(terms, penalties, contributing, active, group, self.reach, divergences)

    @property
    def names(self) -> list[str]:
        """The names of the terms and regularizers, each once."""
        return list(dict.fromkeys([*self.terms, *self.penalties, *self.divergences]))

    def alone(self, name: str) -> Plan:
        """The plan of a single term or regularizer.

        The losses and gradients of these plans add up to those of the whole plan.

        Raises:
            ValueError: there is no term or regularizer of this name with a coefficient other than 0.
        """
        if name not in self.names:
            raise ValueError(f"alone: found {name!r}; {nearest(name, self.names)}")
        terms = {n: term for n, term in self.terms.items() if n == name}
        penalties = {n: penalty for n, penalty in self.penalties.items() if n == name}
        divergences = {n: one for n, one in self.divergences.items() if n == name}
        scales = [one.weights for one in (*terms.values(), *divergences.values())]
        scales += [penalty.scale for penalty in penalties.values()]
        weighted = torch.stack([(scale != 0).any(dim=1) for scale in scales]).any(dim=0)
        contributing = self.contributing if self.reach == "group" else self.contributing & weighted
        return Plan(terms, penalties, contributing, self.active, self.group, self.reach, divergences)

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
            share: applied to each result; with several processes it returns the first process's result, so that
                rounding cannot make the processes differ.

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
        if not batch.is_whole:
            raise ValueError(
                "with_current: found trajectories in another order than in the planned batch; give the whole "
                "batch in its order, with the current log-probs"
            )
        with torch.no_grad():
            terms = {name: term.with_current(batch, share) for name, term in self.terms.items()}
        contributing = _contributing([*terms.values(), *self.divergences.values()], self.penalties, self.reach, batch)
        return replace(self, terms=terms, contributing=contributing)

    def reading(self, column: str) -> Bool[Tensor, "B"]:
        """[B] contributing trajectories on which some part reads `column` after the forward pass."""
        if self.reach == "group":
            return self.contributing
        rows = torch.zeros_like(self.contributing)
        for term in (*self.terms.values(), *self.divergences.values()):
            if column in term.live_reads():
                rows |= (term.weights != 0).any(dim=1)
        for penalty in self.penalties.values():
            if column in live_reads(penalty.regularizer):
                rows |= (penalty.scale != 0).any(dim=1)
        return rows & self.contributing

    def estimate(self, batch: Trajectories | PackedTokens) -> Estimate:
        """The estimate on a micro-batch. The estimates of all micro-batches add up to that of the batch.

        Args:
            batch: some trajectories of the planned batch, or any packed tokens of it if the algorithm `takes_chunks`.
                Its `row` says which rows of the planned batch these are; `Trajectories.select` sets it.

        Raises:
            ValueError: `batch` has no log-probs of the current policy; it has no distributions, but the support of a
                term or regularizer is not the sampled token; it has only some trajectories of a group that the
                algorithm reads as a whole; or a part of reach 'batch' has not been evaluated.
        """
        estimate = self.estimate_in_head(batch)
        if not estimate.coefficients:
            return estimate
        given = batch.distributions if isinstance(batch, Trajectories) else None
        self._check_distributions(given)
        assert given is not None
        loss = estimate.loss
        at_tokens = given.at(batch.response_mask)
        for coefficients in estimate.coefficients:
            loss = loss + coefficients.loss(at_tokens)
        return replace(estimate, loss=loss)

    def _check_distributions(self, given: Distributions | None) -> None:
        """Refuse a batch without the distributions that the supports need."""
        terms = {f"term '{name}'": term for name, term in self.terms.items() if term.on_support}
        for name, one in {**terms, **{f"regularizer '{n}'": one for n, one in self.divergences.items()}}.items():
            if given is None:
                raise ValueError(
                    f"distributions: the support of the {name} is {type(one.support).__name__}, but this batch has "
                    "none; pass `distributions=upge.Distributions(tokens, policy, ...)`"
                )
            for model in sorted(one.models):
                if getattr(given, model) is None:
                    raise ValueError(
                        f"distributions: the {name} compares with the {model}, whose distributions this batch lacks; "
                        f"pass them as `{model}` in `upge.Distributions(tokens, policy, ...)`"
                    )

    def estimate_in_head(self, batch: Trajectories | PackedTokens, places: Places | None = None) -> Estimate:
        """`estimate` for the output head, where the distributions exist for a few tokens at a time.

        The loss leaves out the terms and regularizers of `Estimate.coefficients`, which the head adds.

        Args:
            batch: as for `estimate`.
            places: rows and columns of a padded batch's tokens, in the head's order; None = by rows.
        """
        for path, part in self.pending.items():
            raise ValueError(
                f"{path}: {type(part).__name__} has reach 'batch', so before the first estimate it needs the current "
                "log-probs of the whole batch; give them to `algorithm.plan(batch)`, or call "
                "`plan.with_current(batch)` with them and estimate with the plan that it returns"
            )
        if batch.logprobs is None:
            raise ValueError("logprobs: an estimate needs them, but this batch has none; pass `logprobs=...` [B, T]")
        self._check_groups(batch)
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
        for name, penalty in self.penalties.items():
            penalties[name] = penalty.value(batch, dtype)
            loss = loss + penalties[name]
        # Kept as tensors: reading a number would synchronize with the device in every chunk of the output head.
        values = {name: value.detach() for name, value in penalties.items()}
        divergences = {n: one.coefficients(batch, places, penalty=True) for n, one in self.divergences.items()}
        off_policy = frozenset(n for n, term in self.terms.items() if "behavior_logprobs" in term.live_reads())
        return Estimate(loss, weights, terms, values, batch, self._compared, on_support, divergences, off_policy)

    def _check_groups(self, batch: TokenView) -> None:
        """Refuse a micro-batch that lacks trajectories of a group that a part reads as a whole."""
        if self.reach != "group" or not isinstance(batch, Trajectories):
            return
        here = torch.zeros_like(self.contributing)
        here[batch.row] = True
        missing = self.contributing & ~here & torch.isin(self.group, self.group[here])
        if bool(missing.any()):
            raise ValueError(
                f"row: the algorithm reads whole groups in the forward pass, but {int(missing.sum())} of the "
                f"contributing trajectories of group {int(self.group[missing][0])} are not in this micro-batch; put "
                "all trajectories of a group into the same one"
            )

    @property
    def _compared(self) -> frozenset[str]:
        """The terms whose mask compares the policy with the behavior policy."""
        return frozenset(name for name, term in self.terms.items() if term.compares)


def plan_updates(
    terms: Mapping[str, Term],
    regularizers: Mapping[str, Regularizer],
    reach: str,
    batch: Trajectories,
    updates: Sequence[Int[Tensor, "b"] | None],
) -> list[Plan]:
    """One plan per update, see `Algorithm.plans`. No term or regularizer has a coefficient of 0."""
    if not batch.is_whole:
        raise ValueError(
            "row: the batch was selected from another one, whose rows a plan cannot look up; give a batch of its own, "
            "`dataclasses.replace(batch, row=None)`, and select micro-batches from that one"
        )
    active = {name: term.active(batch) for name, term in terms.items()}
    ready = {name: term.precompute(batch) for name, term in terms.items()}
    penalties: dict[str, Any] = {
        name: one.precompute_parts(batch.seeing(batch.tokens_seen(one.source))) for name, one in regularizers.items()
    }
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
    tokens = {name: batch.source_tokens(term.source) & active[name][:, None] for name, term in terms.items()}
    in_any_term = Counted(in_any, torch.stack(list(tokens.values())).any(dim=0))
    planned: dict[str, PlannedTerm] = {}
    for name, term in terms.items():
        source, rows = batch.source_rows(term.source), active[name]
        weights = _weights(term.reduction, batch, Counted(rows, tokens[name]), in_any_term)
        columns = source, rows, weights
        seen, compares = batch.tokens_seen(term.source), "behavior_logprobs" in live_reads(term.estimator.mask)
        planned[name] = PlannedTerm(term.gate, term.estimator, term.coefficient, *columns, term.support, seen, compares)
    penalties: dict[str, PlannedPenalty] = {}
    divergences: dict[str, PlannedTerm] = {}
    for name, regularizer in regularizers.items():
        counted = in_any_term.of(batch, regularizer.source)
        weights = _weights(regularizer.reduction, batch, counted, in_any_term)
        seen, factor = batch.tokens_seen(regularizer.source), regularizer.coefficient
        if isinstance(regularizer, DivergencePenalty):
            columns = counted.rows, counted.rows, weights
            product, support = regularizer.estimator, regularizer.support
            divergences[name] = PlannedTerm(ConstantGate(), product, factor, *columns, support, seen)
        else:
            penalties[name] = PlannedPenalty(regularizer, weights * factor, seen)
    contributing = _contributing([*planned.values(), *divergences.values()], penalties, reach, batch)
    return Plan(planned, penalties, contributing, in_any, batch.group, reach, divergences)


def _contributing(
    terms: Sequence[PlannedTerm], penalties: Mapping[str, PlannedPenalty], reach: str, batch: Trajectories
) -> Bool[Tensor, "B"]:
    """`Plan.contributing`: the trajectories that need a forward pass."""
    rows = [term.active if term.pending else term.signal for term in terms]
    rows += [(penalty.scale != 0).any(dim=1) for penalty in penalties.values()]
    contributing = torch.stack(rows).any(dim=0)
    if reach == "group":  # a trajectory without a signal may still be read by others of its group
        contributing = torch.isin(batch.group, batch.group[contributing])
    return contributing


@dataclass(frozen=True)
class Counted:
    """What a divisor counts.

    Attributes:
        rows: [B] trajectories.
        tokens: [B, T] tokens of them.
    """

    rows: Bool[Tensor, "B"]
    tokens: Bool[Tensor, "B T"]

    def of(self, batch: Trajectories, source: Source) -> Counted:
        """The part of one source. An empty trajectory counts with its kind, any other one if it has such tokens."""
        tokens = self.tokens & batch.source_tokens(source)
        has_tokens = tokens.any(dim=1) | ~batch.response_mask.any(dim=1)
        return Counted(self.rows & batch.source_rows(source) & has_tokens, tokens)


def _weights(reduction: Reduction, batch: Trajectories, own: Counted, in_any: Counted) -> Float[Tensor, "B T"]:
    """w on the tokens of `own`. The reduction's `over` says what its divisor counts: `own` or `in_any`."""
    if getattr(reduction, "over", None) not in get_args(Over):
        raise ConfigError(
            f"{type(reduction).__name__}.over: found {getattr(reduction, 'over', None)!r}; a reduction has the field "
            "`over`, 'term' or 'batch', which says whose trajectories its divisor counts"
        )
    counting = own if reduction.over == "term" else in_any
    # In trajectories that count, the reduction sees only the tokens that count; in all others it sees every token.
    seen = batch.response_mask & (counting.tokens | ~counting.rows[:, None])
    whole = torch.equal(seen, batch.response_mask)
    view = reduction.view(batch if whole else replace(batch, response_mask=seen))
    return reduction(view, counting.rows).detach() * own.tokens
