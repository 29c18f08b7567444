"""Symbolic forms of masks: 1_stable from the world and the advantages. See `rules`."""

from __future__ import annotations

import sympy as sp

from upge.components import AllOf, ImportanceBand, NoMask, PPOClip, SequenceClip
from upge.components.mask import LogRatioClip, SequenceSamplerBand, SigmoidGate
from upge.theory.symbolic.algebra import number, product
from upge.theory.symbolic.rules import (
    evaluate,
    outward,
    per_row,
    per_token,
    rule,
    sampler_ratios,
    sequence_ratio,
    sigmoid,
)


@rule(NoMask)
def _(part, world, advantages):
    return per_token(world, lambda row, t: 1)


@rule(PPOClip)
def _(part, world, advantages):
    low, high = 1 - number(part.low), 1 + number(part.high)

    def value(row, t):
        ratio, advantage = row.p[t] / row.q[t], advantages[row.index][t]
        stopped = outward(world, ratio, advantage, low, high)
        if part.dual is not None and advantage != 0 and world.less(advantage, 0):
            stopped = world.less(number(part.dual), ratio) or stopped
        return 0 if stopped else 1

    return per_token(world, value)


@rule(SequenceClip)
def _(part, world, advantages):
    low, high = 1 - number(part.low), 1 + number(part.high)

    def value(row, t):
        return 0 if outward(world, sequence_ratio(row), advantages[row.index][t], low, high) else 1

    return per_token(world, value)


@rule(ImportanceBand)
def _(part, world, advantages):
    def value(row, t):
        ratio = row.p[t] / row.q[t] if part.of == "importance" else row.q[t] / row.s[t]
        return 0 if world.less(ratio, number(part.low)) or world.less(number(part.high), ratio) else 1

    return per_token(world, value)


@rule(SequenceSamplerBand)
def _(part, world, advantages):
    def value(row):
        ratio = product(sampler_ratios(row)) ** (1 if part.mean == "product" else sp.Rational(1, len(row)))
        below = part.low > 0 and world.less(ratio, number(part.low))
        return 0 if below or world.less(number(part.high), ratio) else 1

    return per_row(world, value)


@rule(AllOf)
def _(part, world, advantages):
    values = [evaluate(mask, world, advantages) for mask in part.masks]
    return [[product(v[i][t] for v in values) for t in range(len(row))] for i, row in enumerate(world.rows)]


@rule(LogRatioClip)
def _(part, world, advantages):
    low, high = sp.exp(-number(part.low)), sp.exp(number(part.high))

    def value(row, t):
        return 0 if outward(world, row.p[t] / row.q[t], advantages[row.index][t], low, high) else 1

    return per_token(world, value)


@rule(SigmoidGate)
def _(part, world, advantages):
    def value(row, t):
        positive = advantages[row.index][t] != 0 and world.less(0, advantages[row.index][t])
        u = number(part.positive if positive else part.negative) * (row.p[t] / row.q[t] - 1)
        return 4 * sigmoid(u) * (1 - sigmoid(u))

    return per_token(world, value)
