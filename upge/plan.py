"""An algorithm bound to a batch, with everything that is known before the forward pass computed.

plan = algorithm.plan(batch)          # on the whole batch
plan.estimate(micro_batch)            # on some of its trajectories; the estimates add up
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.candidates import Places, SupportCoefficients
from upge.components.base import Precomputed, live_reads, mapped
from upge.errors import ConfigError
from upge.estimate import Estimate
from upge.estimator import TermFactors, UnifiedGradient
from upge.gates import Gate
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer
from upge.support import CANDIDATE_COLUMNS, SampledToken, Support
from upge.term import Term
from upge.trajectories import Source, Trajectories
from upge.views import PackedTokens, TokenView


@dataclass(frozen=True)
class PlannedTerm:
    """A term bound to a batch, with everything that is known before the forward pass computed.

    Attributes:
        source: [B] True for the trajectories of the term's source.
        active: [B] True for those of them whose coefficient is not known to be 0.
        weights: [B, T] the reduction's w, 0 outside the active rows and the tokens of the source.
        support: of the term.
        seen: [B, T] the tokens that the parts see; None = all.
    """

    gate: Gate
    estimator: UnifiedGradient
    coefficient: float
    source: Bool[Tensor, "B"]
    active: Bool[Tensor, "B"]
    weights: Float[Tensor, "B T"]
    support: Support = SampledToken()
    seen: Bool[Tensor, "B T"] | None = None

    def to(self, device: torch.device | str) -> PlannedTerm:
        """A copy of this term on `device`."""

        def move(values: Tensor) -> Tensor:
            return values.to(device)

        gate, estimator = mapped(self.gate, move), mapped(self.estimator, move)
        tensors = move(self.source), move(self.active), move(self.weights)
        seen = None if self.seen is None else move(self.seen)
        return PlannedTerm(gate, estimator, self.coefficient, *tensors, self.support, seen)

    @property
    def on_support(self) -> bool:
        """True if the term moves other tokens than the sampled one."""
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

    def coefficients(self, batch: Trajectories | PackedTokens, places: Places | None) -> SupportCoefficients:
        """The coefficients on the term's support, for the batch's tokens in order or for those at `places`."""
        gate, w = self._scales(batch.seeing(self.seen))
        return SupportCoefficients(self.estimator, self.support, batch, gate.expand(w.shape), w, places)

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
        """[B] False where every token's weight or precomputed advantage is 0, so that the gradient must be 0."""
        signal, advantage = self.weights, self.estimator.parts["advantage"]
        if isinstance(advantage, Precomputed):
            signal = signal * advantage.values[:, : signal.shape[1]]
        return (signal != 0).any(dim=1)


@dataclass(frozen=True)
class PlannedPenalty:
    """A regularizer bound to a batch, with its parts precomputed.

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

        Trajectories outside the regularizer's source are hidden from it like padding, because their penalty may
        overflow and 0·∞ is NaN in value and gradient. A penalty of reach 'group' may need to read them, so it sees all
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


@dataclass(frozen=True)
class Plan:
    """An algorithm bound to a batch.

    Attributes:
        terms: name → term, for the terms with a coefficient other than 0.
        penalties: name → its regularizer, bound to the batch.
        contributing: [B] True for trajectories that can contribute to the gradient. Only these need a forward pass.
        active: [B] True for trajectories with a non-zero coefficient in some term, whether or not they contribute.
        group: [B] of the batch.
        reach: the algorithm's reach. With 'group', a part may also read trajectories whose own weight is 0.
    """

    terms: Mapping[str, PlannedTerm]
    penalties: Mapping[str, PlannedPenalty]
    contributing: Bool[Tensor, "B"]
    active: Bool[Tensor, "B"]
    group: Int[Tensor, "B"]
    reach: str = "group"

    def to(self, device: torch.device | str) -> Plan:
        """This plan on `device`, which must be the device of the micro-batches."""
        if self.contributing.device == torch.device(device):
            return self
        penalties = {name: penalty.to(device) for name, penalty in self.penalties.items()}
        terms = {name: term.to(device) for name, term in self.terms.items()}
        contributing, active, group = (c.to(device) for c in (self.contributing, self.active, self.group))
        return Plan(terms, penalties, contributing, active, group, self.reach)

    def alone(self, name: str) -> Plan:
        """The plan of a single term or regularizer.

        The losses and gradients of these plans add up to those of the whole plan.
        """
        terms = {n: term for n, term in self.terms.items() if n == name}
        penalties = {n: penalty for n, penalty in self.penalties.items() if n == name}
        scales = [term.weights for term in terms.values()] + [penalty.scale for penalty in penalties.values()]
        weighted = torch.stack([(scale != 0).any(dim=1) for scale in scales]).any(dim=0)
        contributing = self.contributing if self.reach == "group" else self.contributing & weighted
        return Plan(terms, penalties, contributing, self.active, self.group, self.reach)

    def reading(self, column: str) -> Bool[Tensor, "B"]:
        """[B] contributing trajectories on which some part reads `column` after the forward pass."""
        if self.reach == "group":
            return self.contributing
        rows = torch.zeros_like(self.contributing)
        for term in self.terms.values():
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
            ValueError: `batch` has no log-probs of the current policy, no distributions for a term whose support is
                not the sampled token, or only some trajectories of a group that the algorithm reads as a whole.
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
        # As tensors: to read a number would wait for the device, in each chunk of the output head.
        values = {name: value.detach() for name, value in penalties.items()}
        return Estimate(loss, weights, terms, values, batch, self._compared, on_support)

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
    tokens = {name: batch.source_tokens(term.source) & active[name][:, None] for name, term in terms.items()}
    in_any_term = Counted(in_any, torch.stack(list(tokens.values())).any(dim=0))
    planned: dict[str, PlannedTerm] = {}
    contributing = torch.zeros_like(in_any)
    for name, term in terms.items():
        source, rows = batch.source_rows(term.source), active[name]
        weights = _weights(term.reduction, batch, Counted(rows, tokens[name]), in_any_term)
        columns = source, rows, weights
        seen = batch.tokens_seen(term.source)
        planned[name] = PlannedTerm(term.gate, term.estimator, term.coefficient, *columns, term.support, seen)
        contributing |= planned[name].signal
    penalties: dict[str, PlannedPenalty] = {}
    for name, regularizer in regularizers.items():
        counted = in_any_term.of(batch, regularizer.source)
        weights = _weights(regularizer.reduction, batch, counted, in_any_term)
        seen = batch.tokens_seen(regularizer.source)
        penalties[name] = PlannedPenalty(regularizer, weights * regularizer.coefficient, seen)
        contributing |= (weights != 0).any(dim=1)
    if reach == "group":  # a trajectory without a signal may still be read by others of its group
        contributing = torch.isin(batch.group, batch.group[contributing])
    return Plan(planned, penalties, contributing, in_any, batch.group, reach)


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
        """Those of one source. An empty trajectory counts with its kind, any other one if it has such tokens."""
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
    # Of a trajectory that counts, the tokens that count. The others are not counted, and are shown as they are.
    seen = batch.response_mask & (counting.tokens | ~counting.rows[:, None])
    whole = torch.equal(seen, batch.response_mask)
    view = reduction.view(batch if whole else replace(batch, response_mask=seen))
    return reduction(view, counting.rows).detach() * own.tokens
