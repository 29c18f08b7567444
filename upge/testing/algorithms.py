"""Conformance of an algorithm: its gradient is the product of its parts, and depends on no split, padding or order."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.components.base import Component
from upge.estimate import Estimate
from upge.testing import batches
from upge.testing.components import check_component
from upge.testing.rules import SINGLE_TOLERANCE, attempt, close, require, require_instance
from upge.testing.supports import check_supports
from upge.trajectories import Trajectories


def check_algorithm(algorithm: Algorithm) -> None:
    """Check that an algorithm obeys the rules of the library.

    - Every part conforms (`check_component`).
    - The factors multiply to the weights. Without regularizers, the weights are minus the gradient of the loss with
      respect to the log-probs. No other column has a gradient, except for entropies that regularizers read.
    - The gradient does not depend on the split into micro-batches, the padding, the order of the trajectories, or
      places outside the response mask. This is also checked where rollouts begin with tokens of a demonstration.
    - Trajectories that the plan drops have no gradient, and dropping them changes no weights of the others.
    - Parts of reach 'batch' give the same values when they are evaluated after the plan, from its contributing rows.
    - Weights, loss and gradient are finite at extremes, in single precision and on degenerate batches.
    - Terms and regularizers that move tokens other than the sampled one: see `upge.testing.supports`.

    Raises:
        ConformanceError: the first broken rule.
        TypeError: `algorithm` is not an `upge.Algorithm`, for example its name.
    """
    require_instance(algorithm, Algorithm, "an algorithm such as algorithms.load(NAME)")
    checked: list[Component] = []
    for part in algorithm.parts.values():
        if part not in checked:
            check_component(part)
            checked.append(part)
    if algorithm.supports:
        check_supports(algorithm)
        sampled = {n: term for n, term in algorithm.terms.items() if f"terms.{n}" not in algorithm.supports}
        if not sampled:
            return
        rest = {n: one for n, one in algorithm.regularizers.items() if f"regularizers.{n}" not in algorithm.supports}
        algorithm = dataclasses.replace(algorithm, terms=sampled, regularizers=rest)
    given = _given(algorithm)
    _check_leaves(algorithm, batches.random_batch(0, **given))
    _check_precision(algorithm)
    _check_on(algorithm, batches.random_batch(0, **given), 0)
    _check_on(algorithm, batches.guided(batches.random_batch(2, **given)), 2)
    _check_runaway(algorithm, batches.extreme_batch(**given, ratio=1000.0))
    _check_degenerate(algorithm)


def _given(algorithm: Algorithm) -> dict[str, Any]:
    """What the batches for an algorithm must have."""
    return {"pairs": algorithm.needs.preference_pairs, "rewards": algorithm.needs.rewards}


def _check_on(algorithm: Algorithm, batch: Trajectories, seed: int) -> None:
    name, whole = _name(algorithm), [torch.arange(len(batch))]
    estimate = algorithm.estimate(batch)
    _check_product(name, estimate, batch)
    gradient = _gradient(algorithm, batch, whole)
    bare = dataclasses.replace(algorithm, regularizers={}) if algorithm.regularizers else algorithm
    plain = _gradient(bare, batch, whole) if bare is not algorithm else gradient
    close(name, "the gradient is not minus the weights", -estimate.weights, plain[0])
    for split in batches.splits(batch, algorithm.reach, seed):
        close(name, "the gradient depends on the micro-batch split", gradient, _gradient(algorithm, batch, split))
    for size in (1, 7) if algorithm.takes_chunks else ():
        by_chunks = _gradient_by_chunks(algorithm, batch, size)
        close(name, "the gradient depends on how the tokens are cut into chunks", gradient, by_chunks)
    wide = _gradient(algorithm, batches.padded(batch), whole)[..., : gradient.shape[2]]
    close(name, "the gradient depends on the padding", gradient, wide)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = _gradient(algorithm, batches.reordered(batch, order), whole)
    close(name, "the gradient depends on the order of the trajectories", gradient[:, order], shuffled)
    holed, problem = batches.punched(batch), "the gradient depends on places outside the response mask"
    for split in (whole, next(batches.splits(batch, algorithm.reach, seed))):
        with_holes = _gradient(algorithm, holed, split)
        close(name, problem, gradient[:, batch.response_mask], with_holes[:, holed.response_mask])
    _check_plan(algorithm, batch, gradient, estimate)
    _check_pending(algorithm, batch, estimate)


def _check_product(name: str, estimate: Estimate, batch: Trajectories) -> None:
    """The product of the factors must be the weights."""
    assert batch.logprobs is not None
    product = torch.zeros_like(estimate.weights)
    for t in estimate.terms.values():
        ratio = torch.exp(batch.logprobs.detach() - t.log_denominator)
        product = product + t.gate * t.reduction * t.mask * t.advantages * t.shape * ratio
    equal = torch.allclose(product, estimate.weights, rtol=1e-9, atol=1e-12)
    require(equal, f"{name}: factors do not multiply to weights")


def _check_plan(algorithm: Algorithm, batch: Trajectories, gradient: Tensor, estimate: Estimate) -> None:
    """Dropped trajectories must have no gradient and no influence on the weights of the others."""
    name, plan = _name(algorithm), algorithm.plan(batch)
    dropped = gradient[:, ~plan.contributing]
    require(bool((dropped == 0).all()), f"{name}: the plan drops trajectories that have a gradient")
    contributing = batches.select_rows(batch, plan.contributing.nonzero()[:, 0])
    expected = estimate.weights[plan.contributing][:, : contributing.response_mask.shape[1]]
    close(
        name, "has other weights without the trajectories that it drops", expected, plan.estimate(contributing).weights
    )


def _check_pending(algorithm: Algorithm, batch: Trajectories, estimate: Estimate) -> None:
    """A plan made before the forward pass must be completed by the log-probs of its contributing trajectories alone."""
    plan = algorithm.plan(dataclasses.replace(batch, logprobs=None, entropies=None))
    seen = plan.contributing[:, None]
    given = {n: torch.where(seen, getattr(batch, n).detach(), 0.0) for n in ("logprobs", "entropies")}
    ready = plan.with_current(dataclasses.replace(batch, **given))
    problem = "has other weights if its parts of reach 'batch' are evaluated after the plan; let them read the "
    problem += "tokens of `response_mask` alone"
    close(_name(algorithm), problem, estimate.weights, ready.estimate(batch).weights)


def _check_leaves(algorithm: Algorithm, batch: Trajectories) -> None:
    """Only the log-probs may have a gradient, and the entropies if a regularizer reads them."""
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in (*batches.NUMBERS, "rewards")}
    algorithm.estimate(dataclasses.replace(batch, **leaves)).loss.backward()
    allowed = {"logprobs"}
    for regularizer in algorithm.regularizers.values():
        allowed |= regularizer.columns & {"entropies"}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None and name not in allowed}
    leaking = [name for name, gradient in gradients.items() if bool((gradient != 0).any())]
    problem = f"a gradient flows into {', '.join(leaking)}, which only log-probs may have; read it with `.detach()`"
    require(not leaking, f"{_name(algorithm)}: {problem}")


def _check_precision(algorithm: Algorithm) -> None:
    """Float32 must be close to float64, results must not be in half precision, and extremes must not overflow."""
    name, given = _name(algorithm), _given(algorithm)
    batch, extreme = batches.random_batch(0, **given), batches.extreme_batch(**given)
    exact = algorithm.estimate(batch).weights
    require(exact.dtype == torch.float64, f"{name}: weights of float64 columns are {exact.dtype}")
    single = algorithm.estimate(batches.in_precision(batch, torch.float32)).weights
    scale = exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)
    close(name, "loses precision on float32 columns", exact / scale, single.double() / scale, SINGLE_TOLERANCE)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        converted, kind = batches.in_precision(extreme, dtype), str(dtype).removeprefix("torch.")
        estimate = algorithm.estimate(converted)
        good = (torch.float32, torch.float64)
        require(estimate.weights.dtype in good, f"{name}: weights of {kind} columns are {estimate.weights.dtype}")
        finite = bool(estimate.weights.isfinite().all()) and bool(estimate.loss.detach().isfinite())
        described = f"log-probs of -40 and 0, ratios of e^±30, sampler ratios of e^±20, {kind}"
        require(finite, f"{name}: weights or loss are NaN or infinite at extremes ({described})")
        gradient = _gradient(algorithm, converted, [torch.arange(len(converted))])
        require(bool(gradient.isfinite().all()), f"{name}: the gradient is NaN or infinite at extremes ({described})")


def _check_runaway(algorithm: Algorithm, batch: Trajectories) -> None:
    """Where mask, advantage, gate or reduction is 0, the weight must be 0 even if the ratio overflows."""
    for term, t in algorithm.estimate(batch).terms.items():
        problem = f"{_name(algorithm)}: term '{term}' %s where the ratio overflows"
        closed = (t.gate == 0) | (t.reduction == 0) | (t.mask * t.advantages == 0)
        require(bool((t.weights[closed] == 0).all()), problem % "has a weight other than 0 under a mask of 0")
        require(not bool(t.weights.isnan().any()), problem % "has a weight of NaN")


def _check_degenerate(algorithm: Algorithm) -> None:
    """The loss and its gradient must be finite on degenerate batches."""
    name = _name(algorithm)
    for description, batch, has_rollouts in batches.degenerate_batches(algorithm.needs.rewards):
        if has_rollouts or algorithm.needs.group_size == 1:
            rows = [torch.arange(len(batch))]
            gradient = attempt(f"{name} fails on {description}", _gradient, algorithm, batch, rows)
            loss = algorithm.estimate(batch).loss.detach()
            fine = bool(gradient.isfinite().all()) and bool(loss.isfinite())
            require(fine, f"{name}: the loss or its gradient is NaN or infinite on {description}")


def _leaves(batch: Trajectories) -> list[Tensor]:
    """Copies of log-probs and entropies that require a gradient."""
    assert batch.logprobs is not None and batch.entropies is not None
    return [c.detach().clone().requires_grad_() for c in (batch.logprobs, batch.entropies)]


def _gradient(algorithm: Algorithm, batch: Trajectories, split: list[Tensor]) -> Tensor:
    """[2, B, T] ∂loss/∂logprobs and ∂loss/∂entropies, summed over the separately evaluated micro-batches of a split."""
    leaves = _leaves(batch)
    plan = algorithm.plan(batch)
    for rows in split:
        part = batch.select(rows, leaves[0][rows], entropies=leaves[1][rows])
        plan.estimate(part).loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _gradient_by_chunks(algorithm: Algorithm, batch: Trajectories, size: int) -> Tensor:
    """The same, evaluated on chunks of `size` packed tokens as in the head."""
    leaves = _leaves(batch)
    plan, tokens, mask = algorithm.plan(batch), batch.pack(), batch.response_mask
    for start in range(0, len(tokens), size):
        chunk = slice(start, start + size)
        plan.estimate(tokens.chunk(chunk, *(leaf[mask][chunk] for leaf in leaves))).loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _name(algorithm: Algorithm) -> str:
    return f"algorithm '{algorithm.name}'"
