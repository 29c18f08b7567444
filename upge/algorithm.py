"""An algorithm: a named sum of terms, and how it is evaluated.

    ∇J = Σ_terms Σ_trajectories Σ_tokens coefficient·gate · w · 1_stable · (1/π_ref) · Â · f′∇π_θ  - regularizers

`Algorithm.plan` computes on the whole batch all that is known before the forward pass. `Plan.estimate` then evaluates
any piece of the batch, so the sum over pieces is the estimate of the whole whatever the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import REACHES, Component, Precomputed, moved
from upge.errors import ConfigError
from upge.estimate import Estimate, TermFactors
from upge.estimator import UnifiedGradient
from upge.formula import render
from upge.gates import Gate
from upge.needs import Needs, check_columns, needs_of
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer, Source
from upge.selection import DynamicSampling, Interlude, check_plain
from upge.stateful import UTILITY_SLOPE, StatefulGate, stateful_gates
from upge.trajectories import Trajectories
from upge.value import ValueLoss


def source_rows(batch: Trajectories, source: Source) -> Bool[Tensor, "B"]:
    """[B] which trajectories a source names."""
    if source == "all":
        return torch.ones_like(batch.is_demonstration)
    if source == "preference_pairs":
        if batch.preference is None:
            raise ConfigError("source: preference_pairs needs the column `preference`, which the batch does not have")
        return batch.preference != 0
    if source == "rollouts":
        return ~batch.is_demonstration
    # The rejected side of a pair is an expert's, or at least not the model's, but nothing to imitate.
    return batch.is_demonstration if batch.preference is None else batch.is_demonstration & (batch.preference >= 0)


@dataclass(frozen=True)
class Term:
    """Source × gate × estimator × reduction; `coefficient` is a plain number in front of all of it."""

    source: Source
    gate: Gate
    estimator: UnifiedGradient
    reduction: Reduction
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not math.isfinite(self.coefficient):
            raise ConfigError(f"coefficient: found {self.coefficient}; give a finite number")

    @property
    def parts(self) -> dict[str, Component]:
        """Every part by its path within the term."""
        estimator = {f"estimator.{slot}": part for slot, part in self.estimator.parts.items()}
        return {"gate": self.gate, **estimator, "reduction": self.reduction}


@dataclass(frozen=True)
class Algorithm:
    """A named sum of terms plus additive regularizers.

    Attributes:
        name: as in its file.
        terms: name → term; the order is that of the file.
        regularizers: name → regularizer.
        description: a line or two for people.
        critic: the objective of the value network; needed where a part reads values.
        sampling: which prompts are drawn anew.
        interlude: updates of another kind, made when enough prompts have gathered.
        validation: the objective on held-out prompts that a gate with memory may ask about.
    """

    name: str
    terms: Mapping[str, Term]
    regularizers: Mapping[str, Regularizer] = field(default_factory=dict)
    description: str = ""
    critic: ValueLoss | None = None
    sampling: DynamicSampling | None = None
    interlude: Interlude | None = None
    validation: Algorithm | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.terms:
            raise ConfigError(f"{self.name}: terms is empty; an algorithm is a sum of at least one term")
        asking = [g for g in self.stateful.values() if UTILITY_SLOPE in g.wants]
        if asking and self.validation is None:
            raise ConfigError(
                f"{self.name}: {type(asking[0]).__name__} follows a held-out objective, but there is no `validation`; "
                "give the name of an algorithm as validation=NAME"
            )
        if self.validation is not None:
            check_plain(self.validation, "validation")
        if self.sampling is not None and "rollouts" not in {term.source for term in self.terms.values()}:
            raise ConfigError(f"{self.name}: sampling chooses prompts by rollouts, but no term's source is rollouts")

    @property
    def parts(self) -> dict[str, Component]:
        """Every part by its path in the file."""
        found = {f"terms.{n}.{path}": p for n, term in self.terms.items() for path, p in term.parts.items()}
        for name, regularizer in self.regularizers.items():
            found[f"regularizers.{name}"] = regularizer
        if self.critic is not None:
            found["critic"] = self.critic
        for name in ("sampling", "interlude"):
            if getattr(self, name) is not None:
                found[f"{name}.gate"] = getattr(self, name).gate
        return found

    @property
    def stateful(self) -> dict[str, StatefulGate]:
        """Variable → gate, of the gates with a memory."""
        return stateful_gates(self.parts)

    def initial_state(self) -> dict[str, float]:
        """The value of each variable before the first step."""
        return {name: gate.initial() for name, gate in self.stateful.items()}

    @property
    def reach(self) -> str:
        """How much of a batch must stay together in a micro-batch: 'token', 'trajectory' or 'group'."""
        return max((part.live_reach for part in self.parts.values()), key=REACHES.index)

    @property
    def sources(self) -> dict[str, Source]:
        """The source of every term and regularizer by its path in the file."""
        found = {f"terms.{n}": t.source for n, t in self.terms.items()}
        return found | {f"regularizers.{n}": r.source for n, r in self.regularizers.items()}

    @property
    def step_needs(self) -> Needs:
        """What the batch of a step must hold, read off the parts."""
        return needs_of(self.parts, self.sources)

    @property
    def needs(self) -> Needs:
        """What the algorithm asks of the data and the trainer in all, with its interlude and its validation."""
        own = self.step_needs
        if self.interlude is not None:
            own = own.joined(self.interlude.algorithm.needs)
        return own if self.validation is None else own.joined(self.validation.needs)

    def check(self, *, group_size: int, demonstrations: int | None = None, provided: Iterable[str] = ()) -> None:
        """Refuses a pair of algorithm and run that cannot work.

        Args:
            group_size: rollouts per prompt.
            demonstrations: how many prompts have one; None = not known yet.
            provided: the columns beyond rewards and masks that the caller can fill; values follow from `critic`.

        Raises:
            ConfigError: naming the key, the value and the fix.
        """
        needs = self.needs
        if needs.rollouts and group_size < needs.group_size:
            part = type(self.parts[needs.group_size_because]).__name__
            raise ConfigError(
                f"group_size: {group_size} is too small for algo.{needs.group_size_because} ({part}), which compares "
                f"the rollouts of one prompt; set group_size to {needs.group_size} or more"
            )
        learning = {p: s for p, s in self.sources.items() if s in ("demonstrations", "all")}
        if learning and demonstrations == 0:
            owner, source = next(iter(learning.items()))
            what = source if source == "demonstrations" else f"{source}, which takes in demonstrations"
            raise ConfigError(
                f"algo.{owner}.source: {what}, but the data set has none; choose data with worked "
                "solutions or an algorithm that learns from rollouts alone"
            )
        check_columns(self.parts, self.sources, frozenset(provided) | ({"values"} if self.critic else set()))
        for name in ("interlude", "validation"):
            inner = getattr(self, name)
            inner = inner.algorithm if name == "interlude" and inner is not None else inner
            if inner is not None:
                inner.check(group_size=group_size, demonstrations=demonstrations, provided=provided)

    def plan(self, batch: Trajectories) -> Plan:
        """All that is known before the forward pass, on the whole `batch` (its `logprobs` may be None)."""
        sources = {name: source_rows(batch, term.source) for name, term in self.terms.items()}
        own, gates = {}, {}
        for name, term in self.terms.items():
            gates[name] = term.gate.hoisted(batch)
            own[name] = sources[name] & ~term.gate.closed(batch) & (term.coefficient != 0)
        anywhere = torch.stack(list(own.values())).any(dim=0)
        planned, keep = {}, torch.zeros_like(anywhere)
        for name, term in self.terms.items():
            weights = _weights(term.reduction, batch, own[name], anywhere)
            estimator = term.estimator.hoist(batch)
            planned[name] = PlannedTerm(gates[name], estimator, weights, own[name], term.coefficient, sources[name])
            advantage = estimator.advantage
            signal = weights * advantage.values if isinstance(advantage, Precomputed) else weights
            keep |= (signal != 0).any(dim=1)
        penalties = {}
        for name, regularizer in self.regularizers.items():
            rows = source_rows(batch, regularizer.source) & anywhere
            weights = _weights(regularizer.reduction, batch, rows, anywhere)
            penalties[name] = (regularizer, weights * regularizer.coefficient)
            keep |= (weights != 0).any(dim=1)
        if self.reach == "group":  # what has no signal of its own may still be read by the others of its group
            keep = torch.isin(batch.group, batch.group[keep])
        return Plan(planned, penalties, keep, anywhere)

    def estimate(self, batch: Trajectories) -> Estimate:
        """The loss, the weights and every factor on a whole batch; `loss.backward()` gives minus the gradient."""
        return self.plan(batch).estimate(batch)

    def formula(self, style: str = "text") -> str:
        """The sum of products in print; `style` is 'text' or 'latex'."""
        return render(self, style)


def _weights(reduction: Reduction, batch: Trajectories, own: Tensor, anywhere: Tensor) -> Tensor:
    if getattr(reduction, "over", None) not in get_args(Over):
        raise ConfigError(
            f"{type(reduction).__name__}.over: found {getattr(reduction, 'over', None)!r}; a reduction has the field "
            "`over`, 'term' or 'batch', which says whose trajectories its divisor counts"
        )
    counted = own if reduction.over == "term" else anywhere
    return reduction(reduction.view(batch), counted).detach() * own[:, None]


def _penalty(regularizer: Regularizer, scale: Tensor, batch: Trajectories) -> Tensor:
    """The value of a regularizer on a piece; `scale` [b, t] is coefficient·w.

    Trajectories outside its source are hidden from it as padding is: their penalty may overflow, and 0 times infinity
    is NaN in value and gradient. A penalty of reach 'group' may want to read them, so it sees all.
    """
    if regularizer.live_reach != "group":
        counted = (scale != 0).any(dim=1, keepdim=True)
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

    def factors(self, batch: Trajectories) -> TermFactors:
        """The factors on a piece of the batch, each [b, t]."""
        shape = batch.response_mask.shape
        factors = self.estimator.factors(batch)
        gate = self.gate(self.gate.view(batch)).detach().double() * self.coefficient
        gate = torch.where(self.own[batch.row], gate, torch.zeros_like(gate))
        w = self.weights[batch.row][:, : shape[1]]
        product = self.estimator.weight(batch, factors)
        scale = gate[:, None] * w
        weight = torch.where(scale == 0, torch.zeros_like(scale), scale * product)
        expanded = {name: value.expand(shape) for name, value in factors._asdict().items()}
        return TermFactors(**expanded, gate=gate[:, None].expand(shape), reduction=w, weights=weight)


@dataclass(frozen=True)
class Plan:
    """An algorithm bound to a batch.

    Attributes:
        keep: [B] trajectories that can contribute to the gradient; no other needs a forward pass.
        counted: [B] trajectories with a coefficient other than zero in some term, those without a signal included.
    """

    terms: Mapping[str, PlannedTerm]
    penalties: Mapping[str, tuple[Regularizer, Tensor]]
    keep: Bool[Tensor, "B"]
    counted: Bool[Tensor, "B"]

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its values on `device`, where the pieces of the batch are."""
        if self.keep.device == torch.device(device):
            return self
        move = lambda value: moved(value, device)  # noqa: E731
        terms = {n: PlannedTerm(*(move(getattr(t, f)) for f in t.__dataclass_fields__)) for n, t in self.terms.items()}
        penalties = {n: (regularizer, move(scale)) for n, (regularizer, scale) in self.penalties.items()}
        return Plan(terms, penalties, move(self.keep), move(self.counted))

    def estimate(self, batch: Trajectories) -> Estimate:
        """The estimate on a piece of the planned batch (`batch.row` says which); pieces add up.

        Raises:
            ValueError: the batch has no log-probs of the current policy.
        """
        if batch.logprobs is None:
            raise ValueError("logprobs: an estimate needs them, but this batch has none; pass `logprobs=...` [B, T]")
        terms = {name: term.factors(batch) for name, term in self.terms.items()}
        logprobs = batch.logprobs
        # Weights in half precision would lose what their divisors need.
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        weights = torch.stack([t.weights for t in terms.values()]).sum(dim=0).to(dtype)
        # Where nothing is to be learned the log-prob may be -inf, and 0 times that is NaN.
        loss = -(weights * torch.where(weights == 0, torch.zeros_like(logprobs), logprobs)).sum()
        penalties = {}
        for name, (regularizer, scale) in self.penalties.items():
            penalties[name] = _penalty(regularizer, scale[batch.row][:, : logprobs.shape[1]].to(dtype), batch)
            loss = loss + penalties[name]
        return Estimate(loss, weights, terms, {n: float(p.detach()) for n, p in penalties.items()}, batch.response_mask)
