"""An algorithm: a named sum of terms, and how it is evaluated.

    ∇J = Σ_terms Σ_trajectories Σ_tokens coefficient·gate · w · 1_stable · (1/π_ref) · Â · f′∇π_θ  - regularizers

`Algorithm.plan` computes on the whole batch all that is known before the forward pass. `Plan.estimate` then evaluates
any piece of the batch, so the sum over pieces is the estimate of the whole whatever the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import REACHES, Component, Precomputed, live_reads, mapped
from upge.errors import ConfigError
from upge.estimate import Estimate
from upge.estimator import UnifiedGradient
from upge.formula import render
from upge.gates import Gate
from upge.needs import Needs, check_columns, needs_of
from upge.plan import Plan, PlannedTerm
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer, Source
from upge.selection import DynamicSampling, InterleavedUpdate, check_plain
from upge.stateful import UTILITY_SLOPE, StatefulGate, stateful_gates
from upge.trajectories import Trajectories
from upge.value import ValueLoss
from upge.views import TOKEN_COLUMNS


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
        interleaved_update: updates of another kind, made when enough prompts have gathered.
        validation: the objective on held-out prompts that a stateful gate may ask about.
    """

    name: str
    terms: Mapping[str, Term]
    regularizers: Mapping[str, Regularizer] = field(default_factory=dict)
    description: str = ""
    critic: ValueLoss | None = None
    sampling: DynamicSampling | None = None
    interleaved_update: InterleavedUpdate | None = None
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
        for name in ("sampling", "interleaved_update"):
            if getattr(self, name) is not None:
                found[f"{name}.gate"] = getattr(self, name).gate
        return found

    @staticmethod
    def _at_work(named: Mapping[str, Any]) -> dict[str, Any]:
        """Those of terms or regularizers whose coefficient is not 0: the others have no part in the gradient."""
        return {name: one for name, one in named.items() if one.coefficient != 0}

    @property
    def _working_parts(self) -> dict[str, Component]:
        """The parts by path, without those of terms and regularizers whose coefficient is 0."""
        idle = [f"terms.{n}." for n in self.terms.keys() - (self._at_work(self.terms) or self.terms).keys()]
        idle += [f"regularizers.{n}." for n in self.regularizers.keys() - self._at_work(self.regularizers).keys()]
        return {p: part for p, part in self.parts.items() if not f"{p}.".startswith(tuple(idle))}

    @property
    def stateful(self) -> dict[str, StatefulGate]:
        """Variable → gate, of the stateful gates."""
        return stateful_gates(self.parts)

    def initial_state(self) -> dict[str, float]:
        """The value of each variable before the first step."""
        return {name: gate.initial() for name, gate in self.stateful.items()}

    @property
    def reach(self) -> str:
        """How much of a batch must stay together in a micro-batch: 'token', 'trajectory' or 'group'."""
        return max((part.live_reach for part in self._working_parts.values()), key=REACHES.index)

    @property
    def takes_chunks(self) -> bool:
        """True if any of a batch's tokens can be evaluated alone: what waits for the forward pass has reach 'token' and
        reads per-token columns only."""
        reads = frozenset().union(*(live_reads(part) for part in self._working_parts.values()))
        return self.reach == "token" and reads <= set(TOKEN_COLUMNS)

    @property
    def has_entropy_gradient(self) -> bool:
        """True if a gradient flows through the entropies: only regularizers let one through."""
        return any("entropies" in one.columns for one in self._at_work(self.regularizers).values())

    @property
    def sources(self) -> dict[str, Source]:
        """The source of every term and regularizer with a coefficient other than 0 by its path in the file."""
        found = {f"terms.{n}": t.source for n, t in (self._at_work(self.terms) or self.terms).items()}
        return found | {f"regularizers.{n}": r.source for n, r in self._at_work(self.regularizers).items()}

    @property
    def step_needs(self) -> Needs:
        """What the batch of a step must hold, read off the parts."""
        return needs_of(self._working_parts, self.sources)

    @property
    def needs(self) -> Needs:
        """What the algorithm asks of the data and the trainer in all, with its interleaved_update and its validation."""
        own = self.step_needs
        if self.interleaved_update is not None:
            own = own.joined(self.interleaved_update.algorithm.needs)
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
        needs = self.step_needs
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
        check_columns(self._working_parts, self.sources, frozenset(provided) | ({"values"} if self.critic else set()))
        inner = {} if self.interleaved_update is None else {"interleaved_update.algorithm": self.interleaved_update.algorithm}
        inner |= {} if self.validation is None else {"validation": self.validation}
        for path, algorithm in inner.items():
            try:
                algorithm.check(group_size=group_size, demonstrations=demonstrations, provided=provided)
            except ConfigError as error:
                raise ConfigError(str(error).replace("algo.", f"algo.{path}.", 1)) from error

    def plan(self, batch: Trajectories) -> Plan:
        """All that is known before the forward pass, on the whole `batch` (its `logprobs` may be None)."""
        return self.plans(batch, [None])[0]

    def plans(self, batch: Trajectories, updates: Sequence[Int[Tensor, "b"] | None]) -> list[Plan]:
        """A plan for each of several updates, which learn from the rows of `batch` that each names (None: from all).

        Advantages and gates are computed on the whole batch: statistics such as a whitened advantage's do not depend on
        how it is cut into updates. Divisors are counts over an update's own rows.
        """
        terms = self._at_work(self.terms) or self.terms
        sources = {name: source_rows(batch, term.source) for name, term in terms.items()}
        whole = {}
        for name, term in terms.items():
            own = sources[name] & ~term.gate.closed(batch) & (term.coefficient != 0)
            # The weights wait for the update's divisor.
            whole[name] = PlannedTerm(
                term.gate.precomputed(batch), term.estimator.precompute_parts(batch), own, own, term.coefficient, sources[name]
            )
        penalties = {name: one.precompute_parts(batch) for name, one in self._at_work(self.regularizers).items()}
        return [self._bound(whole, penalties, batch, rows) for rows in updates]

    def _bound(
        self,
        whole: Mapping[str, PlannedTerm],
        precomputed: Mapping[str, Regularizer],
        batch: Trajectories,
        rows: Tensor | None,
    ) -> Plan:
        """The plan of one update on `rows` of the batch that terms and regularizers have been planned on."""
        if rows is not None:
            batch = batch.select(rows, row=torch.arange(len(rows), device=rows.device))
            whole = {name: term.taken(rows) for name, term in whole.items()}
            precomputed = {name: mapped(one, lambda values: values[rows]) for name, one in precomputed.items()}
        anywhere = torch.stack([term.active for term in whole.values()]).any(dim=0)
        planned, keep = {}, torch.zeros_like(anywhere)
        for name, term in whole.items():
            weights = _weights(self.terms[name].reduction, batch, term.active, anywhere)
            planned[name] = replace(term, weights=weights)
            advantage = term.estimator.advantage
            known = isinstance(advantage, Precomputed)
            signal = weights * advantage.values[:, : weights.shape[1]] if known else weights
            keep |= (signal != 0).any(dim=1)
        penalties = {}
        for name, regularizer in precomputed.items():
            own = source_rows(batch, regularizer.source) & anywhere
            weights = _weights(regularizer.reduction, batch, own, anywhere)
            penalties[name] = (regularizer, weights * regularizer.coefficient)
            keep |= (weights != 0).any(dim=1)
        if self.reach == "group":  # what has no signal of its own may still be read by the others of its group
            keep = torch.isin(batch.group, batch.group[keep])
        return Plan(planned, penalties, keep, anywhere, self.reach)

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
