"""What each part is as an expression: a rule per class, from a part and a world to one expression per token.

A rule restates a part once more, in symbols; that it says the same as the part's own code is checked numerically
wherever a rule is used (`proof.compare`), so that a wrong rule cannot prove anything. A user's own part takes part in
proofs by a rule of its own:

    @upge.theory.symbolic.rule(MyMask)
    def _(part, world, advantages):
        return per_token(world, lambda row, t: ...)

Masks are called with the advantages too. A gate's rule gives one expression per row, a reduction's is called with the
list of rows that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
from sympy import Expr

from upge.components.base import Component
from upge.errors import ConfigError
from upge.theory.symbolic.algebra import product
from upge.theory.symbolic.world import Row, World

#: One expression per row and token.
Tokens = list[list[Expr]]
_RULES: dict[type, Callable] = {}


def rule(kind: type) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the symbolic form of the class `kind`."""

    def register(function: Callable) -> Callable:
        _RULES[kind] = function
        return function

    return register


def has_rule(part: Component) -> bool:
    """True if the part and all that it wraps have a symbolic form."""
    return type(part) in _RULES and all(map(has_rule, part.parts.values()))


def evaluate(part: Component, world: World, *arguments: Any) -> Any:
    """The part's symbolic form in a world.

    Raises:
        ConfigError: its class has none.
    """
    if type(part) not in _RULES:
        raise ConfigError(
            f"{type(part).__name__}: no symbolic form is known; register one with "
            f"@upge.theory.symbolic.rule({type(part).__name__})"
        )
    return _RULES[type(part)](part, world, *arguments)


def per_token(world: World, value: Callable[[Row, int], Any]) -> Tokens:
    """value(row, t) for every token."""
    return [[sp.sympify(value(row, t)) for t in range(len(row))] for row in world.rows]


def per_row(world: World, value: Callable[[Row], Any]) -> Tokens:
    """value(row) for every token of the row."""
    found = [sp.sympify(value(row)) for row in world.rows]
    return [[x] * len(row) for x, row in zip(found, world.rows, strict=True)]


def sequence_ratio(row: Row) -> Expr:
    """s = (Π_t r_t)^{1/|τ|}."""
    return product(row.ratios) ** sp.Rational(1, len(row))


def sigmoid(u: Expr) -> Expr:
    """σ(u) = 1/(1 + e^{-u})."""
    return 1 / (1 + sp.exp(-u))


def outward(world: World, ratio: Expr, advantage: Expr, low: Expr, high: Expr) -> bool:
    """Whether the step would push a ratio further out of [low, high], which it has left."""
    if advantage == 0:
        return False
    if world.less(0, advantage):
        return world.less(high, ratio)
    return world.less(ratio, low)


def sampler_ratios(row: Row) -> list[Expr]:
    """π_old/π_sampler per token."""
    return [q / s for q, s in zip(row.q, row.s, strict=True)]
