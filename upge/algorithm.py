"""An algorithm: a named sum of terms and regularizers, and what it needs from the data and the trainer.

    ∇J = Σ_terms Σ_trajectories Σ_tokens coefficient·gate · w · 1_stable · (1/π_ref) · Â · f′∇π_θ  - regularizers

`Algorithm.plan` computes everything that is known before the forward pass, on the whole batch. `Plan.estimate` then
evaluates one micro-batch. The estimates of the micro-batches add up to the estimate of the batch, however it is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import REACHES, Component, live_reads, walk
from upge.errors import ConfigError
from upge.estimate import Estimate
from upge.formula import render
from upge.gates import Gate
from upge.gradient_noise import measured_terms
from upge.guidance import Guidance
from upge.needs import Needs, check_columns, check_groups, check_rewards, needs_of
from upge.plan import Plan, plan_updates
from upge.prompt_memory import PromptMemory
from upge.prompt_sampling import Curriculum, DynamicSampling, check_reads_outcomes
from upge.regularizers import DivergencePenalty, Regularizer, ValueLoss
from upge.replay import Replay
from upge.stateful import GRADIENT_NOISE, UTILITY_SLOPE, StatefulGate, stateful_gates
from upge.support import SampledToken, Support
from upge.term import Term
from upge.trajectories import Source, Trajectories
from upge.views import MEMORY_COLUMNS, TOKEN_COLUMNS

_Weighted = TypeVar("_Weighted", Term, Regularizer)


@dataclass(frozen=True)
class InterleavedUpdate:
    """An update by a second algorithm, made whenever enough prompts have been collected for it (arXiv 2506.07527).

    Each step collects the prompts that have a demonstration and on whose rollouts `gate` is open. Once `size` prompts
    are collected, the step's own update is followed by one update of `algorithm` on their demonstrations, and the
    collection starts again from empty.

    Attributes:
        gate: the gate; it may read only rewards and groups.
        size: number of prompts per interleaved update.
        algorithm: the second algorithm; it must learn from demonstrations only.
        own_optimizer: True if the interleaved update has its own Adam moments.
        lr_factor: its learning rate as a multiple of the step's.
    """

    gate: Gate
    size: int
    algorithm: Algorithm
    own_optimizer: bool = True
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1 or not self.lr_factor > 0:
            raise ConfigError(
                f"interleaved_update: size={self.size}, lr_factor={self.lr_factor}; both must be positive"
            )
        needs = self.algorithm.needs
        if needs.rollouts or needs.preference_pairs:
            raise ConfigError(
                f"interleaved_update.algorithm: '{self.algorithm.name}' needs more than demonstrations; give one that "
                "learns from demonstrations alone"
            )
        _check_plain(self.algorithm, "interleaved_update.algorithm")
        check_reads_outcomes(self.gate, "interleaved_update.gate")


@dataclass(frozen=True)
class Algorithm:
    """A named sum of terms plus additive regularizers.

    Attributes:
        terms: name → term, in the order of the file.
        description: one or two lines for readers.
        critic: the objective of the value network; required if a part reads values.
        sampling: how prompts are drawn, and which are redrawn; None = all are drawn equally often.
        interleaved_update: updates by a second algorithm, made when enough prompts have been collected.
        validation: the objective on held-out prompts that a stateful gate may follow.
        guidance: which rollouts continue the beginning of a demonstration; None = none.
        memory: what is tracked of each prompt from step to step; None = nothing.
        replay: which rollouts of earlier steps a step learns from again; None = none.
    """

    name: str
    terms: Mapping[str, Term]
    regularizers: Mapping[str, Regularizer] = field(default_factory=dict[str, Regularizer])
    description: str = ""
    critic: ValueLoss | None = None
    sampling: DynamicSampling | Curriculum | None = None
    interleaved_update: InterleavedUpdate | None = None
    validation: Algorithm | None = None
    guidance: Guidance | None = None
    memory: PromptMemory | None = None
    replay: Replay | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for path, part in self.parts.items():
            for _, inner in walk(part, path):
                _check_part(inner, path)
        if not self.terms:
            raise ConfigError(f"{self.name}: terms is empty; an algorithm is a sum of at least one term")
        for name, regularizer in self.regularizers.items():
            if not math.isfinite(regularizer.coefficient):
                raise ConfigError(
                    f"regularizers.{name}.coefficient: found {regularizer.coefficient}; give a finite number"
                )
        for gate in self.stateful.values():
            if gate.wants & set(GRADIENT_NOISE):
                measured_terms(self.terms, gate)
        asking = [g for g in self.stateful.values() if UTILITY_SLOPE in g.wants]
        if asking and self.validation is None:
            raise ConfigError(
                f"{self.name}: {type(asking[0]).__name__} follows a held-out objective, but there is no `validation`; "
                "give the name of an algorithm as validation=NAME"
            )
        if self.validation is not None:
            _check_plain(self.validation, "validation")
        if self.sampling is not None and "rollouts" not in {term.source for term in self.terms.values()}:
            raise ConfigError(f"{self.name}: sampling chooses prompts by rollouts, but no term's source is rollouts")
        if self.curriculum is not None and self.memory is None:
            raise ConfigError(
                f"{self.name}: sampling draws prompts by what is remembered of them, but there is no `memory`; give "
                "one, for example memory={_target_: upge.DecayedMean}"
            )
        if self.memory is not None and not self.step_needs.rollouts:
            raise ConfigError(f"{self.name}: memory remembers rollouts, but no term's source is rollouts; remove it")
        if self.guidance is not None:
            self._check_guidance(self.guidance)
        for name in ("sampling", "guidance", "memory"):
            if self.replay is not None and getattr(self, name) is not None:
                raise ConfigError(f"{self.name}: replay does not go with {name}; remove one of them")
        if self.replay is not None and not self.step_needs.rollouts:
            raise ConfigError(f"{self.name}: replay repeats rollouts, but no term's source is rollouts; remove it")

    def _check_guidance(self, guidance: Guidance) -> None:
        """Refuse guidance of an algorithm that has no place for it."""
        sources = self.sources
        pairs = next((path for path, source in sources.items() if source == "preference_pairs"), None)
        shown = next((path for path, source in sources.items() if source == "demonstrations"), None)
        if not self.step_needs.rollouts:
            problem = "guides rollouts, but no term's source is rollouts; remove it"
        elif pairs is not None:
            problem = f"does not go with {pairs}.source=preference_pairs; remove one of them"
        elif self.critic is not None:
            problem = "does not go with a critic, which learns from tokens that the policy sampled; remove one of them"
        elif shown is not None and guidance.in_prompt:
            problem = f"has in_prompt=true, so {shown}.source=demonstrations has no tokens; give in_prompt=false"
        else:
            return
        raise ConfigError(f"{self.name}: guidance {problem}")

    @property
    def parts(self) -> dict[str, Component]:
        """Every part by its path in the file."""
        parts = {f"terms.{n}.{path}": p for n, term in self.terms.items() for path, p in term.parts.items()}
        for name, regularizer in self.regularizers.items():
            parts[f"regularizers.{name}"] = regularizer
        if self.critic is not None:
            parts["critic"] = self.critic
        if self.dynamic_sampling is not None:
            parts["sampling.gate" if self.curriculum is None else "sampling.redraw.gate"] = self.dynamic_sampling.gate
        if self.interleaved_update is not None:
            parts["interleaved_update.gate"] = self.interleaved_update.gate
        return parts

    @property
    def curriculum(self) -> Curriculum | None:
        """The weights with which prompts are drawn; None if all are drawn equally often."""
        return self.sampling if isinstance(self.sampling, Curriculum) else None

    @property
    def dynamic_sampling(self) -> DynamicSampling | None:
        """The rule that replaces prompts depending on their rollouts; None if there is none."""
        return self.sampling.redraw if isinstance(self.sampling, Curriculum) else self.sampling

    @property
    def _weighted_terms(self) -> Mapping[str, Term]:
        """The terms with a coefficient other than 0; all terms if every coefficient is 0."""
        return _weighted(self.terms) or self.terms

    @property
    def _working_parts(self) -> dict[str, Component]:
        """The parts by path, except those of terms and regularizers whose coefficient is 0."""
        idle = [f"terms.{n}." for n in self.terms.keys() - self._weighted_terms.keys()]
        idle += [f"regularizers.{n}." for n in self.regularizers.keys() - _weighted(self.regularizers).keys()]
        return {p: part for p, part in self.parts.items() if not f"{p}.".startswith(tuple(idle))}

    @property
    def stateful(self) -> dict[str, StatefulGate]:
        """Variable → stateful gate."""
        return stateful_gates(self.parts)

    def initial_state(self) -> dict[str, float]:
        """The value of each variable before the first step."""
        return {name: gate.initial() for name, gate in self.stateful.items()}

    @cached_property
    def reach(self) -> str:
        """How much of a batch must stay together in a micro-batch: 'token', 'trajectory' or 'group'.

        Parts of reach 'batch' are evaluated before the batch is cut, so they do not count.
        """
        return max((part.live_reach for part in self._parts_in_micro_batches), key=REACHES.index, default="token")

    @cached_property
    def _parts_in_micro_batches(self) -> list[Component]:
        """The working parts, except those that are evaluated once per update."""
        return [part for path, part in self._working_parts.items() if path not in self.parts_per_update]

    @cached_property
    def parts_per_update(self) -> dict[str, Component]:
        """The parts of reach 'batch' by path; a forward pass before each update lets them see all of its tokens."""
        return {path: part for path, part in self._working_parts.items() if part.spans_update}

    @cached_property
    def takes_chunks(self) -> bool:
        """True if any selection of tokens can be evaluated on its own.

        This holds if everything evaluated after the forward pass has reach 'token' and reads only per-token columns.
        """
        reads = frozenset[str]().union(*(live_reads(part) for part in self._parts_in_micro_batches))
        return self.reach == "token" and reads <= {*TOKEN_COLUMNS, "is_sampled"}

    @cached_property
    def supports(self) -> dict[str, Support]:
        """The support of every term and regularizer that moves tokens other than the sampled one, by its path.

        Those with a coefficient of 0 are left out.
        """
        of_terms = {f"terms.{n}": term.support for n, term in self._weighted_terms.items()}
        penalties = {n: one for n, one in _weighted(self.regularizers).items() if isinstance(one, DivergencePenalty)}
        supports = of_terms | {f"regularizers.{n}": one.support for n, one in penalties.items()}
        return {path: support for path, support in supports.items() if not isinstance(support, SampledToken)}

    @property
    def has_entropy_gradient(self) -> bool:
        """True if a gradient flows through the entropies. Only regularizers on sampled tokens can have one."""
        sampled = [one for one in _weighted(self.regularizers).values() if not isinstance(one, DivergencePenalty)]
        return any("entropies" in one.columns for one in sampled)

    @property
    def sources(self) -> dict[str, Source]:
        """The source of every term and regularizer with a coefficient other than 0, by its path in the file."""
        sources: dict[str, Source] = {f"terms.{n}": t.source for n, t in self._weighted_terms.items()}
        for name, regularizer in _weighted(self.regularizers).items():
            sources[f"regularizers.{name}"] = regularizer.source
        return sources

    @property
    def step_needs(self) -> Needs:
        """What the batch of a step must hold, as the parts declare it."""
        # The support of a term applies to its estimator, that of a regularizer to the regularizer itself.
        owners = {f"{path}.estimator" if path.startswith("terms.") else path: s for path, s in self.supports.items()}
        needs = needs_of(self._working_parts, self.sources, owners)
        return needs if self.guidance is None else replace(needs, demonstrations=False, prefixes=True)

    @property
    def needs(self) -> Needs:
        """What the algorithm needs from the data and the trainer, including its interleaved update and validation."""
        return reduce(Needs.joined, (inner.needs for inner in self.inner.values()), self.step_needs)

    @property
    def inner(self) -> dict[str, Algorithm]:
        """The algorithms inside this one, by path: the interleaved update's and the validation objective."""
        algorithms = {} if self.validation is None else {"validation": self.validation}
        if self.interleaved_update is not None:
            algorithms = {"interleaved_update.algorithm": self.interleaved_update.algorithm} | algorithms
        return algorithms

    def check(
        self,
        *,
        group_size: int,
        demonstrations: int | None = None,
        provided: Iterable[str] = (),
        rewards: Iterable[str] | None = None,
        path: str = "algo",
    ) -> None:
        """Check that a run can train this algorithm.

        Args:
            group_size: rollouts per prompt.
            demonstrations: number of prompts with a demonstration; None = not known yet.
            provided: the columns beyond rewards and masks that the caller can fill. The algorithm's own `critic` and
                `memory` provide `values` and the `prompt_*` columns.
            rewards: the names of the rewards; None = not known yet.

        Raises:
            ConfigError: the run cannot; the message names the key, the value and the fix.
        """
        needs = self.step_needs
        if needs.rollouts and group_size < needs.group_size:
            part = type(self.parts[needs.group_size_because]).__name__
            raise ConfigError(
                f"{group_size} is too small for {path}.{needs.group_size_because} ({part}), which compares the "
                f"rollouts of one prompt; set group_size to {needs.group_size} or more",
                "group_size",
            )
        if self.replay is not None:
            self.replay.check_group_size(group_size, path)
        if self.guidance is not None:
            self.guidance.check(group_size, demonstrations, path)
        learning = {p: s for p, s in self.sources.items() if s in ("demonstrations", "all")}
        if learning and demonstrations == 0:
            owner, source = next(iter(learning.items()))
            what = source if source == "demonstrations" else f"{source}, which includes demonstrations"
            raise ConfigError(
                f"{what}, but the data set has none; choose data with worked solutions or an algorithm that learns "
                "from rollouts alone",
                f"{path}.{owner}.source",
            )
        if needs.rollouts and (needs.demonstrations or needs.preference_pairs):
            check_groups(self._working_parts, path)
        filled = frozenset(provided) | ({"values"} if self.critic else frozenset[str]())
        filled |= MEMORY_COLUMNS if self.memory is not None else frozenset[str]()
        check_columns(self._working_parts, self.sources, filled, path)
        if rewards is not None:
            check_rewards(self._working_parts, rewards := tuple(rewards), path)
        for name, algorithm in self.inner.items():
            algorithm.check(
                group_size=group_size,
                demonstrations=demonstrations,
                provided=provided,
                rewards=rewards,
                path=f"{path}.{name}",
            )

    def plan(self, batch: Trajectories) -> Plan:
        """Everything that is known before the forward pass, on the whole batch. The batch's `logprobs` may be None.

        If the batch has log-probs, they must be those of the current policy, and parts of reach 'batch' are also
        evaluated. Otherwise `Plan.with_current` evaluates these parts later.
        """
        plan = self.plans(batch, [None])[0]
        return plan if batch.logprobs is None else plan.with_current(batch)

    def plans(self, batch: Trajectories, updates: Sequence[Int[Tensor, "b"] | None]) -> list[Plan]:
        """One plan per update.

        Advantages and gates are computed on the whole batch, so statistics such as a whitened advantage's do not
        depend on how the batch is split into updates. Divisors are counts over an update's own rows. Parts of reach
        'batch' see an update's own rows under the policy at the time of that update: see `Plan.with_current`.

        Args:
            updates: for each update, the rows of `batch` that it learns from; None = all.
        """
        penalties = _weighted(self.regularizers)
        check_rewards(self._working_parts, batch.named_rewards, self.name)
        return plan_updates(self._weighted_terms, penalties, self.reach, batch, updates)

    def estimate(self, batch: Trajectories) -> Estimate:
        """The loss, the weights and every factor on a whole batch. `loss.backward()` gives minus the gradient."""
        batch = batch if batch.is_whole else replace(batch, row=None)
        return self.plan(batch).estimate(batch)

    def formula(self, style: str = "text") -> str:
        """The algorithm's formula, a sum of products, as 'text' or 'latex'."""
        terms = {name: term.formula() for name, term in self.terms.items()}
        return render(terms, {name: one.formula() for name, one in self.regularizers.items()}, style)


def _weighted(named: Mapping[str, _Weighted]) -> dict[str, _Weighted]:
    """The terms or regularizers whose coefficient is not 0. The others do not enter the gradient."""
    return {name: one for name, one in named.items() if one.coefficient != 0}


def _check_part(part: Component, path: str) -> None:
    """Refuse a setting outside its type, also of a user's part whose constructor does not check it."""
    try:
        check_fields(part)
    except ConfigError as error:
        raise error.under(path) from error


def _check_plain(algorithm: Algorithm, path: str) -> None:
    """Refuse an inner algorithm that needs what only a whole run provides."""
    for name in ("critic", "sampling", "interleaved_update", "validation", "stateful", "guidance", "memory", "replay"):
        value = getattr(algorithm, name)
        if value:
            what = f"stateful gates ({', '.join(value)})" if name == "stateful" else f"a `{name}` of its own"
            raise ConfigError(f"{path}: '{algorithm.name}' has {what}, which only a whole run provides; remove it")
