"""Measurements of a step's first update: tokens with the largest weights, and the gradient of each term alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upge.data import Example
from upge.estimate import Estimate
from upge.plan import Plan
from upge.train.engine import Engine
from upge.train.sample import Trajectory

#: (factor, plan) → this rank's partitions of ∇ factor·L. It does not change weights or optimizer; all ranks call it.
Gradient = Callable[[tuple[float, Plan]], list[Tensor]]
#: The number of trajectories to keep for each term, at most one per prompt.
KEPT = 4
#: The number of tokens to keep of a response, around the one with the largest weight.
WINDOW = 512


class Diagnostics(NamedTuple):
    """What is measured in a step's first update in addition to its metrics.

    Attributes:
        top_tokens: the trajectories with the largest weights.
        term_gradients: the gradients of the terms.
        split: whether the gradient depends on the split into micro-batches.
    """

    top_tokens: bool = False
    term_gradients: bool = False
    split: bool = False


NO_DIAGNOSTICS = Diagnostics()


class TokenWeights(NamedTuple):
    """The weights in one term of the n tokens whose scale gate·reduction is not zero.

    Attributes:
        row: the trajectory, as a row of the update's batch.
        position: the token's position in the response.
        weight: the number in front of ∇log π_θ.
        scale: |gate·reduction|.
        gate: the gate times the term's coefficient.
    """

    row: Int[Tensor, "n"]
    position: Int[Tensor, "n"]
    weight: Float[Tensor, "n"]
    scale: Float[Tensor, "n"]
    gate: Float[Tensor, "n"]


class TopTrajectory(NamedTuple):
    """A trajectory that is among those with the largest weights of a term.

    Attributes:
        term: the name of the term.
        trajectory: the trajectory; its `index` identifies it in the step.
        gate: the gate times the term's coefficient, at the token with the largest weight.
        largest: the absolute value of that weight, infinite if a weight is NaN.
        weights: for each response token, the number in front of ∇log π_θ; 0 if the token has no part in the term.
        relative: these weights divided by the tokens' scale |gate·reduction|.
    """

    term: str
    trajectory: Trajectory
    gate: float
    largest: float
    weights: list[float]
    relative: list[float]


def token_weights(estimate: Estimate) -> dict[str, TokenWeights]:
    """For each term, the weights of an estimate's tokens, on the CPU."""
    weights = {}
    for name, factors in estimate.terms.items():
        scale = (factors.gate * factors.reduction).abs()
        columns = (*estimate.batch.places, factors.weights, scale, factors.gate)
        weights[name] = TokenWeights(*(column[scale != 0].detach().cpu() for column in columns))
    return weights


def top_trajectories(
    observed: Iterable[Mapping[str, TokenWeights]], trajectories: Sequence[Trajectory]
) -> list[TopTrajectory]:
    """The `KEPT` trajectories of each term with the largest weights on this rank.

    `observed` are the weights of each of the update's estimates, and `trajectories` those of its batch, by row.
    """
    terms: dict[str, list[TokenWeights]] = {}
    for weights in observed:
        for name, columns in weights.items():
            terms.setdefault(name, []).append(columns)
    return [
        top
        for name, parts in terms.items()
        for top in _top_of_term(name, TokenWeights(*map(torch.cat, zip(*parts, strict=True))), trajectories)
    ]


def _top_of_term(name: str, tokens: TokenWeights, trajectories: Sequence[Trajectory]) -> Iterator[TopTrajectory]:
    magnitude = torch.nan_to_num(tokens.weight.abs(), nan=math.inf)
    largest = torch.zeros(len(trajectories), dtype=magnitude.dtype).scatter_reduce(0, tokens.row, magnitude, "amax")
    candidates = [(float(largest[r]), r, trajectories[r].group) for r in tokens.row.unique().tolist()]
    for _, row, _ in _largest(candidate for candidate in candidates if candidate[0] > 0):
        of_row = tokens.row == row
        weights, relative = (torch.zeros(len(trajectories[row].response_ids), dtype=tokens.weight.dtype) for _ in "wr")
        weights[tokens.position[of_row]] = tokens.weight[of_row]
        relative[tokens.position[of_row]] = (tokens.weight / tokens.scale)[of_row]
        gate = float(tokens.gate[of_row][int(magnitude[of_row].argmax())])
        yield TopTrajectory(name, trajectories[row], gate, float(largest[row]), weights.tolist(), relative.tolist())


def merged(tops: Iterable[TopTrajectory]) -> list[TopTrajectory]:
    """The `KEPT` trajectories of each term with the largest weights on all ranks, the largest first."""
    terms: dict[str, dict[int, TopTrajectory]] = {}
    for top in tops:
        terms.setdefault(top.term, {})[top.trajectory.index] = top
    return [
        by_index[index]
        for _, by_index in sorted(terms.items())
        for _, index, _ in _largest(
            (top.largest, top.trajectory.index, top.trajectory.group) for top in by_index.values()
        )
    ]


def _largest(candidates: Iterable[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """The `KEPT` of (weight, index, group) with the largest weights, at most one of each group.

    The rollouts of a prompt often all have the same weights, so one of them is enough. Weights that differ only by
    rounding count as equal, so that the choice does not depend on the micro-batches.
    """
    by_group: dict[int, tuple[float, int, int]] = {}
    for candidate in sorted(candidates, key=lambda one: (-float(f"{one[0]:.5g}"), one[1])):
        by_group.setdefault(candidate[2], candidate)
    return list(by_group.values())[:KEPT]


def token_line(
    top: TopTrajectory, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """A line of tokens/step_*.jsonl; docs/metrics.md lists its fields.

    `examples` are the training set; `decode` gives token ids as text, special tokens included.
    """
    trajectory, magnitudes = top.trajectory, [_magnitude(w) for w in top.weights]
    problem = examples[trajectory.example].problem
    first = max(0, min(magnitudes.index(max(magnitudes)) - WINDOW // 2, len(magnitudes) - WINDOW))
    window = slice(first, first + WINDOW)
    return {
        "term": top.term,
        "index": trajectory.index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "level": problem.level,
        "reward": trajectory.reward,
        "is_demonstration": trajectory.is_demonstration,
        "gate": _rounded(top.gate),
        "tokens": token_texts(trajectory.response_ids[window], decode),
        "weights": [_rounded(w) for w in top.weights[window]],
        "relative": [_rounded(w) for w in top.relative[window]],
        "first": first,
        "length": len(magnitudes),
    }


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to the tokens before it; joined, they give the whole text.

    If several tokens make one character, the last of them gets the character and the others get the empty string. Some
    tokenizers write a token's space only after another token, so each token is decoded together with the one before.
    """
    texts: list[str] = []
    before, start, decoded = "", 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, decoded = decoded, end
        before = decode(ids[start:decoded])
    return texts


def _magnitude(weight: float) -> float:
    return math.inf if math.isnan(weight) else abs(weight)


def _rounded(value: float) -> float | None:
    """Six digits, about float32's precision; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def term_gradients(plan: Plan, gradient: Gradient, device: torch.device) -> dict[str, list[Tensor] | None]:
    """This rank's part of each term's and regularizer's gradient, by name; None where it is zero everywhere.

    They add up to the gradient of the whole plan. Each costs a forward and a backward pass over the trajectories that
    have a weight in it, and 4 bytes of memory per parameter over all ranks.
    """
    gradients: dict[str, list[Tensor] | None] = {}
    # So that dropout draws the same numbers in the following update as without these passes.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name in plan.names:
            alone = plan.alone(name)
            gradients[name] = gradient((1.0, alone)) if bool(alone.contributing.any()) else None
    return gradients


def term_gradient_metrics(plan: Plan, gradient: Gradient, engine: Engine) -> dict[str, float]:
    """`NAME/grad_norm` of each term and regularizer, and `cosine/A_B` of each pair of gradients that are not zero."""
    gradients = term_gradients(plan, gradient, engine.world.device)
    norms = {name: 0.0 if one is None else math.sqrt(engine.dot(one, one)) for name, one in gradients.items()}
    metrics = {f"{name}/grad_norm": norm for name, norm in norms.items()}
    nonzero = {name: one for name, one in gradients.items() if one is not None and norms[name] != 0}
    for a, b in itertools.combinations(nonzero, 2):
        metrics[f"cosine/{a}_{b}"] = engine.dot(nonzero[a], nonzero[b]) / (norms[a] * norms[b])
    return metrics
