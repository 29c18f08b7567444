"""Does an algorithm obey the law: no dependence on split, padding or order, and no gradient but the product's?"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.components.base import Component
from upge.estimate import Estimate
from upge.testing.batches import (
    NUMBERS,
    degenerate_batches,
    extreme_batch,
    in_precision,
    padded,
    piece,
    punched,
    random_batch,
    reordered,
    splits,
)
from upge.testing.components import check_component
from upge.testing.rules import attempt, close, require, require_instance
from upge.trajectories import Trajectories

#: Float32 rounds at 6e-8; a product of several factors of sums of log-probs is further off, but not by this much.
_SINGLE = 1e-3


def check_algorithm(algorithm: Algorithm) -> None:
    """Every part conforms; the factors multiply to the weights, and these are minus the gradient but for that of the
    regularizers; no other column has one. The gradient is the same for any split into micro-batches, any padding, any
    order and any place that does not count; trajectories that the plan drops have none, and those it keeps the same
    weights without them. Finite at extremes, in single precision and where there is nothing to compare.

    Raises:
        ConformanceError: the first rule broken.
        TypeError: `algorithm` is no `upge.Algorithm`, for example its name.
    """
    require_instance(algorithm, Algorithm, "an algorithm such as algorithms.load(NAME)")
    checked: list[Component] = []
    for part in algorithm.parts.values():
        if part not in checked:
            check_component(part)
            checked.append(part)
    pairs = algorithm.needs.preference_pairs
    _check_leaves(algorithm, random_batch(0, pairs=pairs))
    _check_precision(algorithm, pairs)
    for seed in range(2):
        _check_on(algorithm, random_batch(seed, pairs=pairs), seed)
    _check_runaway(algorithm, extreme_batch(pairs, ratio=1000.0))
    _check_degenerate(algorithm)


def _check_on(algorithm: Algorithm, batch: Trajectories, seed: int) -> None:
    """What holds on any well-formed batch."""
    name, everything = _name(algorithm), [torch.arange(len(batch))]
    estimate = algorithm.estimate(batch)
    _check_product(name, estimate, batch)
    gradient = _gradient(algorithm, batch, everything)
    bare = dataclasses.replace(algorithm, regularizers={}) if algorithm.regularizers else algorithm
    plain = _gradient(bare, batch, everything) if bare is not algorithm else gradient
    close(name, "the gradient is not minus the weights", -estimate.weights, plain[0])
    for pieces in splits(batch, algorithm.reach, seed):
        close(name, "the gradient depends on the micro-batch split", gradient, _gradient(algorithm, batch, pieces))
    for size in (1, 7) if algorithm.takes_chunks else ():
        found = _gradient_by_chunks(algorithm, batch, size)
        close(name, "the gradient depends on how the tokens are cut into chunks", gradient, found)
    wide = _gradient(algorithm, padded(batch), everything)[..., : gradient.shape[2]]
    close(name, "the gradient depends on the padding", gradient, wide)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = _gradient(algorithm, reordered(batch, order), everything)
    close(name, "the gradient depends on the order of the trajectories", gradient[:, order], shuffled)
    holed, problem = punched(batch), "the gradient depends on places outside the response mask"
    for pieces in (everything, next(splits(batch, algorithm.reach, seed))):
        found = _gradient(algorithm, holed, pieces)
        close(name, problem, gradient[:, batch.response_mask], found[:, holed.response_mask])
    _check_plan(algorithm, batch, gradient, estimate)


def _check_product(name: str, estimate: Estimate, batch: Trajectories) -> None:
    product = torch.zeros_like(estimate.weights)
    for t in estimate.terms.values():
        ratio = torch.exp(batch.logprobs.detach() - t.log_denominator)
        product = product + t.gate * t.reduction * t.mask * t.advantages * t.shape * ratio
    equal = torch.allclose(product, estimate.weights, rtol=1e-9, atol=1e-12)
    require(equal, f"{name}: factors do not multiply to weights")


def _check_plan(algorithm: Algorithm, batch: Trajectories, gradient: Tensor, estimate: Estimate) -> None:
    """What the plan drops has no part in anything."""
    name, plan = _name(algorithm), algorithm.plan(batch)
    dropped = gradient[:, ~plan.contributing]
    require(bool((dropped == 0).all()), f"{name}: the plan drops trajectories that have a gradient")
    kept = piece(batch, plan.contributing.nonzero()[:, 0])
    expected = estimate.weights[plan.contributing][:, : kept.response_mask.shape[1]]
    close(name, "has other weights without the trajectories that it drops", expected, plan.estimate(kept).weights)


def _check_leaves(algorithm: Algorithm, batch: Trajectories) -> None:
    """Of all columns the log-probs alone have a gradient, and the entropies where a regularizer reads them."""
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in (*NUMBERS, "rewards")}
    algorithm.estimate(dataclasses.replace(batch, **leaves)).loss.backward()
    allowed = {"logprobs"}
    for regularizer in algorithm.regularizers.values():
        allowed |= regularizer.columns & {"entropies"}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None and name not in allowed}
    leaking = [name for name, gradient in gradients.items() if bool((gradient != 0).any())]
    problem = f"a gradient flows into {', '.join(leaking)}, which only log-probs may have; read it with `.detach()`"
    require(not leaking, f"{_name(algorithm)}: {problem}")


def _check_precision(algorithm: Algorithm, pairs: bool) -> None:
    """Single precision is close to double, half precision is not kept, and nothing overflows at extremes."""
    name, batch, extreme = _name(algorithm), random_batch(0, pairs=pairs), extreme_batch(pairs)
    exact = algorithm.estimate(batch).weights
    require(exact.dtype == torch.float64, f"{name}: weights of float64 columns are {exact.dtype}")
    single = algorithm.estimate(in_precision(batch, torch.float32)).weights
    scale = exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)
    close(name, "loses precision on float32 columns", exact / scale, single.double() / scale, _SINGLE)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given, kind = in_precision(extreme, dtype), str(dtype).removeprefix("torch.")
        estimate = algorithm.estimate(given)
        good = (torch.float32, torch.float64)
        require(estimate.weights.dtype in good, f"{name}: weights of {kind} columns are {estimate.weights.dtype}")
        finite = bool(estimate.weights.isfinite().all()) and bool(estimate.loss.detach().isfinite())
        described = f"log-probs of -40 and 0, ratios of e^±30, sampler ratios of e^±20, {kind}"
        require(finite, f"{name}: weights or loss are NaN or infinite at extremes ({described})")
        gradient = _gradient(algorithm, given, [torch.arange(len(given))])
        require(bool(gradient.isfinite().all()), f"{name}: the gradient is NaN or infinite at extremes ({described})")


def _check_runaway(algorithm: Algorithm, batch: Trajectories) -> None:
    """A ratio may overflow; where mask, advantage, gate or reduction is 0 the weight is 0 all the same."""
    for term, t in algorithm.estimate(batch).terms.items():
        problem = f"{_name(algorithm)}: term '{term}' %s where the ratio overflows"
        closed = (t.gate == 0) | (t.reduction == 0) | (t.mask * t.advantages == 0)
        require(bool((t.weights[closed] == 0).all()), problem % "has a weight other than 0 under a mask of 0")
        require(not bool(t.weights.isnan().any()), problem % "has a weight of NaN")


def _check_degenerate(algorithm: Algorithm) -> None:
    """Where there is nothing to compare there is a finite loss all the same."""
    name = _name(algorithm)
    for description, batch, has_rollouts in degenerate_batches():
        if has_rollouts or algorithm.needs.group_size == 1:
            rows = [torch.arange(len(batch))]
            gradient = attempt(f"{name} fails on {description}", _gradient, algorithm, batch, rows)
            loss = algorithm.estimate(batch).loss.detach()
            fine = bool(gradient.isfinite().all()) and bool(loss.isfinite())
            require(fine, f"{name}: the loss or its gradient is NaN or infinite on {description}")


def _gradient(algorithm: Algorithm, batch: Trajectories, pieces: list[Tensor]) -> Tensor:
    """d loss / d logprobs (and entropies) summed over pieces, each evaluated on its own; [2, B, T]."""
    leaves = [c.detach().clone().requires_grad_() for c in (batch.logprobs, batch.entropies)]
    plan = algorithm.plan(batch)
    for rows in pieces:
        width = batch.select(rows).response_mask.shape[1]
        part = batch.select(rows, leaves[0][rows, :width], entropies=leaves[1][rows, :width])
        plan.estimate(part).loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _gradient_by_chunks(algorithm: Algorithm, batch: Trajectories, size: int) -> Tensor:
    """The same as the head asks for it: runs of `size` tokens, packed."""
    leaves = [c.detach().clone().requires_grad_() for c in (batch.logprobs, batch.entropies)]
    plan, tokens, mask = algorithm.plan(batch), batch.pack(), batch.response_mask
    for start in range(0, len(tokens), size):
        chunk = slice(start, start + size)
        plan.estimate(tokens.chunk(chunk, *(leaf[mask][chunk] for leaf in leaves))).loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _name(algorithm: Algorithm) -> str:
    return f"algorithm '{algorithm.name}'"
