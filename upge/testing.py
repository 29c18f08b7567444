"""The conformance suite: does a part, or an algorithm, obey the rules that the rest of the code relies on?

For users' own parts: `upge.testing.check_component(MyAdvantage())` in a test raises `ConformanceError` with one
sentence that says which rule is broken and how to mend it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.components.base import Component, Precomputed, StabilizationMask
from upge.gates import Gate
from upge.needs import needs_of
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer, Source
from upge.trajectories import LIVE_COLUMNS, TOKEN_COLUMNS, TRAJECTORY_COLUMNS, Trajectories, UndeclaredColumn
from upge.value import ValueLoss

_TOLERANCE = 1e-10


class ConformanceError(AssertionError):
    """A part or an algorithm breaks a rule; the message says which and how to mend it."""


def random_batch(
    seed: int = 0, groups: int = 4, group_size: int = 4, length: int = 7, pairs: bool = True
) -> Trajectories:
    """Rollouts and one demonstration per group, every column filled, off-policy, in float64: a hard case for any part.

    The first group fails altogether and the second succeeds altogether; one response is empty. Within each group one
    rollout is chosen and one rejected (`pairs`).
    """
    g = torch.Generator().manual_seed(seed)
    size = group_size + 1
    b = groups * size
    lengths = torch.randint(1, length + 1, (b,), generator=g)
    lengths[torch.randint(0, b, (1,), generator=g)] = length
    lengths[3] = 0
    noise = lambda scale=1.0: torch.randn(b, length, dtype=torch.float64, generator=g) * scale  # noqa: E731
    logprobs = -noise().abs() - 0.05
    rewards = torch.randint(0, 2, (b,), generator=g).double()
    rewards[:size], rewards[size : 2 * size] = 0.0, 1.0
    is_demonstration = torch.arange(b) % size == group_size
    rewards[is_demonstration] = 1.0
    preference = torch.zeros(b, dtype=torch.long)
    if pairs:
        preference[torch.arange(b) % size == 0], preference[torch.arange(b) % size == 1] = 1, -1
    return Trajectories(
        logprobs=logprobs.requires_grad_(),
        response_mask=torch.arange(length) < lengths[:, None],
        rewards=rewards,
        group=torch.arange(b) // size * 7 + 3,
        is_demonstration=is_demonstration,
        behavior_logprobs=(logprobs.detach() + noise(0.3)).clamp(max=-1e-3),
        sampler_logprobs=(logprobs.detach() + noise(0.3)).clamp(max=-1e-3),
        reference_logprobs=(logprobs.detach() + noise(0.5)).clamp(max=-1e-3),
        values=noise(0.5),
        entropies=noise().abs().requires_grad_(),
        preference=preference,
        step=3,
    )


def check_component(component: Component) -> None:
    """Shape, detachment, range, purity, padding, order, and that the declared `reads` and `reach` are the true ones.

    A part that reads the behaviour column must do without it, a reduction must divide by what counts alone.

    Raises:
        ConformanceError: the first rule broken.
        TypeError: `component` is no part, for example a class instead of an instance.
        upge.trajectories.UndeclaredColumn: a column is read that `reads` does not list.
    """
    _require_instance(component, Component, "a part such as upge.PPOClip()")
    if isinstance(component, ValueLoss):  # it is called with values, not with a batch: the rules are for what it wraps
        for part in component.parts.values():
            check_component(part)
        return
    name = type(component).__name__
    _check_declarations(component)
    for seed in range(3):
        batch = random_batch(seed)
        before = {n: getattr(batch, n).detach().clone() for n in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS)}
        value = _evaluate(component, batch)
        _require(isinstance(value, Tensor), f"{name} returns a {type(value).__name__}; it must return a tensor")
        shape = (len(batch),) if isinstance(component, Gate) else tuple(batch.response_mask.shape)
        _require(tuple(value.shape) == shape, f"{name} returns shape {list(value.shape)}, expected {list(shape)}")
        valid = value if value.ndim == 1 else value[batch.response_mask]
        _require(bool(valid.isfinite().all()), f"{name} returns NaN or infinity on a well-formed batch")
        if not isinstance(component, Regularizer):
            _require(not value.requires_grad, f"{name} lets a gradient through; return `.detach()` of what it reads")
        if isinstance(component, StabilizationMask):
            inside = bool(((valid >= 0) & (valid <= 1)).all())
            _require(inside, f"{name} returns values outside [0, 1]; a mask says how far a token may move")
        _same(name, "gives another value when called again", value, _evaluate(component, batch), batch)
        changed = [n for n in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS) if not torch.equal(getattr(batch, n), before[n])]
        _require(not changed, f"{name} changes the batch in place ({', '.join(changed)}); a part is a pure function")
        padded = _pad(batch)
        _same(name, "depends on the padding", value, _evaluate(component, padded), batch)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        shuffled = _take(batch, order)
        _same(name, "depends on the order of the trajectories", value[order], _evaluate(component, shuffled), shuffled)
        _check_reach(component, batch, value)
        _check_on_policy(component, batch)
        if isinstance(component, Reduction):
            _check_counts(component, batch, seed)


def check_algorithm(algorithm: Algorithm) -> None:
    """Every part conforms; the factors multiply to the weights, and these are minus the gradient where nothing is
    regularized; the gradient is the same for any split into micro-batches, any padding and any order; trajectories
    that the plan drops have no gradient, and those it keeps the same weights without them.

    Raises:
        ConformanceError: the first rule broken.
        TypeError: `algorithm` is no `upge.Algorithm`, for example its name.
    """
    _require_instance(algorithm, Algorithm, "an algorithm such as algorithms.load(NAME)")
    for part in algorithm.parts.values():
        check_component(part)
    name = f"algorithm '{algorithm.name}'"
    for seed in range(3):
        batch = random_batch(seed, pairs=algorithm.needs.preference_pairs)
        estimate = algorithm.estimate(batch)
        product = torch.zeros_like(estimate.weights)
        for t in estimate.terms.values():
            ratio = torch.exp(batch.logprobs.detach() - t.log_denominator)
            product = product + t.gate * t.reduction * t.mask * t.advantages * t.shape * ratio
        _require(
            torch.allclose(product, estimate.weights, rtol=1e-9, atol=1e-12),
            f"{name}: factors do not multiply to weights",
        )
        gradient = _gradient(algorithm, batch, [torch.arange(len(batch))])
        if not algorithm.regularizers:
            _close(name, "the gradient is not minus the weights", -estimate.weights, gradient[0])
        for pieces in _splits(batch, algorithm.reach, seed):
            _close(name, "the gradient depends on the micro-batch split", gradient, _gradient(algorithm, batch, pieces))
        padded = _gradient(algorithm, _pad(batch), [torch.arange(len(batch))])[..., : gradient.shape[2]]
        _close(name, "the gradient depends on the padding", gradient, padded)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        shuffled = _gradient(algorithm, _take(batch, order), [torch.arange(len(batch))])
        _close(name, "the gradient depends on the order of the trajectories", gradient[:, order], shuffled)
        plan = algorithm.plan(batch)
        dropped = gradient[:, ~plan.keep]
        _require(bool((dropped == 0).all()), f"{name}: the plan drops trajectories that have a gradient")
        kept = _piece(batch, plan.keep.nonzero()[:, 0])
        expected = estimate.weights[plan.keep][:, : kept.response_mask.shape[1]]
        _close(name, "has other weights without the trajectories that it drops", expected, plan.estimate(kept).weights)


def _require_instance(value: object, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"expected {example}, found {found}; pass an instance")


def _check_declarations(component: Component) -> None:
    """What the rest of the code reads off reductions and regularizers beside calling them."""
    name = type(component).__name__
    if isinstance(component, Reduction):
        over = getattr(component, "over", None)
        _require(over in get_args(Over), f"{name} has over={over!r}; give it the field `over`, 'term' or 'batch'")
        live = sorted(component.columns & LIVE_COLUMNS)
        _require(not live, f"{name} reads {live}; a divisor must be known before the forward pass, on the whole batch")
    if isinstance(component, Regularizer):
        fields = ("coefficient", "reduction", "source")
        missing = [field for field in fields if not hasattr(component, field)]
        _require(not missing, f"{name} lacks {missing}; a regularizer has the fields {', '.join(fields)}")
        source = component.source
        _require(source in get_args(Source), f"{name} has source={source!r}; use one of {get_args(Source)}")
        check_component(component.reduction)


def _check_on_policy(component: Component, batch: Trajectories) -> None:
    """Without the behaviour column the data are strictly on-policy, as in a run of one update a step.

    What does not read the current policy cannot put it in its place: it asks for the column before the forward pass.
    """
    asked = needs_of({"part": component}, {}).before
    if not {"behavior_logprobs", "logprobs"} <= component.columns or "behavior_logprobs" in asked:
        return
    problem = f"{type(component).__name__} %s where behavior_logprobs is None, which means strictly on-policy; read "
    problem += "`batch.log_behavior` or `batch.log_importance_ratio` instead of the column"
    try:
        value = _evaluate(component, dataclasses.replace(batch, behavior_logprobs=None))
    except UndeclaredColumn:
        raise
    except Exception as error:
        raise ConformanceError(f"{problem % 'fails'} ({type(error).__name__}: {error})") from error
    valid = value if value.ndim == 1 else value[batch.response_mask]
    _require(bool(valid.isfinite().all()), problem % "returns NaN or infinity")


def _check_counts(reduction: Reduction, batch: Trajectories, seed: int) -> None:
    """Trajectories that do not count have no weight, and no say in the weights of the others."""
    name, index = type(reduction).__name__, batch.group_index
    selected = (torch.rand(len(batch), generator=torch.Generator().manual_seed(seed)) < 0.6) & (index != 2)
    value = reduction(reduction.view(batch), selected)
    outside = value[~selected]
    _require(bool((outside == 0).all()), f"{name} gives weight to trajectories outside `selected`")
    cut = batch.select(selected.nonzero()[:, 0])
    found = reduction(reduction.view(cut), torch.ones_like(cut.is_demonstration))
    problem = "lets trajectories outside `selected` change the weights of the others; divide by counts over `selected`"
    _same(name, problem, value[selected], found, cut)


def _piece(batch: Trajectories, rows: Tensor) -> Trajectories:
    """Some rows of the batch with their log-probs."""
    width = max(1, int(batch.lengths[rows].max())) if len(rows) else 1
    return batch.select(rows, batch.logprobs[rows, :width])


def _evaluate(component: Component, batch: Trajectories) -> Tensor:
    view = component.view(batch)
    if isinstance(component, StabilizationMask):
        return component(view, _signs(batch))
    if isinstance(component, Reduction):
        return component(view, torch.ones_like(batch.is_demonstration))
    return component(view)


def _signs(batch: Trajectories) -> Tensor:
    """[B, T] advantages of both signs, for masks."""
    return torch.where(batch.group % 2 == 0, -1.0, 1.0).double()[:, None].expand(batch.response_mask.shape)


def _check_reach(component: Component, batch: Trajectories, value: Tensor) -> None:
    """Evaluates what is live on pieces of the declared reach; what is not is computed on the whole batch anyway."""
    live = component.is_live or isinstance(component, StabilizationMask)
    if not live or isinstance(component, (Reduction, Regularizer)):
        return
    hoisted, reach = component.hoist(batch), component.live_reach
    name, problem = type(component).__name__, f"declares reach '{reach}' but depends on more; declare a wider `reach`"
    for rows in (rows for pieces in _splits(batch, reach, 0) for rows in pieces):
        piece = _piece(batch, rows)
        expected = value[rows] if value.ndim == 1 else value[rows][:, : piece.response_mask.shape[1]]
        _same(name, problem, expected, _evaluate(hoisted, piece), piece)
    if reach == "token":
        every_other = torch.arange(batch.response_mask.shape[1]) % 2 == 1
        cut = dataclasses.replace(batch, response_mask=batch.response_mask & every_other)
        _same(name, problem, value, _evaluate(hoisted, cut), cut)
        if not _holds_values(hoisted):
            _check_packed(component, batch, value)


def _holds_values(component: Component) -> bool:
    """True if a part of it was computed beforehand, on [B, T]; packed tokens cannot look such values up."""
    return isinstance(component, Precomputed) or any(map(_holds_values, component.parts.values()))


def _check_packed(component: Component, batch: Trajectories, value: Tensor) -> None:
    """Parts of reach 'token' must work on [N] packed tokens as on [B, T]."""
    problem = f"{type(component).__name__} has reach 'token' but %s on packed tokens [N]; declare reach 'trajectory'"
    valid, arguments = batch.response_mask, ()
    if isinstance(component, StabilizationMask):
        arguments = (_signs(batch)[valid],)
    try:
        found = component(component.view(batch.pack()), *arguments)
    except UndeclaredColumn:
        raise
    except Exception as error:
        raise ConformanceError(f"{problem % 'fails'} ({type(error).__name__}: {error})") from error
    same = found.shape == value[valid].shape and torch.equal(found.double(), value[valid].double())
    _require(same, problem % "gives another value")


def _splits(batch: Trajectories, reach: str, seed: int) -> Iterator[list[Tensor]]:
    """Ways to cut a batch that keep together what `reach` demands."""
    b = len(batch)
    if reach == "group":
        groups = [(batch.group == g).nonzero()[:, 0] for g in batch.group.unique()]
        yield groups
        yield [torch.cat(groups[1:]), groups[0]]
    else:
        yield [torch.tensor([i]) for i in range(b)]
        order = torch.randperm(b, generator=torch.Generator().manual_seed(seed + 100))
        yield [order[:5], order[5:6], order[6:]]


def _gradient(algorithm: Algorithm, batch: Trajectories, pieces: list[Tensor]) -> Tensor:
    """d loss / d logprobs (and entropies) summed over pieces, each evaluated on its own; [2, B, T]."""
    leaves = [c.detach().clone().requires_grad_() for c in (batch.logprobs, batch.entropies)]
    plan = algorithm.plan(batch)
    for rows in pieces:
        width = max(1, int(batch.lengths[rows].max()))
        piece = batch.select(rows, leaves[0][rows, :width], entropies=leaves[1][rows, :width])
        plan.estimate(piece).loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _pad(batch: Trajectories) -> Trajectories:
    """The batch with three more columns and NaN in every padded place."""
    columns = {}
    for name in TOKEN_COLUMNS:
        value = getattr(batch, name).detach()
        fill = False if name == "response_mask" else float("nan")
        if name != "response_mask":
            value = value.masked_fill(~batch.response_mask, fill)
        columns[name] = torch.nn.functional.pad(value, (0, 3), value=fill)
    rest = {name: getattr(batch, name) for name in (*TRAJECTORY_COLUMNS, "step")}
    return Trajectories(**columns, **rest)


def _take(batch: Trajectories, order: Tensor) -> Trajectories:
    columns = {name: getattr(batch, name).detach()[order] for name in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS)}
    return Trajectories(**{**columns, "row": None}, step=batch.step)


def _same(name: str, problem: str, expected: Tensor, found: Tensor, batch: Trajectories) -> None:
    if expected.ndim == 2:
        width = batch.response_mask.shape[1]
        expected, found = (x[:, :width][batch.response_mask] for x in (expected, found))
    _close(name, problem, expected, found)


def _close(name: str, problem: str, expected: Tensor, found: Tensor) -> None:
    difference = float((expected.double() - found.double()).detach().abs().max()) if expected.numel() else 0.0
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    _require(difference <= _TOLERANCE * scale, f"{name} {problem} (largest difference {difference:.3g})")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConformanceError(message)


__all__: list[str] = ["ConformanceError", "check_algorithm", "check_component", "random_batch"]
