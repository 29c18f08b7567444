"""Symbolic forms of denominators, π_ref itself, and of likelihood gradients, f′ itself. See `rules`."""

from __future__ import annotations

import sympy as sp

from upge.components import (
    BehaviorPolicy,
    ClippedBehaviorPolicy,
    CurrentPolicy,
    PolicyLikelihood,
    SamplerCorrected,
    SequenceBehaviorPolicy,
    ShapedLikelihood,
    UnitDenominator,
)
from upge.components.denominator import (
    ClippedReferencePolicy,
    GeometricMeanBehaviorPolicy,
    MixedBehaviorPolicy,
    SequenceReferencePolicy,
)
from upge.components.likelihood import PowerLikelihood
from upge.theory.symbolic.algebra import number, product
from upge.theory.symbolic.rules import evaluate, per_token, rule, sampler_ratios, sequence_ratio


@rule(CurrentPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.p[t])


@rule(BehaviorPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.q[t])


@rule(UnitDenominator)
def _(part, world):
    return per_token(world, lambda row, t: 1)


@rule(SequenceBehaviorPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.p[t] / sequence_ratio(row))


@rule(ClippedBehaviorPolicy)
def _(part, world):
    low, high = (None if bound is None else number(bound) for bound in (part.low, part.high))
    return per_token(world, lambda row, t: row.p[t] / world.clip(row.p[t] / row.q[t], low, high))


@rule(SamplerCorrected)
def _(part, world):
    inner = evaluate(part.denominator, world)
    cap = None if part.cap is None else number(part.cap)

    def value(row, t):
        ratios = sampler_ratios(row)
        weight = ratios[t] if part.level == "token" else product(ratios)
        return inner[row.index][t] / world.clip(weight, high=cap)

    return per_token(world, value)


@rule(GeometricMeanBehaviorPolicy)
def _(part, world):
    advantages, low, high = evaluate(part.advantage, world), sp.exp(-number(part.low)), sp.exp(number(part.high))

    def clamped(row, t):
        ratio, advantage = row.p[t] / row.q[t], advantages[row.index][t]
        if advantage == 0:
            return ratio
        return world.clip(ratio, high=high) if world.less(0, advantage) else world.clip(ratio, low=low)

    def value(row, t):
        return row.p[t] / product(clamped(row, k) for k in range(len(row))) ** sp.Rational(1, len(row))

    return per_token(world, value)


@rule(ClippedReferencePolicy)
def _(part, world):
    low, high = number(part.low), number(part.high)
    return per_token(world, lambda row, t: row.p[t] / world.clip(row.p[t] / row.f[t], low, high))


@rule(SequenceReferencePolicy)
def _(part, world):
    def value(row, t):
        ratio = product(p / f for p, f in zip(row.p, row.f, strict=True))
        weight = ratio ** (number(part.power) / len(row))
        return row.p[t] / world.clip(weight, number(part.low) if part.low > 0 else None, number(part.high))

    return per_token(world, value)


@rule(MixedBehaviorPolicy)
def _(part, world):
    share = number(part.share)
    return per_token(world, lambda row, t: share * row.q[t] + 1 - share)


# Likelihood gradients: f′ itself.


@rule(PolicyLikelihood)
def _(part, world):
    return per_token(world, lambda row, t: 1)


@rule(ShapedLikelihood)
def _(part, world):
    gamma = number(part.gamma)
    return per_token(world, lambda row, t: gamma / (row.p[t] + gamma) ** 2)


@rule(PowerLikelihood)
def _(part, world):
    likely, unlikely = number(part.likely), number(part.unlikely)
    return per_token(world, lambda row, t: row.p[t] ** likely * (1 - row.p[t]) ** unlikely)
