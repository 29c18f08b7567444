"""Symbolic forms of gates, reductions and regularizers. See `rules`.

The rule of a gate returns one expression per row. The rule of a reduction is called with the active rows. The rule of a
regularizer returns the penalty itself, to be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp
from sympy import Expr

from upge import gates, reduction, regularizers, stateful
from upge.theory.symbolic.algebra import mean, number, product, rational
from upge.theory.symbolic.rules import Tokens, evaluate, per_row, per_token, rule
from upge.theory.symbolic.world import Row, World

# Gates: one expression per row.


def succeeded(world: World, row: Row) -> bool:
    """Whether the row's reward counts as a success."""
    return world.less(sp.Rational(1, 2), row.reward)


def pass_rate(world: World, row: Row) -> sp.Rational:
    """The fraction of successes among the rollouts of the row's question."""
    own = [r for r in world.rows if r.group == row.group and not r.is_demonstration]
    return rational(sum(succeeded(world, r) for r in own), len(own))


@rule(gates.ConstantGate)
def _(part, world):
    return [number(part.coefficient)] * len(world.rows)


@rule(gates.PassRateAbove)
def _(part, world):
    return [sp.Integer(int(bool(pass_rate(world, row) > number(part.threshold)))) for row in world.rows]


@rule(gates.PassRateAtMost)
def _(part, world):
    return [sp.Integer(int(bool(pass_rate(world, row) <= number(part.threshold)))) for row in world.rows]


@rule(gates.PassRateBetween)
def _(part, world):
    low, high = number(part.low), number(part.high)
    return [sp.Integer(int(bool(low < pass_rate(world, row) < high))) for row in world.rows]


@rule(gates.PassRateTable)
def _(part, world):
    points = [(number(r), number(c)) for r, c in zip(part.rates, part.coefficients, strict=True)]

    def value(rate):
        below = max((k for k, (r, _) in enumerate(points) if r <= rate), default=-1)
        if below < 0 or below == len(points) - 1:
            return points[max(below, 0)][1]
        (r0, c0), (r1, c1) = points[below], points[below + 1]
        return c0 if part.step else c0 + (rate - r0) / (r1 - r0) * (c1 - c0)

    return [value(pass_rate(world, row)) for row in world.rows]


@rule(gates.SiblingSucceeded)
def _(part, world):
    def value(row: Row) -> Expr:
        siblings = [r for r in world.rollouts if r.group == row.group and r.index != row.index]
        failed = row.is_demonstration or not succeeded(world, row)
        return sp.Integer(int(any(succeeded(world, r) for r in siblings) and (failed or not part.only_failed)))

    return [value(row) for row in world.rows]


@rule(gates.Finished)
def _(part, world):
    return [sp.Integer(int(row.finished)) for row in world.rows]


@rule(gates.Replayed)
def _(part, world):
    return [sp.Integer(int(row.is_replayed)) for row in world.rows]


@rule(gates.EntropyWeight)
def _(part, world):
    return [number(part.scale) * sp.exp(part.sign * mean(row.h)) for row in world.rows]


@rule(gates.Schedule)
def _(part, world):
    # A symbol for the schedule's current value: its change between steps does not affect the gradient of one step.
    return [world.variable("mu", part.coefficient_at(world.step))] * len(world.rows)


@rule(stateful.MetaGradient)
@rule(stateful.NoiseBalanced)
def _(part, world):
    return [world.variable(part.variable, part.initial())] * len(world.rows)


@rule(gates.Complement)
def _(part, world):
    return [1 - value for value in evaluate(part.gate, world)]


@rule(gates.ProductOf)
def _(part, world):
    return [product(values) for values in zip(*(evaluate(gate, world) for gate in part.gates), strict=True)]


# Reductions: `active` are the active rows.


def _token_rule(tokens: str, length: int | None, row: Row) -> Expr:
    """The weight of a token within its row."""
    weights: dict[str, Expr] = {"mean": rational(1, len(row)), "sum": sp.Integer(1), "fixed": rational(1, length or 1)}
    return weights[tokens]


def _on_active(world: World, active: list[Row], value: Callable[[Row], Expr]) -> Tokens:
    """value(row) for every token of the active rows, 0 elsewhere."""
    return per_row(world, lambda row: value(row) if row in active else 0)


@rule(reduction.TokenMean)
def _(part, world, active):
    return _on_active(world, active, lambda row: rational(1, max(1, sum(map(len, active)))))


@rule(reduction.SequenceMean)
def _(part, world, active):
    return _on_active(world, active, lambda row: _token_rule(part.tokens, None, row) / len(active))


@rule(reduction.FixedLength)
def _(part, world, active):
    return _on_active(world, active, lambda row: _token_rule("fixed", part.length, row) / len(active))


@rule(reduction.QuestionMean)
def _(part, world, active):
    questions = len({row.group for row in active})

    def value(row):
        same = [other for other in active if other.group == row.group]
        own = sum(part.within == "question" or other.is_demonstration == row.is_demonstration for other in same)
        return _token_rule(part.tokens, part.length, row) / (questions * (1 if part.within == "none" else own))

    return _on_active(world, active, value)


# Regularizers: the penalty itself, to be differentiated.


@rule(regularizers.EntropyBonus)
def _(part, world):
    return per_token(world, lambda row, t: -row.h[t])


def kl(kind: str, log_ratio: Expr) -> Expr:
    """The estimate k1, k2 or k3 of the KL divergence, of d = log π_0 - log π."""
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": sp.exp(log_ratio) - log_ratio - 1}[kind]


@rule(regularizers.KLPenalty)
def _(part, world):
    def value(row, t):
        penalty = kl(part.kind, sp.log(row.f[t]) - sp.log(row.p[t]))
        return row.p[t] / row.q[t] * penalty if part.importance else penalty

    return per_token(world, value)
