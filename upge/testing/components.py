"""Does a part obey the rules that the rest of the code relies on?"""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch
from torch import Tensor

from upge.components.base import Component, LikelihoodGradient, StabilizationMask, TokenReward
from upge.gates import Gate
from upge.needs import needs_of
from upge.reduction import Over, Reduction
from upge.regularizers import Regularizer
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
from upge.testing.memory import check_memory
from upge.testing.rules import attempt, close, require, require_instance, same, valid
from upge.trajectories import Source, Trajectories
from upge.value import ValueLoss
from upge.views import LIVE_COLUMNS, TOKEN_COLUMNS, TRAJECTORY_COLUMNS

#: Float32 rounds at 6e-8; what a part makes of a log-prob may be far more sensitive, but not this much.
_SINGLE = 1e-3


def check_component(component: Component) -> None:
    """Shape, precision, detachment, range, purity, padding, order, and that the declared `reads` and `reach` are the
    true ones; finite at extremes and where there is nothing to compare; blind to tokens outside the response mask.

    A part that reads the behaviour column must do without it, a reduction must divide by what counts alone, a gate
    with memory must move within its own range.

    Raises:
        ConformanceError: the first rule broken.
        TypeError: `component` is no part, for example a class instead of an instance.
        upge.trajectories.UndeclaredColumn: a column is read that `reads` does not list.
    """
    require_instance(component, Component, "a part such as upge.PPOClip()")
    if isinstance(component, ValueLoss):  # it is called with values, not with a batch: it has rules of its own
        for part in component.parts.values():
            check_component(part)
        _check_value_loss(component)
        return
    _check_declarations(component)
    check_memory(component)
    for seed in range(2):
        _check_on(component, random_batch(seed), seed)
    _check_precision(component)
    _check_extremes(component)
    _check_degenerate(component)


def _check_on(component: Component, batch: Trajectories, seed: int) -> None:
    """What holds on any well-formed batch."""
    name = type(component).__name__
    before = {n: getattr(batch, n).detach().clone() for n in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS)}
    value = _evaluate(component, batch)
    require(isinstance(value, Tensor), f"{name} returns a {type(value).__name__}; it must return a tensor")
    _check_shape(component, value, batch)
    require(value.is_floating_point(), f"{name} returns {value.dtype}; a part returns floating-point numbers")
    require(bool(valid(value, batch).isfinite().all()), f"{name} returns NaN or infinity on a well-formed batch")
    if not isinstance(component, Regularizer):
        require(not value.requires_grad, f"{name} lets a gradient through; return `.detach()` of what it reads")
    _check_range(component, value, batch)
    same(name, "gives another value when called again", value, _evaluate(component, batch), batch)
    changed = [n for n in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS) if not torch.equal(getattr(batch, n), before[n])]
    require(not changed, f"{name} changes the batch in place ({', '.join(changed)}); a part is a pure function")
    same(name, "depends on the padding", value, _evaluate(component, padded(batch)), batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = reordered(batch, order)
    same(name, "depends on the order of the trajectories", value[order], _evaluate(component, shuffled), shuffled)
    _check_reach(component, batch, value)
    _check_on_policy(component, batch)
    _check_holes(component, batch, value)
    if isinstance(component, Reduction):
        _check_counts(component, batch, seed)


def _check_shape(component: Component, value: Tensor, batch: Trajectories) -> None:
    shape = (len(batch),) if isinstance(component, Gate) else tuple(batch.response_mask.shape)
    name = type(component).__name__
    require(tuple(value.shape) == shape, f"{name} returns shape {list(value.shape)}, expected {list(shape)}")


def _check_range(component: Component, value: Tensor, batch: Trajectories) -> None:
    name, inside = type(component).__name__, valid(value, batch)
    if isinstance(component, StabilizationMask):
        within = bool(((inside >= 0) & (inside <= 1)).all())
        require(within, f"{name} returns values outside [0, 1]; a mask says how far a token may move")
    if isinstance(component, TokenReward):
        empty = bool((value[~batch.response_mask] == 0).all())
        require(empty, f"{name} gives a reward outside the response mask; multiply it by `batch.response_mask`")


def _check_declarations(component: Component) -> None:
    """What the rest of the code reads off reductions and regularizers beside calling them."""
    name = type(component).__name__
    if isinstance(component, Reduction):
        over = getattr(component, "over", None)
        require(over in get_args(Over), f"{name} has over={over!r}; give it the field `over`, 'term' or 'batch'")
        live = sorted(component.columns & LIVE_COLUMNS)
        require(not live, f"{name} reads {live}; a divisor must be known before the forward pass, on the whole batch")
    if isinstance(component, Regularizer):
        fields = ("coefficient", "reduction", "source")
        missing = [field for field in fields if not hasattr(component, field)]
        require(not missing, f"{name} lacks {missing}; a regularizer has the fields {', '.join(fields)}")
        source = component.source
        require(source in get_args(Source), f"{name} has source={source!r}; use one of {get_args(Source)}")
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
    on_policy = dataclasses.replace(batch, behavior_logprobs=None)
    value = attempt(problem % "fails", _evaluate, component, on_policy)
    require(bool(valid(value, batch).isfinite().all()), problem % "returns NaN or infinity")


def _check_counts(reduction: Reduction, batch: Trajectories, seed: int) -> None:
    """Trajectories that do not count have no weight, and no say in the weights of the others."""
    name, index = type(reduction).__name__, batch.group_index
    selected = (torch.rand(len(batch), generator=torch.Generator().manual_seed(seed)) < 0.6) & (index != 2)
    value = reduction(reduction.view(batch), selected)
    outside = value[~selected]
    require(bool((outside == 0).all()), f"{name} gives weight to trajectories outside `selected`")
    cut = batch.select(selected.nonzero()[:, 0])
    found = reduction(reduction.view(cut), torch.ones_like(cut.is_demonstration))
    problem = "lets trajectories outside `selected` change the weights of the others; divide by counts over `selected`"
    same(name, problem, value[selected], found, cut)


def _check_holes(component: Component, batch: Trajectories, value: Tensor) -> None:
    """Responses with places that do not count, garbage in them, have the values of those without."""
    name, holed = type(component).__name__, punched(batch)
    found = _evaluate(component, holed)
    _check_shape(component, found, holed)
    problem = "depends on places outside the response mask; skip them, positions are `response_mask.cumsum(dim=1)`"
    close(name, problem, valid(value, batch), valid(found, holed))


def _check_precision(component: Component) -> None:
    """Float64 stays float64, float32 is no worse than float32, and nothing overflows in either or in bfloat16."""
    name, live = type(component).__name__, component.is_live or isinstance(component, Reduction)
    batch, single = random_batch(0), torch.float32
    exact = _evaluate(component, batch)
    good = (torch.float64,) if live else (torch.float64, single)
    require(exact.dtype in good, f"{name} returns {exact.dtype} of float64 columns; keep the precision of what is read")
    problem = f"{name} fails on float32 columns, which a model gives; convert what is combined to one type"
    found = attempt(problem, _evaluate, component, in_precision(batch, single))
    good = (torch.float64, single)
    require(found.dtype in good, f"{name} returns {found.dtype} of float32 columns; half precision is not enough")
    problem = "loses precision on float32 columns; compute in the precision of what is read"
    close(name, problem, valid(exact, batch), valid(found, batch), _SINGLE)
    for dtype in (single, torch.bfloat16):
        for given in (batch, extreme_batch()):
            kind = str(dtype).removeprefix("torch.")
            found = attempt(f"{name} fails on {kind} columns", _evaluate, component, in_precision(given, dtype))
            fine = _is_finite(component, found, given) or not _is_finite(component, _evaluate(component, given), given)
            require(fine, f"{name} overflows on {kind} columns; stay in log space, or clamp before `exp`")


def _check_extremes(component: Component) -> None:
    name, batch = type(component).__name__, extreme_batch()
    batch = dataclasses.replace(batch, **{n: getattr(batch, n).detach().requires_grad_() for n in NUMBERS})
    value = _evaluate(component, batch)
    described = "log-probs of -40, -1e-12 and 0, ratios of e^±30, entropies of 0"
    require(_is_finite(component, value, batch), f"{name} returns NaN or infinity at extremes ({described})")
    _check_range(component, value, batch)
    if isinstance(component, Regularizer) and value.requires_grad:
        columns = {n: getattr(batch, n) for n in NUMBERS}
        found = torch.autograd.grad(valid(value, batch).sum(), tuple(columns.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(columns, found, strict=True) if g is not None}
        leaking = [n for n, g in gradients.items() if n not in LIVE_COLUMNS and bool((g != 0).any())]
        require(not leaking, f"{name} lets a gradient through to {', '.join(leaking)}; read it with `.detach()`")
        sound = all(bool(g.isfinite().all()) for g in gradients.values())
        require(sound, f"{name} has a gradient of NaN or infinity at extremes ({described})")


def _is_finite(component: Component, value: Tensor, batch: Trajectories) -> bool:
    """A log f′ may also be -inf: f′ is 0 there."""
    inside = valid(value, batch)
    flat = (inside == -torch.inf) & isinstance(component, LikelihoodGradient)
    return bool((inside.isfinite() | flat).all())


def _check_degenerate(component: Component) -> None:
    """Where there is nothing to compare a part has a value all the same."""
    name = type(component).__name__
    for description, batch, has_rollouts in degenerate_batches():
        if has_rollouts or component.group_size_needed == 1:
            value = attempt(f"{name} fails on {description}", _evaluate, component, batch)
            _check_shape(component, value, batch)
            fine = _is_finite(component, value, batch)
            require(fine, f"{name} returns NaN or infinity on {description}; give 0 where nothing can be compared")
            _check_range(component, value, batch)


def _check_value_loss(loss: ValueLoss) -> None:
    """Targets that are the same in any form of the batch, weights on rollouts alone, a gradient by the values alone."""
    name, batch = type(loss).__name__, random_batch(0)
    targets, counted = loss.targets(batch), torch.ones_like(batch.is_demonstration)
    same(name, "has targets that depend on the padding", targets, loss.targets(padded(batch)), batch)
    holed = punched(batch)
    problem = "has targets that depend on places outside the response mask"
    close(name, problem, valid(targets, batch), valid(loss.targets(holed), holed))
    weights = loss.weights(batch, counted)
    outside = bool((weights[batch.is_demonstration] == 0).all())
    require(outside, f"{name} gives weight to demonstrations; a critic learns from rollouts")
    columns = [c.detach().requires_grad_() for c in (batch.values + 0.3, batch.values, targets)]
    error = loss(*columns)
    require(error.shape == targets.shape, f"{name} returns shape {list(error.shape)}, expected {list(targets.shape)}")
    found = torch.autograd.grad(error[batch.response_mask].sum(), columns[0])[0]
    sound = bool(error.isfinite().all()) and bool(found.isfinite().all())
    require(sound, f"{name} returns NaN or infinity on a well-formed batch, or has such a gradient")


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
    if not live or isinstance(component, Reduction):
        return
    precomputed, reach = component.precompute_parts(batch), component.live_reach
    name, problem = type(component).__name__, f"declares reach '{reach}' but depends on more; declare a wider `reach`"
    for rows in (rows for pieces in splits(batch, reach, 0) for rows in pieces):
        part = piece(batch, rows)
        expected = value[rows] if value.ndim == 1 else value[rows][:, : part.response_mask.shape[1]]
        same(name, problem, expected, _evaluate(precomputed, part), part)
    if reach == "token":
        every_other = torch.arange(batch.response_mask.shape[1]) % 2 == 1
        cut = dataclasses.replace(batch, response_mask=batch.response_mask & every_other)
        same(name, problem, value, _evaluate(precomputed, cut), cut)
        _check_packed(component, precomputed, batch, value)


def _check_packed(component: Component, precomputed: Component, batch: Trajectories, value: Tensor) -> None:
    """Parts of reach 'token' must work on [N] packed tokens as on [B, T]: the head calls them so, with what they wrap
    computed beforehand where that can be."""
    problem = (
        f"{type(component).__name__} has reach 'token' but %s on packed tokens [N]; write it for any leading shape "
        "(batch.per_token makes one number per token of a wrapped gate's), or declare reach 'trajectory'"
    )
    arguments = (_signs(batch)[batch.response_mask],) if isinstance(component, StabilizationMask) else ()
    found = attempt(problem % "fails", precomputed, precomputed.view(batch.pack()), *arguments)
    expected = valid(value, batch)
    equal = found.shape == expected.shape and torch.equal(found.double(), expected.double())
    require(equal, problem % "gives another value")
