"""Conformance of stateful gates: how their state changes, and that their coefficient depends on it."""

from __future__ import annotations

import dataclasses
import math

import torch

from upge.components.base import Component
from upge.stateful import UTILITY_SLOPE, StatefulGate
from upge.testing.batches import random_batch
from upge.testing.rules import close, require

#: Representative sizes of a gate's values and signals.
_SIZES = (0.0, 1.0, -1.0, 1e6, -1e6)


def check_memory(component: Component) -> None:
    """Checks every stateful gate in a part.

    The initial value must be finite and within the range of `updated`, `updated` must be pure and finite, and the
    coefficient must depend on the state.

    Raises:
        ConformanceError: the first broken rule.
    """
    if isinstance(component, StatefulGate):
        _check_updates(component)
        _check_coefficient(component)
    for part in component.parts.values():
        check_memory(part)


def _check_updates(gate: StatefulGate) -> None:
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
    name, batch = type(gate).__name__, random_batch(0)
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
