"""What is asked of the algorithms on one pool: overall, part by part, and against each other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.measure.by_rate import AtCount, AtRate, Bin, at_counts, at_rates
from upge.measure.contributions import Directions, Entries, Estimator
from upge.measure.figures import Figures, Sample, cosine_of, cosine_with, figures
from upge.measure.pool import Pool
from upge.measure.statistics import Estimated

#: Two estimators whose batches have this cosine are the same but for their scale.
_SAME = 1 - 1e-6


@dataclass(frozen=True)
class Measured:
    """An algorithm, or one part of it.

    Attributes:
        name: the algorithm's, and the part's behind a dot where it has several.
        algorithm, part: part is '' for the whole.
        source: what it learns from; 'rollouts, demonstrations' and the like for a whole of several parts.
        overall: of a whole batch.
        imitation: cosine with the gradient of the demonstrations' log-likelihood; None without demonstrations.
        held_out: cosine with the true gradient on other prompts; None if none were given.
        by_rate: for the bins in which it has any weight.
        by_count: for the numbers of successes where it has any weight.
    """

    name: str
    algorithm: str
    part: str
    source: str
    overall: Figures
    imitation: Estimated | None
    held_out: Estimated | None
    by_rate: tuple[AtRate, ...]
    by_count: tuple[AtCount, ...]


@dataclass(frozen=True)
class Conflict:
    """The cosine between the mean gradients of an algorithm's parts on rollouts and on demonstrations."""

    algorithm: str
    overall: Estimated
    by_rate: Mapping[str, Estimated]


@dataclass(frozen=True)
class Targets:
    """What estimators are held against.

    Attributes:
        true: [M, H, k] independent estimates of each prompt's ∇E[R].
        imitation: [R, k] gradient of the mean log-likelihood of the demonstrations of each round; None without any.
        held_out: [H, k] independent estimates of ∇E[R] on other prompts; None without any.
    """

    true: Float[Tensor, "M H k"]
    imitation: Float[Tensor, "R k"] | None = None
    held_out: Float[Tensor, "H k"] | None = None

    @property
    def pooled(self) -> Float[Tensor, "H k"]:
        """[H, k] the mean over prompts."""
        return self.true.mean(dim=0)


def batch_sample(pool: Pool, contributions: Float[Tensor, "M R k"]) -> Sample:
    """The sample of whole batches."""
    return Sample.of(*batch_estimates(pool, contributions), pool.rounds)


def batch_estimates(pool: Pool, contributions: Float[Tensor, "M R k"]) -> tuple[Tensor, Tensor]:
    """(estimates, round of each) of all batches."""
    dealt = [(number, prompts) for number, own in enumerate(pool.batches) for prompts in own]
    estimates = torch.stack([contributions[list(prompts), number].sum(dim=0) for number, prompts in dealt])
    return estimates, torch.tensor([number for number, _ in dealt])


def measured(
    pool: Pool, found: Estimator, part: str, contributions: Tensor, bins: Sequence[Bin], to: Targets
) -> Measured:
    """The figures of an estimator, or of a part of it, from its contributions [M, R, k]."""
    sources = dict.fromkeys(found.sources.values())
    several = len(found.parts) > 1
    overall = batch_sample(pool, contributions)
    # As large as a batch of nothing but such prompts.
    single = contributions * pool.prompts_per_batch
    return Measured(
        f"{found.name}.{part}" if part and several else found.name,
        found.name,
        part if several else "",
        found.sources[part] if part else ", ".join(sources),
        figures(overall, to.pooled),
        None if to.imitation is None else cosine_of(overall, _one_a_round(to.imitation)),
        None if to.held_out is None else cosine_with(overall, to.held_out),
        tuple(at_rates(single, bins, to.true)),
        tuple(at_counts(pool, single, to.pooled)),
    )


def _one_a_round(estimates: Float[Tensor, "R k"]) -> Sample:
    return Sample.of(estimates, torch.arange(len(estimates)), len(estimates))


def conflict(pool: Pool, found: Estimator, gradients: Tensor, bins: Sequence[Bin]) -> Conflict | None:
    """The conflict of an algorithm's two sources; None where it does not have both."""
    sides = []
    for source in ("rollouts", "demonstrations"):
        parts = [name for name, own in found.sources.items() if own == source and found.parts[name].cells]
        if not parts:
            return None
        sides.append(found.contributions(pool, gradients, parts))
    by_rate = {}
    for one in bins:
        mine = [side[list(one.prompts)].flatten(0, 1) for side in sides]
        rounds = torch.arange(pool.rounds).repeat(len(one.prompts))
        if all(bool(side.any()) for side in mine):
            by_rate[one.label] = cosine_of(*(Sample.of(side, rounds, pool.rounds) for side in mine))
    return Conflict(found.name, cosine_of(*(batch_sample(pool, side) for side in sides)), by_rate)


def same(estimates: Mapping[str, Float[Tensor, "b k"]]) -> list[list[str]]:
    """The names in groups of those whose estimates agree on every batch but for one positive factor."""
    units = {name: values.flatten() / values.norm().clamp(min=1e-300) for name, values in estimates.items()}
    groups: list[list[str]] = []
    for name, unit in units.items():
        mine = next((g for g in groups if units[g[0]].shape == unit.shape and float(units[g[0]] @ unit) > _SAME), None)
        if mine is None:
            groups.append([name])
        else:
            mine.append(name)
    return groups


def imitation(pool: Pool, directions: Directions) -> Entries:
    """Entries of the mean log-likelihood of a round's demonstrations, over the prompts that have one."""
    having = [
        (q, r, group.demonstrations)
        for q, groups in enumerate(pool.groups)
        for r, group in enumerate(groups)
        if group.demonstrations
    ]
    entries, prompts = Entries(), Counter(r for _, r, _ in having)
    for q, r, demonstrations in having:
        for one in demonstrations:
            pair = (tuple(one.prompt_ids), tuple(one.response_ids))
            number, factor = directions.find(pair, torch.ones(len(pair[1]), dtype=torch.float64), None)
            entries.cells.append(q * pool.rounds + r)
            entries.gradients.append(number)
            entries.factors.append(factor / (len(demonstrations) * prompts[r]))
    return entries


def thresholds(algorithm: Algorithm, group_size: int) -> dict[float, Algorithm]:
    """The algorithm at every threshold that tells groups of this size apart, where its gates have one: threshold →
    algorithm, all its gates at the same; empty where none has."""
    gates = [term.gate for term in algorithm.terms.values() if hasattr(term.gate, "threshold")]
    if not gates:
        return {}
    found = {}
    for count in range(group_size + 1):
        terms = {}
        for name, term in algorithm.terms.items():
            gate = term.gate
            if hasattr(gate, "threshold"):
                gate = dataclasses.replace(gate, threshold=count / group_size)
            terms[name] = dataclasses.replace(term, gate=gate)
        found[count / group_size] = dataclasses.replace(algorithm, terms=terms)
    return found
