"""The symbolic form of each part: a rule per class, which maps a part and a world to one expression per token.

A rule restates a part in symbols. Every proof also compares the rule with the part's own code numerically
(`proof.compare`), so a wrong rule cannot prove anything. Register a rule to use your own part in proofs:

    @upge.theory.symbolic.rule(MyMask)
    def _(part, world, advantages):
        return per_token(world, lambda row, t: ...)

The rule of a part that sees the advantages, such as a mask, is also called with them. The rule of a gate returns one
expression per row. The rule of a reduction is also called with the list of active rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
from sympy import Expr

from upge.components.base import Component
from upge.errors import ConfigError
from upge.theory.symbolic.world import Row, World

#: One expression per row and token.
Tokens = list[list[Expr]]
#: Maps a part, a world and the arguments of its slot to expressions. Arguments and result differ between slots, so
#: the signature is open.
Rule = Callable[..., Any]
_RULES: dict[type, Rule] = {}


def rule(kind: type) -> Callable[[Rule], Rule]:
    """Register the decorated function as the symbolic form of the class `kind`."""

    def register(function: Rule) -> Rule:
        _RULES[kind] = function
        return function

    return register


def has_rule(part: Component) -> bool:
    """True if the part and all parts that it wraps have a symbolic form."""
    return type(part) in _RULES and all(map(has_rule, part.parts.values()))


def evaluate(part: Component, world: World, *arguments: Any) -> Any:
    """The part's symbolic form in a world: expressions per row for a gate, otherwise `Tokens`.

    Raises:
        ConfigError: the part's class has no symbolic form.
    """
    if type(part) not in _RULES:
        raise ConfigError(
            f"{type(part).__name__}: no symbolic form is known; register one with "
            f"@upge.theory.symbolic.rule({type(part).__name__})"
        )
    return _RULES[type(part)](part, world, *arguments)


def per_token(world: World, value: Callable[[Row, int], Expr | float]) -> Tokens:
    """value(row, t) for every token."""
    return [[sp.sympify(value(row, t)) for t in range(len(row))] for row in world.rows]


def per_row(world: World, value: Callable[[Row], Expr | float]) -> Tokens:
    """value(row) for every token of the row."""
    values = [sp.sympify(value(row)) for row in world.rows]
    return [[x] * len(row) for x, row in zip(values, world.rows, strict=True)]
