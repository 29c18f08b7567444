"""Symbolic forms of masks, denominators (π_ref itself) and likelihood gradients (f′ itself). See `rules`.

The rule of a part that sees the advantages, such as a mask, is also called with them.
"""

from __future__ import annotations

import functools

import sympy as sp
from sympy import Expr

from upge import components
from upge.errors import ConfigError
from upge.theory.symbolic.algebra import mean, number, product
from upge.theory.symbolic.rules import Tokens, evaluate, per_row, per_token, rule
from upge.theory.symbolic.world import Row, World


def sequence_ratio(row: Row) -> Expr:
    """s = (Π_t r_t)^{1/|τ|}."""
    return product(row.ratios) ** sp.Rational(1, len(row))


def sigmoid(u: Expr) -> Expr:
    """σ(u) = 1/(1 + e^{-u})."""
    return 1 / (1 + sp.exp(-u))


def outward(world: World, ratio: Expr, advantage: Expr, low: Expr, high: Expr) -> bool:
    """Whether a ratio is outside [low, high] and the step would move it further out."""
    if advantage == 0:
        return False
    if world.less(0, advantage):
        return world.less(high, ratio)
    return world.less(ratio, low)


def sampler_ratios(row: Row) -> list[Expr]:
    """π_old/π_sampler per token."""
    return [q / s for q, s in zip(row.q, row.s, strict=True)]


def centred_products(world: World, advantages: Tokens) -> list[tuple[Row, int, Expr]]:
    """(row, t, cov) of all rollout tokens, cov = (log π_θ - mean log π_θ)·(A - mean A)."""
    tokens = [(row, t) for row in world.rollouts for t in range(len(row))]
    log_mean = mean(sp.log(row.p[t]) for row, t in tokens)
    centre = mean(advantages[row.index][t] for row, t in tokens)
    return [(row, t, (sp.log(row.p[t]) - log_mean) * (advantages[row.index][t] - centre)) for row, t in tokens]


# Masks.


@rule(components.NoMask)
def _(part, world, advantages):
    return per_token(world, lambda row, t: 1)


@rule(components.PPOClip)
def _(part, world, advantages):
    low, high = 1 - number(part.low), 1 + number(part.high)

    def value(row, t):
        ratio, advantage = row.p[t] / row.q[t], advantages[row.index][t]
        stopped = outward(world, ratio, advantage, low, high)
        if part.dual is not None and advantage != 0 and world.less(advantage, 0):
            stopped = world.less(number(part.dual), ratio) or stopped
        return 0 if stopped else 1

    return per_token(world, value)


@rule(components.CovarianceClip)
def _(part, world, advantages):
    """For shares at which no token is drawn: all that are eligible are stopped."""
    inner = evaluate(part.mask, world, advantages)
    stopped = {
        (row.index, t)
        for row, t, cov in centred_products(world, advantages)
        if inner[row.index][t] != 0 and world.less(number(part.low), cov) and world.less(cov, number(part.high))
    }
    if len(stopped) > max(1, int(part.share * sum(map(len, world.rollouts)))):
        raise ConfigError("CovarianceClip: a random draw has no symbolic form; set share to 1")
    return per_token(world, lambda row, t: 0 if (row.index, t) in stopped else inner[row.index][t])


@rule(components.TopCovariance)
def _(part, world, advantages):
    tokens = centred_products(world, evaluate(part.advantage, world))
    tokens.sort(key=functools.cmp_to_key(lambda a, b: -1 if world.less(b[2], a[2]) else 1))
    chosen = {(row.index, t) for row, t, _ in tokens[: max(1, int(part.share * len(tokens)))]}
    return per_token(world, lambda row, t: int((row.index, t) in chosen))


@rule(components.TopEntropy)
def _(part, world, advantages):
    tokens = [(row, t) for row in world.rollouts for t in range(len(row))]
    tokens.sort(key=functools.cmp_to_key(lambda a, b: -1 if world.less(b[0].h[b[1]], a[0].h[a[1]]) else 1))
    chosen = {(row.index, t) for row, t in tokens[: max(1, int(part.share * len(tokens)))]}
    return per_token(world, lambda row, t: int((row.index, t) in chosen))


@rule(components.HighEntropy)
def _(part, world, advantages):
    def before(row, s, t):
        """Of equal entropies the first counts as the lower one."""
        equal = world.value(row.h[s]) == world.value(row.h[t])
        return s < t if equal else world.less(row.h[s], row.h[t])

    def value(row, t):
        lower = sum(before(row, s, t) for s in range(len(row)))
        return int(lower >= int((1 - part.share) * len(row) + 1e-9))

    return per_token(world, value)


@rule(components.SequenceClip)
def _(part, world, advantages):
    low, high = 1 - number(part.low), 1 + number(part.high)

    def value(row, t):
        return 0 if outward(world, sequence_ratio(row), advantages[row.index][t], low, high) else 1

    return per_token(world, value)


@rule(components.ImportanceBand)
def _(part, world, advantages):
    def value(row, t):
        ratio = row.p[t] / row.q[t] if part.of == "importance" else row.q[t] / row.s[t]
        return 0 if world.less(ratio, number(part.low)) or world.less(number(part.high), ratio) else 1

    return per_token(world, value)


@rule(components.SequenceSamplerBand)
def _(part, world, advantages):
    def value(row):
        ratio = product(sampler_ratios(row)) ** (1 if part.mean == "product" else sp.Rational(1, len(row)))
        below = part.low > 0 and world.less(ratio, number(part.low))
        return 0 if below or world.less(number(part.high), ratio) else 1

    return per_row(world, value)


@rule(components.AllOf)
def _(part, world, advantages):
    values = [evaluate(mask, world, advantages) for mask in part.masks]
    return [[product(v[i][t] for v in values) for t in range(len(row))] for i, row in enumerate(world.rows)]


@rule(components.LogRatioClip)
def _(part, world, advantages):
    low, high = sp.exp(-number(part.low)), sp.exp(number(part.high))

    def value(row, t):
        return 0 if outward(world, row.p[t] / row.q[t], advantages[row.index][t], low, high) else 1

    return per_token(world, value)


@rule(components.DivergenceClip)
def _(part, world, advantages):
    low, high = -number(part.low), number(part.high)

    def value(row, t):
        p, q, advantage = row.p[t], row.q[t], advantages[row.index][t]
        moved = p - q
        if part.divergence == "kl":
            size = q * sp.log(q / p) + (1 - q) * sp.log((1 - q) / (1 - p))
            moved = size if world.less(q, p) else -size
        return 0 if outward(world, moved, advantage, low, high) else 1

    return per_token(world, value)


@rule(components.OffPolicySequenceMask)
def _(part, world, advantages):
    def value(row, t):
        advantage = advantages[row.index][t]
        if advantage == 0 or not world.less(advantage, 0):
            return 1
        old = row.q if part.of == "importance" else row.s
        fallen = product(a / p for a, p in zip(old, row.p, strict=True)) ** sp.Rational(1, len(row))
        return 0 if world.less(sp.exp(number(part.threshold)), fallen) else 1

    return per_token(world, value)


@rule(components.SigmoidGate)
def _(part, world, advantages):
    def value(row, t):
        positive = advantages[row.index][t] != 0 and world.less(0, advantages[row.index][t])
        u = number(part.positive if positive else part.negative) * (row.p[t] / row.q[t] - 1)
        return 4 * sigmoid(u) * (1 - sigmoid(u))

    return per_token(world, value)


# Denominators.


@rule(components.CurrentPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.p[t])


@rule(components.BehaviorPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.q[t])


@rule(components.UnitDenominator)
def _(part, world):
    return per_token(world, lambda row, t: 1)


@rule(components.SequenceBehaviorPolicy)
def _(part, world):
    return per_token(world, lambda row, t: row.p[t] / sequence_ratio(row))


@rule(components.ClippedBehaviorPolicy)
def _(part, world):
    low, high = (None if bound is None else number(bound) for bound in (part.low, part.high))
    return per_token(world, lambda row, t: row.p[t] / world.clip(row.p[t] / row.q[t], low, high))


@rule(components.SamplerCorrected)
def _(part, world):
    inner = evaluate(part.denominator, world)
    cap = None if part.cap is None else number(part.cap)

    def value(row, t):
        ratios = sampler_ratios(row)
        weight = ratios[t] if part.level == "token" else product(ratios)
        return inner[row.index][t] / world.clip(weight, high=cap)

    return per_token(world, value)


@rule(components.GeometricMeanBehaviorPolicy)
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


@rule(components.ClippedReferencePolicy)
def _(part, world):
    low, high = number(part.low), number(part.high)
    return per_token(world, lambda row, t: row.p[t] / world.clip(row.p[t] / row.f[t], low, high))


@rule(components.SequenceReferencePolicy)
def _(part, world):
    def value(row, t):
        ratio = product(p / f for p, f in zip(row.p, row.f, strict=True))
        weight = ratio ** (number(part.power) / len(row))
        return row.p[t] / world.clip(weight, number(part.low) if part.low > 0 else None, number(part.high))

    return per_token(world, value)


@rule(components.MixedBehaviorPolicy)
def _(part, world):
    share = number(part.share)
    return per_token(world, lambda row, t: share * row.q[t] + 1 - share)


# Likelihood gradients.


@rule(components.PolicyLikelihood)
def _(part, world):
    return per_token(world, lambda row, t: 1)


@rule(components.ShapedLikelihood)
def _(part, world):
    gamma = number(part.gamma)
    return per_token(world, lambda row, t: gamma / (row.p[t] + gamma) ** 2)


@rule(components.ShapedRatio)
def _(part, world):
    beta = number(part.beta)
    return per_token(world, lambda row, t: beta / (row.ratios[t] + beta) ** 2)


@rule(components.PowerLikelihood)
def _(part, world):
    likely, unlikely = number(part.likely), number(part.unlikely)
    return per_token(world, lambda row, t: row.p[t] ** likely * (1 - row.p[t]) ** unlikely)


@rule(components.GammaLikelihood)
def _(part, world, advantages):
    def value(row, t):
        advantage, weight = advantages[row.index][t], product(row.ratios)
        negative = advantage != 0 and world.less(advantage, 0)
        k, rate = map(number, part.negative if negative else part.positive)
        return weight**k * sp.exp(rate * (1 - weight))

    return per_token(world, value)
