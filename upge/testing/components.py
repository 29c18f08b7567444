"""Conformance of a part, and of the state of stateful gates: the rules that the rest of the code relies on."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import torch
from torch import Tensor

from upge.candidates import CandidateView
from upge.components.base import (
    AdvantageEstimator,
    Component,
    LikelihoodGradient,
    ReferenceDenominator,
    StabilizationMask,
    TokenReward,
    mixes_demonstrations,
    walk,
)
from upge.components.distillation import Divergence
from upge.estimator import call_problem
from upge.gates import Gate
from upge.needs import needs_of
from upge.reduction import Over, Reduction
from upge.regularizers import DivergencePenalty, Regularizer, ValueLoss
from upge.stateful import UTILITY_SLOPE, StatefulGate
from upge.support import Support
from upge.testing import batches
from upge.testing.divergences import check_divergence
from upge.testing.rules import SINGLE_TOLERANCE, attempt, close, require, require_instance, same, valid
from upge.trajectories import Source, Trajectories
from upge.views import LIVE_COLUMNS, TOKEN_COLUMNS, TRAJECTORY_COLUMNS, Distributions

#: The message for objects of an algorithm that are not parts of a term.
_CHECKED = (
    "parts of a slot, gates, reductions, regularizers and rewards per token are checked; test a length of prefixes, a "
    "weight of prompts, a memory or a replay by calling its methods, and in a run of a few steps"
)


def check_component(component: Component) -> None:
    """Check that a part obeys the rules of its slot.

    The rules are about shape, precision, detachment, range and purity. The value must not depend on padding, order or
    tokens outside the response mask, the declared `reads` and `reach` must be correct, and the value must be finite at
    extremes and on degenerate batches.

    A part that reads `behavior_logprobs` must also work without it. One that reads `group` must give rollouts the same
    values without the demonstrations of their groups, unless it declares `counts_demonstrations`. A divergence's value
    must have the gradient that its advantage gives. A reduction must count only the active trajectories. A stateful
    gate must keep its state within the range of its updates.

    Raises:
        ConformanceError: the first broken rule.
        TypeError: `component` is not a part, for example a class instead of an instance.
        upge.trajectories.UndeclaredColumn: the part reads a column that `reads` does not list.
    """
    require_instance(component, Component, "a part such as upge.PPOClip()", _CHECKED)
    if isinstance(component, ValueLoss):  # it takes values, not a batch, so it has its own rules
        for part in component.parts.values():
            check_component(part)
        _check_value_loss(component)
        return
    _check_declarations(component)
    if isinstance(component, DivergencePenalty):  # its values are those of the divergence on candidates
        check_component(component.advantage)
        return
    for _, part in walk(component, ""):
        if isinstance(part, Divergence):
            check_divergence(part)
    if any(part.needs_vocabulary for _, part in walk(component, "")):
        _check_on_vocabulary(component)
        return
    for _, part in walk(component, ""):
        if isinstance(part, StatefulGate):
            _check_updates(part)
            _check_coefficient(part)
    for seed in range(2):
        _check_on(component, batches.random_batch(seed, rewards=component.rewards_read), seed)
    for _, part in walk(component, ""):
        _check_demonstrations(part)
    _check_precision(component)
    _check_extremes(component)
    _check_degenerate(component)


def _check_on(component: Component, batch: Trajectories, seed: int) -> None:
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
    same(name, "depends on the padding", value, _evaluate(component, batches.padded(batch)), batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = batches.reordered(batch, order)
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
    """The arguments of a factor, and the attributes of reductions and regularizers that the rest of the code reads."""
    name = type(component).__name__
    if isinstance(component, StabilizationMask | ReferenceDenominator | AdvantageEstimator | LikelihoodGradient):
        problem = call_problem(component)
        require(problem is None, str(problem))
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


def _check_on_vocabulary(component: Component) -> None:
    """A part that needs the whole vocabulary has one finite value per token of it, and no order of tokens matters."""
    name, batch = type(component).__name__, batches.random_batch(0, length=5, rewards=component.rewards_read)
    tokens = batch.pack()
    g = torch.Generator().manual_seed(0)
    models = [(9 * torch.randn(len(tokens), 11, dtype=torch.float64, generator=g)).log_softmax(-1) for _ in range(3)]
    given = Distributions(torch.randint(0, 11, (len(tokens),), generator=g), *models)
    order = torch.randperm(11, generator=g)
    moved = Distributions(order.argsort()[given.tokens], *(one[:, order] for one in models))
    ready = component.precompute_parts(batch, Support.live)
    values = [ready(ready.view(CandidateView.of(tokens, one, None))) for one in (given, moved)]
    problem = f"{name} returns shape {list(values[0].shape)} for {list(models[0].shape)} candidates; broadcast to them"
    require(values[0].expand_as(models[0]).shape == models[0].shape, problem)
    require(bool(values[0].isfinite().all()), f"{name} returns NaN or infinity on well-formed distributions")
    require(not values[0].requires_grad, f"{name} lets a gradient through; return `.detach()` of what it reads")
    ordered = values[0].expand_as(models[0])[:, order]
    equal = torch.allclose(ordered, values[1].expand_as(models[0]), rtol=1e-10, atol=1e-12)
    require(equal, f"{name} depends on the order of the vocabulary")


def _check_demonstrations(part: Component) -> None:
    """Statistics of groups must be over rollouts, unless the part declares that demonstrations count."""
    if "group" not in part.reads or part.counts_demonstrations:
        return
    name, problem = type(part).__name__, "%s, so demonstrations count as rollouts in its statistics of groups; read "
    problem += "`is_demonstration` and leave them out, or set `counts_demonstrations = True` in the class"
    require(not mixes_demonstrations(part), f"{name} " + problem % "reads `group` without `is_demonstration`")
    batch = batches.random_batch(0, rewards=part.rewards_read)
    rows = (~batch.is_demonstration).nonzero()[:, 0]
    alone = dataclasses.replace(batches.select_rows(batch, rows), row=None)
    problem %= "gives rollouts other values without the demonstrations of their groups"
    same(name, problem, _evaluate(part, batch)[rows], _evaluate(part, alone), alone)


def _check_on_policy(component: Component, batch: Trajectories) -> None:
    """A part must work without `behavior_logprobs`: the data are then on-policy, as with one update per step.

    A part that does not read the current log-probs cannot use them instead, so it requires the column.
    """
    required = needs_of({"part": component}, {}).precomputed
    if not {"behavior_logprobs", "logprobs"} <= component.columns or "behavior_logprobs" in required:
        return
    problem = f"{type(component).__name__} %s where behavior_logprobs is None, which means strictly on-policy; read "
    problem += "`batch.log_behavior` or `batch.log_importance_ratio` instead of the column"
    on_policy = dataclasses.replace(batch, behavior_logprobs=None)
    value = attempt(problem % "fails", _evaluate, component, on_policy)
    require(bool(valid(value, batch).isfinite().all()), problem % "returns NaN or infinity")


def _check_counts(reduction: Reduction, batch: Trajectories, seed: int) -> None:
    """Trajectories outside `active` must have no weight, and must not change the weights of the others."""
    name, index = type(reduction).__name__, batch.group_index
    active = (torch.rand(len(batch), generator=torch.Generator().manual_seed(seed)) < 0.6) & (index != 2)
    value = reduction(reduction.view(batch), active)
    outside = value[~active]
    require(bool((outside == 0).all()), f"{name} gives weight to trajectories outside `active`")
    cut = batch.select(active.nonzero()[:, 0])
    alone = reduction(reduction.view(cut), torch.ones_like(cut.is_demonstration))
    problem = "lets trajectories outside `active` change the weights of the others; divide by counts over `active`"
    same(name, problem, value[active], alone, cut)


def _check_holes(component: Component, batch: Trajectories, value: Tensor) -> None:
    """Holes in the response mask, with arbitrary numbers in them, must not change any value."""
    name, holed = type(component).__name__, batches.punched(batch)
    with_holes = _evaluate(component, holed)
    _check_shape(component, with_holes, holed)
    problem = "depends on places outside the response mask; skip them, positions are `response_mask.cumsum(dim=1)`"
    close(name, problem, valid(value, batch), valid(with_holes, holed))


def _check_precision(component: Component) -> None:
    """Float64 must stay float64, float32 must keep its precision, and float32 and bfloat16 must not overflow."""
    name, live = type(component).__name__, component.is_live or isinstance(component, Reduction)
    batch, single = batches.random_batch(0, rewards=component.rewards_read), torch.float32
    exact = _evaluate(component, batch)
    good = (torch.float64,) if live else (torch.float64, single)
    require(exact.dtype in good, f"{name} returns {exact.dtype} of float64 columns; keep the precision of the columns")
    problem = f"{name} fails on float32 columns, which a model gives; convert the operands to one type"
    value = attempt(problem, _evaluate, component, batches.in_precision(batch, single))
    good = (torch.float64, single)
    require(value.dtype in good, f"{name} returns {value.dtype} of float32 columns; half precision is not enough")
    problem = "loses precision on float32 columns; compute in the precision of the columns"
    close(name, problem, valid(exact, batch), valid(value, batch), SINGLE_TOLERANCE)
    for dtype in (single, torch.bfloat16):
        for given in (batch, batches.extreme_batch(rewards=component.rewards_read)):
            kind = str(dtype).removeprefix("torch.")
            value = attempt(f"{name} fails on {kind} columns", _evaluate, component, batches.in_precision(given, dtype))
            fine = _is_finite(component, value, given) or not _is_finite(component, _evaluate(component, given), given)
            require(fine, f"{name} overflows on {kind} columns; stay in log space, or clamp before `exp`")


def _check_extremes(component: Component) -> None:
    """Values and the gradients of regularizers must be finite at extremes."""
    name, batch = type(component).__name__, batches.extreme_batch(rewards=component.rewards_read)
    batch = dataclasses.replace(batch, **{n: getattr(batch, n).detach().requires_grad_() for n in batches.NUMBERS})
    value = _evaluate(component, batch)
    described = "log-probs of -40, -1e-12 and 0, ratios of e^±30, entropies of 0"
    require(_is_finite(component, value, batch), f"{name} returns NaN or infinity at extremes ({described})")
    _check_range(component, value, batch)
    if isinstance(component, Regularizer) and value.requires_grad:
        columns = {n: getattr(batch, n) for n in batches.NUMBERS}
        slopes = torch.autograd.grad(valid(value, batch).sum(), tuple(columns.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(columns, slopes, strict=True) if g is not None}
        leaking = [n for n, g in gradients.items() if n not in LIVE_COLUMNS and bool((g != 0).any())]
        require(not leaking, f"{name} lets a gradient through to {', '.join(leaking)}; read it with `.detach()`")
        sound = all(bool(g.isfinite().all()) for g in gradients.values())
        require(sound, f"{name} has a gradient of NaN or infinity at extremes ({described})")


def _is_finite(component: Component, value: Tensor, batch: Trajectories) -> bool:
    """Whether the value is finite; log f′ may also be -inf, where f′ is 0."""
    inside = valid(value, batch)
    flat = (inside == -torch.inf) & isinstance(component, LikelihoodGradient)
    return bool((inside.isfinite() | flat).all())


def _check_degenerate(component: Component) -> None:
    """A part must have a finite value on degenerate batches."""
    name = type(component).__name__
    for description, batch, has_rollouts in batches.degenerate_batches(component.rewards_read):
        if has_rollouts or component.group_size_needed == 1:
            value = attempt(f"{name} fails on {description}", _evaluate, component, batch)
            _check_shape(component, value, batch)
            fine = _is_finite(component, value, batch)
            require(fine, f"{name} returns NaN or infinity on {description}; give 0 where nothing can be compared")
            _check_range(component, value, batch)


def _check_value_loss(loss: ValueLoss) -> None:
    """Targets must not depend on padding or holes, weights must be on rollouts only, and errors must be finite."""
    name, batch = type(loss).__name__, batches.random_batch(0)
    targets, every = loss.targets(batch), torch.ones_like(batch.is_demonstration)
    same(name, "has targets that depend on the padding", targets, loss.targets(batches.padded(batch)), batch)
    holed = batches.punched(batch)
    problem = "has targets that depend on places outside the response mask"
    close(name, problem, valid(targets, batch), valid(loss.targets(holed), holed))
    weights = loss.weights(batch, every)
    outside = bool((weights[batch.is_demonstration] == 0).all())
    require(outside, f"{name} gives weight to demonstrations; a critic learns from rollouts")
    assert batch.values is not None
    columns = [c.detach().requires_grad_() for c in (batch.values + 0.3, batch.values, targets)]
    error = loss(*columns)
    require(error.shape == targets.shape, f"{name} returns shape {list(error.shape)}, expected {list(targets.shape)}")
    gradient = torch.autograd.grad(error[batch.response_mask].sum(), columns[0])[0]
    sound = bool(error.isfinite().all()) and bool(gradient.isfinite().all())
    require(sound, f"{name} returns NaN or infinity on a well-formed batch, or has such a gradient")


def _evaluate(component: Component, batch: Trajectories) -> Tensor:
    """The part's value on the batch, called with the arguments of its slot."""
    view = component.view(batch)
    if component.sees_advantages:
        return component(view, _signs(batch))
    if isinstance(component, Reduction):
        return component(view, torch.ones_like(batch.is_demonstration))
    return component(view)


def _signs(batch: Trajectories) -> Tensor:
    """[B, T] advantages of both signs, as an argument of parts that see them."""
    return torch.where(batch.group % 2 == 0, -1.0, 1.0).double()[:, None].expand(batch.response_mask.shape)


def _check_reach(component: Component, batch: Trajectories, value: Tensor) -> None:
    """A live part must have the same values on micro-batches of its declared reach as on the whole batch.

    Reach 'batch' has no micro-batches. Parts that are not live are always computed on the whole batch.
    """
    if component.is_precomputed() or isinstance(component, Reduction):
        return
    precomputed, reach = component.precompute_parts(batch), component.live_reach
    name, problem = type(component).__name__, f"declares reach '{reach}' but depends on more; declare a wider `reach`"
    for rows in (rows for split in batches.splits(batch, reach, 0) for rows in split):
        part = batches.select_rows(batch, rows)
        expected = value[rows] if value.ndim == 1 else value[rows][:, : part.response_mask.shape[1]]
        same(name, problem, expected, _evaluate(precomputed, part), part)
    if reach == "token":
        every_other = torch.arange(batch.response_mask.shape[1]) % 2 == 1
        cut = dataclasses.replace(batch, response_mask=batch.response_mask & every_other)
        same(name, problem, value, _evaluate(precomputed, cut), cut)
        _check_packed(component, precomputed, batch, value)


def _check_packed(component: Component, precomputed: Component, batch: Trajectories, value: Tensor) -> None:
    """Parts of reach 'token' must have the same values on packed tokens [N] as on [B, T].

    The head calls them with packed tokens, after it has precomputed the wrapped parts that can be.
    """
    name = type(component).__name__
    problem = (
        "has reach 'token' but %s on packed tokens [N]; write it for any leading shape (batch.per_token makes one "
        "number per token of a wrapped gate's), or declare reach 'trajectory'"
    )
    arguments = (_signs(batch)[batch.response_mask],) if component.sees_advantages else ()
    packed: Tensor = attempt(f"{name} {problem % 'fails'}", precomputed, precomputed.view(batch.pack()), *arguments)
    expected = valid(value, batch)
    require(packed.shape == expected.shape, f"{name} {problem % 'gives another value'}")
    # Up to rounding: torch may use other instructions for the last few numbers of a tensor.
    close(name, problem % "gives another value", expected, packed)


#: Representative sizes of a gate's values and signals.
_SIZES = (0.0, 1.0, -1.0, 1e6, -1e6)


def _check_updates(gate: StatefulGate) -> None:
    """`updated` must be pure and finite, and the initial value must be within the range of its results."""
    name, start = type(gate).__name__, gate.initial()
    require(_is_number(start), f"{name}.initial() is {start!r}; it must be a finite number")
    require(isinstance(gate.due(0), bool), f"{name}.due(0) is {gate.due(0)!r}; it must be True or False")
    results: list[float] = []
    for value in (start, *(start + size for size in _SIZES)):
        for signals in _signals(gate):
            given = dict(signals)
            moved = gate.updated(value, given)
            require(_is_number(moved), f"{name}.updated({value:g}, {signals}) is {moved!r}; it must be a finite number")
            again = gate.updated(value, dict(signals))
            require(again == moved, f"{name}.updated gives another value when called again; it is a pure function")
            require(given == signals, f"{name}.updated changes the signals in place; it is a pure function")
            results.append(moved)
    low, high = min(results), max(results)
    inside = low <= start <= high
    require(inside, f"{name}.initial() is {start:g}, where updated() never leads: it returns {low:g} to {high:g}")


def _signals(gate: StatefulGate) -> list[dict[str, float]]:
    """Signals that are all equal, and signals of which one differs from the others."""
    names = sorted(gate.wants)
    equal = [dict.fromkeys(names, size) for size in _SIZES]
    return equal + [dict.fromkeys(names, 0.0) | {name: size} for name in names for size in _SIZES]


def _check_coefficient(gate: StatefulGate) -> None:
    """The coefficient must depend on the state, and be affine in it if the gate wants the slope of an objective."""
    name, batch = type(gate).__name__, batches.random_batch(0, rewards=gate.rewards_read)
    none, half, whole = (
        gate(gate.view(dataclasses.replace(batch, state={gate.variable: value}))) for value in (0.0, 0.5, 1.0)
    )
    follows = not torch.equal(none, whole)
    require(follows, f"{name} ignores batch.state['{gate.variable}']; its coefficient must depend on it")
    if UTILITY_SLOPE in gate.wants:
        problem = f"wants '{UTILITY_SLOPE}' but is not affine in '{gate.variable}', so its slope is not a constant"
        close(name, problem, (none + whole) / 2, half)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
