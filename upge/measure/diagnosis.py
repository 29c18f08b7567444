"""The measurements of algorithms on one pool: of each as a whole, of each part, and of one relative to another.

`exact` gives the exact mean and power of an estimator on a policy so small that every batch can be enumerated.
Measurements on a sample of these batches must agree with it within their intervals.

Legend: M, R and H as in `upge.measure.pool`; b batches of B trajectories with T tokens; k numbers of a gradient's
sketch; D = P·V numbers of a gradient with respect to a table of P prefixes and V tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.measure.by_rate import AtCount, AtRate, Bin, at_counts, at_rates
from upge.measure.contributions import Directions, Entries, Estimator, slopes
from upge.measure.metrics import Estimated, Metrics, Sample, cosine_of, cosine_with, metrics
from upge.measure.pool import Pool
from upge.measure.scores import Request
from upge.theory.draws import Evaluator, Row, Setting, all_groups, check

#: Two estimators whose estimates have at least this cosine are the same up to scale.
_SAME = 1 - 1e-6


@dataclass(frozen=True)
class Measured:
    """The measurements of an algorithm, or of one part of it.

    Attributes:
        name: ALGORITHM, or ALGORITHM.PART for a part of an algorithm with several.
        part: the part's name; '' for the whole algorithm.
        source: the trajectories that it learns from; the sources of all parts, separated by commas, for a whole
            algorithm.
        overall: the metrics of a whole batch.
        imitation: cosine with the gradient of the demonstrations' log-likelihood; None without demonstrations.
        held_out: cosine with the true gradient on other prompts; None without such prompts.
        by_rate: for each bin of pass rates in which it has a non-zero weight.
        by_count: for each number of successes at which it has a non-zero weight.
    """

    name: str
    algorithm: str
    part: str
    source: str
    overall: Metrics
    imitation: Estimated | None
    held_out: Estimated | None
    by_rate: tuple[AtRate, ...]
    by_count: tuple[AtCount, ...]


@dataclass(frozen=True)
class Conflict:
    """The cosine between the mean gradients of an algorithm's parts on rollouts and on demonstrations.

    Attributes:
        by_rate: label of a bin of pass rates → the cosine on its prompts.
    """

    algorithm: str
    overall: Estimated
    by_rate: Mapping[str, Estimated]


@dataclass(frozen=True)
class Targets:
    """The gradients that estimators are compared with.

    Attributes:
        true: [M, H, k] independent estimates of each prompt's ∇E[R].
        imitation: [R, k] the gradient of the mean log-likelihood of each round's demonstrations; None without any.
        held_out: [H, k] independent estimates of ∇E[R] on other prompts; None without any.
    """

    true: Float[Tensor, "M H k"]
    imitation: Float[Tensor, "R k"] | None = None
    held_out: Float[Tensor, "H k"] | None = None

    @property
    def pooled(self) -> Float[Tensor, "H k"]:
        """[H, k] the estimates of ∇E[R], averaged over prompts."""
        return self.true.mean(dim=0)


def batch_sample(pool: Pool, contributions: Float[Tensor, "M R k"]) -> Sample:
    """The sample whose estimates are those of whole batches."""
    return Sample.of(*batch_estimates(pool, contributions), pool.rounds)


def batch_estimates(pool: Pool, contributions: Float[Tensor, "M R k"]) -> tuple[Tensor, Tensor]:
    """(estimates [b, k], their rounds [b]) of all batches."""
    dealt = [(number, prompts) for number, own in enumerate(pool.batches) for prompts in own]
    estimates = torch.stack([contributions[list(prompts), number].sum(dim=0) for number, prompts in dealt])
    return estimates, torch.tensor([number for number, _ in dealt])


def measured(
    pool: Pool, estimator: Estimator, part: str, contributions: Float[Tensor, "M R k"], bins: Sequence[Bin], to: Targets
) -> Measured:
    """Measure an estimator, or one part of it ('' = the whole), by the contributions of what is measured."""
    sources = dict.fromkeys(estimator.sources.values())
    several = len(estimator.parts) > 1
    overall, rounds = batch_sample(pool, contributions), torch.arange(pool.rounds)
    # Scaled to the size of a batch that consists of such prompts only.
    single = contributions * pool.prompts_per_batch
    return Measured(
        f"{estimator.name}.{part}" if part and several else estimator.name,
        estimator.name,
        part if several else "",
        estimator.sources[part] if part else ", ".join(sources),
        metrics(overall, to.pooled),
        None if to.imitation is None else cosine_of(overall, Sample.of(to.imitation, rounds, pool.rounds)),
        None if to.held_out is None else cosine_with(overall, to.held_out),
        tuple(at_rates(single, bins, to.true)),
        tuple(at_counts(pool, single, to.pooled)),
    )


def conflict(pool: Pool, estimator: Estimator, gradients: Float[Tensor, "g k"], bins: Sequence[Bin]) -> Conflict | None:
    """The conflict between an algorithm's two sources; None if it does not learn from both."""
    sides = []
    for source in ("rollouts", "demonstrations"):
        parts = [name for name, own in estimator.sources.items() if own == source and estimator.parts[name].cells]
        if not parts:
            return None
        sides.append(estimator.contributions(pool, gradients, parts))
    by_rate = {}
    for one in bins:
        mine = [side[list(one.prompts)].flatten(0, 1) for side in sides]
        rounds = torch.arange(pool.rounds).repeat(len(one.prompts))
        if all(bool(side.any()) for side in mine):
            by_rate[one.label] = cosine_of(*(Sample.of(side, rounds, pool.rounds) for side in mine))
    return Conflict(estimator.name, cosine_of(*(batch_sample(pool, side) for side in sides)), by_rate)


def same(estimates: Mapping[str, Float[Tensor, "b k"]]) -> list[list[str]]:
    """The names, grouped so that the estimates [b, k] within a group agree on every batch up to one positive factor."""
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
    """The entries of the mean log-likelihood of each round's demonstrations, over the prompts that have some."""
    demonstrated = [
        (q, r, group.demonstrations)
        for q, groups in enumerate(pool.groups)
        for r, group in enumerate(groups)
        if group.demonstrations
    ]
    entries, prompts = Entries(), Counter(r for _, r, _ in demonstrated)
    for q, r, demonstrations in demonstrated:
        for one in demonstrations:
            pair = (tuple(one.prompt_ids), tuple(one.response_ids))
            number, factor = directions.find(Request(pair, torch.ones(len(pair[1]), dtype=torch.float64)))
            entries.cells.append(q * pool.rounds + r)
            entries.gradients.append(number)
            entries.factors.append(factor / (len(demonstrations) * prompts[r]))
    return entries


def thresholds(algorithm: Algorithm, group_size: int) -> dict[float, Algorithm]:
    """The algorithm at every gate threshold that separates groups of this size.

    Returns:
        threshold → the algorithm with all its gates that have a threshold set to it; empty if no gate has one.
    """
    gates = [term.gate for term in algorithm.terms.values() if hasattr(term.gate, "threshold")]
    if not gates:
        return {}
    algorithms: dict[float, Algorithm] = {}
    for count in range(group_size + 1):
        terms = {}
        for name, term in algorithm.terms.items():
            gate: Any = term.gate  # gates are dataclasses, but their base class is not
            if hasattr(gate, "threshold"):
                gate = dataclasses.replace(gate, threshold=count / group_size)
            terms[name] = dataclasses.replace(term, gate=gate)
        algorithms[count / group_size] = dataclasses.replace(algorithm, terms=terms)
    return algorithms


@dataclass(frozen=True)
class Exact:
    """The exact mean E g and power E‖g‖² of the estimate g of an algorithm, or of a part of it."""

    mean: Float[Tensor, "D"]
    power: float


def exact(algorithm: Algorithm, setting: Setting, *, group_size: int = 3, demonstrations: int = 1) -> dict[str, Exact]:
    """Mean and power of the estimate on a batch of one prompt, over every such batch, weighted by its probability.

    Args:
        group_size, demonstrations: trajectories of each kind per batch, drawn independently.

    Returns:
        '' → of the whole algorithm, and name of a part → of that part.

    Raises:
        ConfigError: the setting lacks something that the algorithm reads or learns from.
    """
    check(algorithm, setting, group_size, demonstrations)
    groups, _ = all_groups(algorithm, setting, group_size, demonstrations)
    evaluator = Evaluator(algorithm, setting)
    means: dict[str, Tensor] = {}
    powers: dict[str, float] = {}
    for rows, probability in groups:
        parts = estimates(evaluator, rows)
        whole = sum(parts.values(), torch.zeros(()))
        for name, estimate in ({"": whole} | parts).items():
            means[name] = means.get(name, torch.zeros_like(estimate)) + probability * estimate
            powers[name] = powers.get(name, 0.0) + probability * float(estimate.square().sum())
    return {name: Exact(mean, powers[name]) for name, mean in means.items()}


def estimates(evaluator: Evaluator, rows: tuple[Row, ...]) -> dict[str, Float[Tensor, "D"]]:
    """Each part's estimate on the batch of one group, as a gradient with respect to the policy's table."""
    batch = evaluator.batch([rows])
    batch = dataclasses.replace(batch, state=evaluator.algorithm.initial_state())
    number = torch.tensor([row[0] for row in rows])
    gradients: dict[str, Tensor] = {}
    for name, slope in slopes(evaluator.algorithm, batch).items():
        gradient = torch.einsum("bt,btpv->pv", slope.by_logprobs, evaluator.scores[number])
        if slope.by_entropies is not None:
            gradient = gradient + torch.einsum("bt,btpv->pv", slope.by_entropies, evaluator.entropy_scores[number])
        if slope.by_vocabulary is not None:
            gradient = gradient + evaluator.through_vocabulary(slope.by_vocabulary, number).sum(dim=0)
        gradients[name] = gradient.flatten()
    return gradients
