"""Measures one policy: samples its pool and takes gradients, or sums exactly over all batches."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from experiments.diagnose.sampling import Policy, Problems, Sampled, load_model, sample
from experiments.diagnose.settings import Chosen
from experiments.theory import setting
from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.measure import (
    Directions,
    Estimated,
    Estimator,
    Measured,
    Metrics,
    ModelScores,
    Pool,
    Sketch,
    Targets,
    batch_estimates,
    batch_sample,
    bins_of,
    conflict,
    cosine_of,
    estimator,
    exact_metrics,
    gradients,
    imitation,
    measured,
    metrics,
    same,
    true_gradient,
)
from upge.measure.by_rate import Bin
from upge.measure.contributions import sources
from upge.measure.diagnosis import Conflict, exact, thresholds
from upge.measure.scores import Pair
from upge.train.config import ModelConfig
from upge.train.deepspeed_module import check_tokens

#: Share of the free memory that the stored gradients may take.
_MEMORY = 0.6
#: Size of the projections that are compared to find equal estimators.
_TO_COMPARE = 512


@dataclass(frozen=True)
class AtThreshold:
    """The results of an algorithm with the thresholds of its gates set to one pass rate."""

    threshold: float
    overall: Metrics


@dataclass(frozen=True)
class Result:
    """The results for one policy.

    Attributes:
        details: sizes, errors, seconds and memory, by name.
        bins: the prompts by pass rate.
        conflicts: conflicts of the algorithms with two sources.
        thresholds: algorithm → its results at every threshold, if it has a threshold.
        cosines: (first algorithm, second algorithm) → cosine of their means.
        same: groups of names of `measured` that are the same estimator on this pool up to scale.
    """

    label: str
    step: int | None
    details: Mapping[str, float]
    bins: tuple[Bin, ...]
    measured: tuple[Measured, ...]
    conflicts: tuple[Conflict, ...]
    thresholds: Mapping[str, tuple[AtThreshold, ...]]
    cosines: Mapping[tuple[str, str], Estimated]
    same: tuple[tuple[str, ...], ...]

    def same_as(self, name: str) -> tuple[str, ...]:
        """The estimators that are equal to this one up to scale, including itself."""
        return next((group for group in self.same if name in group), (name,))

    def different(self, parts: bool) -> list[Measured]:
        """The algorithms, of equal ones only the first; with `parts`, the parts of those that have several."""
        several = {one.algorithm for one in self.measured if one.part} if parts else set()
        candidates = [one for one in self.measured if (parts if one.part else one.name not in several)]
        # A whole algorithm comes before equal parts of others.
        candidates.sort(key=lambda one: bool(one.part))
        seen: set[str] = set()
        estimators = []
        for one in candidates:
            if one.name not in seen:
                estimators.append(one)
                seen.update(self.same_as(one.name))
        return estimators


def measure(
    chosen: Chosen,
    prompts: Problems,
    policy: Policy,
    others: Mapping[str, ModelConfig],
    say: Callable[[str], None],
) -> Result:
    """Sample and measure one policy; `say` prints a line of progress.

    Args:
        others: 'reference' → the model of the reference log-probs, 'behavior' → the model that the batches are sampled
            from, 'teacher' → the teacher. The first two are the policy itself if they are missing.
    """
    began = time.perf_counter()
    sampled = sample(chosen, prompts, policy.model, others.get("behavior"), say)
    pool, config, temperature = sampled.pool, chosen.config, chosen.run.rollout.temperature
    sampling_took = time.perf_counter() - began
    pairs = pool.pairs()
    scores = ModelScores(load_model(policy.model), config.sketch, temperature, seed=chosen.run.seed)
    known: dict[str, list[Tensor]] = {}
    terms_on_vocabulary = sum(len(one.supports) for one in chosen.algorithms.values())
    if terms_on_vocabulary:
        _check_distributions(pairs, scores, len(others) + 1, terms_on_vocabulary)
        known["distribution/policy"] = known["distribution/reference"] = scores.distributions(pairs)
    for name, model in others.items():
        other = ModelScores(load_model(model), 1, temperature)
        check_tokens(pairs, other.vocabulary, "behavior" if name == "behavior" else f"{name}.path")
        known[f"{name}_logprobs"] = [logprobs for logprobs, _ in other.columns(pairs)]
        if terms_on_vocabulary and name != "behavior":
            known[f"distribution/{name}"] = other.distributions(pairs, scores.vocabulary)
    if any("score_norms" in one.step_needs.columns for one in chosen.algorithms.values()):
        known["score_norms"] = scores.score_norms(pairs)
    columns = {}
    for number, (pair, (logprobs, entropies)) in enumerate(zip(pairs, scores.columns(pairs), strict=True)):
        columns[pair] = {"logprobs": logprobs, "entropies": entropies, "reference_logprobs": logprobs}
        columns[pair] |= {name: values[number] for name, values in known.items()}
    directions = Directions()
    estimators = [estimator(one, pool, columns, directions, config.step) for one in chosen.algorithms.values()]
    varied = {
        name: {share: estimator(at, pool, columns, directions, config.step) for share, at in variants.items()}
        for name, one in chosen.algorithms.items()
        if (variants := thresholds(one, config.group_size))
    }
    rows, to = _gradients(config.sketch, sampled, scores, directions)
    results = _results(pool, estimators, varied, rows, to)
    seconds = {"seconds": time.perf_counter() - began, "seconds_sampling": sampling_took}
    details = _details(pool, scores, len(directions.requests)) | seconds
    details["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Result(label=policy.label, step=policy.step, details=details, **results)


def _gradients(
    sketch: int, sampled: Sampled, scores: ModelScores, directions: Directions
) -> tuple[Float[Tensor, "g k"], Targets]:
    """The gradients of the requests in `directions`, to which this adds imitation, and what they are compared with."""
    pool = sampled.pool
    shown = imitation(pool, directions)
    _check_memory(sketch, len(directions.requests), pool, scores)
    with _bar(len(directions.requests), "gradients") as bar:
        rows = gradients(scores, directions.requests, bar.update)
    with _bar(None, "true gradient") as bar:
        true = true_gradient(scores, pool.reference, bar.update)
        held_out = true_gradient(scores, sampled.held_out, bar.update).mean(dim=0) if sampled.held_out else None
    demonstrated = shown.dense((pool.prompts, pool.rounds), rows).sum(dim=0) if shown.cells else None
    return rows, Targets(true, demonstrated, held_out)


def _details(pool: Pool, scores: ModelScores, gradients: int) -> dict[str, float]:
    return {
        "prompts": pool.prompts,
        "rounds": pool.rounds,
        "batches": sum(map(len, pool.batches)),
        "prompts_per_batch": pool.prompts_per_batch,
        "group_size": pool.group_size,
        "pass_rate": float(pool.pass_rates.mean()),
        "gradients": gradients,
        "parameters": sum(p.numel() for p in scores.parameters),
        "sketch": 0 if scores.sketch.is_whole else scores.width,
        "sketch_error": scores.sketch.relative_error,
    }


def _results(
    pool: Pool,
    estimators: Sequence[Estimator],
    varied: Mapping[str, Mapping[float, Estimator]],
    rows: Float[Tensor, "g k"],
    to: Targets,
) -> dict[str, Any]:
    """What a `Result` says about algorithms, from the gradients that the estimators combine."""
    bins = bins_of(pool.pass_rates)
    # Short projections suffice to compare estimates; whole estimates would take more memory than the gradients.
    short = Sketch((rows.shape[1],), min(rows.shape[1], _TO_COMPARE))
    lines: list[Measured] = []
    samples, estimates = {}, {}
    for one in estimators:
        parts = [part for part, entries in one.parts.items() if entries.cells] if len(one.parts) > 1 else []
        for part in ("", *parts):
            mine = one.contributions(pool, rows, [part] if part else None)
            lines.append(measured(pool, one, part, mine, bins, to))
            estimates[lines[-1].name] = short([batch_estimates(pool, mine)[0]])
            if not part:
                samples[one.name] = batch_sample(pool, mine)
    conflicts = (conflict(pool, one, rows, bins) for one in estimators)

    def at_threshold(share: float, one: Estimator) -> AtThreshold:
        return AtThreshold(share, metrics(batch_sample(pool, one.contributions(pool, rows)), to.pooled))

    return {
        "bins": tuple(bins),
        "measured": tuple(lines),
        "conflicts": tuple(c for c in conflicts if c is not None),
        "thresholds": {name: tuple(itertools.starmap(at_threshold, one.items())) for name, one in varied.items()},
        "cosines": {(a, b): cosine_of(samples[a], samples[b]) for a, b in itertools.combinations(samples, 2)},
        "same": tuple(map(tuple, same(estimates))),
    }


def _check_distributions(pairs: Sequence[Pair], scores: ModelScores, models: int, terms: int) -> None:
    """Raise ConfigError if the distributions of the models at the pool's tokens do not fit into memory."""
    # `Directions` keeps each response's direction twice in float64, for each term on the vocabulary.
    size = (4 * models + 16 * terms) * sum(len(response) for _, response in pairs) * scores.vocabulary
    free = psutil.virtual_memory().available
    if size > _MEMORY * free:
        raise ConfigError(
            f"algos: terms on the vocabulary need {size / 2**30:.1f} GiB for the distributions at all tokens, more "
            f"than {_MEMORY:.0%} of the {free / 2**30:.1f} GiB of free memory; give fewer prompts or batches, or "
            "shorter responses"
        )


def _check_memory(sketch: int, count: int, pool: Pool, scores: ModelScores) -> None:
    """Raise ConfigError if the gradients do not fit into memory."""
    parts = len(pool.reference[0])
    numbers = (count + pool.prompts * (pool.rounds * 3 + parts)) * scores.width
    free = psutil.virtual_memory().available
    if 4 * numbers > _MEMORY * free:
        raise ConfigError(
            f"sketch: {sketch} keeps {4 * numbers / 2**30:.1f} GiB of gradients, more than {_MEMORY:.0%} of the "
            f"{free / 2**30:.1f} GiB of free memory; give sketch=8192 or less, or fewer prompts or batches"
        )


def _bar(total: int | None, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="", mininterval=1.0, leave=False, dynamic_ncols=True)


#: The number of multisets to enumerate grows too fast beyond this.
MOST_ROLLOUTS = 8


def exactly(chosen: Mapping[str, Algorithm], group_size: int) -> Result:
    """Exact results on the setting of docs/theory.md with one prompt per batch and a separate reference policy.

    Raises:
        ConfigError: too many rollouts to enumerate.
    """
    if group_size > MOST_ROLLOUTS:
        raise ConfigError(f"group_size: {group_size} with exact=true; give at most {MOST_ROLLOUTS}, 3 is a good choice")
    made = setting()
    true, shown = made.objectives["reward"].flatten(), made.objectives["imitation"].flatten()
    lines, wholes, conflicts, alike = [], {}, [], {}
    for name, algorithm in chosen.items():
        moments, known = exact(algorithm, made, group_size=group_size), sources(algorithm)
        wholes[name] = moments[""].mean
        noise = math.sqrt(max(moments[""].power - float(moments[""].mean.square().sum()), 0.0))  # keeps NaN
        # The same estimator up to scale has the same direction and the same relative noise.
        alike[name] = torch.cat([moments[""].mean, torch.tensor([noise], dtype=torch.float64)])[None]
        for part, one in moments.items():
            if part and (len(known) == 1 or not bool(one.mean.any())):
                continue
            source = known[part] if part else ", ".join(dict.fromkeys(known.values()))
            overall, full = exact_metrics(one.mean, one.power, true), f"{name}.{part}" if part else name
            lines.append(Measured(full, name, part, source, overall, _cosine(one.mean, shown), None, (), ()))
        sides = [
            sum((moments[p].mean for p in known if known[p] == source), torch.zeros_like(true))
            for source in ("rollouts", "demonstrations")
        ]
        if all(bool(side.any()) for side in sides):
            conflicts.append(Conflict(name, _cosine(*sides), {}))
    cosines = {(a, b): _cosine(wholes[a], wholes[b]) for a, b in itertools.combinations(wholes, 2)}
    details = {"prompts": 1, "group_size": group_size, "parameters": len(true), "sketch": 0, "sketch_error": 0.0}
    groups = tuple(map(tuple, same(alike)))
    return Result("seven responses", None, details, (), tuple(lines), tuple(conflicts), {}, cosines, groups)


def _cosine(a: Tensor, b: Tensor) -> Estimated:
    return Estimated.exactly(float(a @ b / (a.norm() * b.norm())))


def known_or(value: float, other: float) -> float:
    """The value, or `other` if it is NaN."""
    return other if math.isnan(value) else value
