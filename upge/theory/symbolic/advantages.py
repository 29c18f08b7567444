"""Symbolic forms of rewards per token and of advantages. See `rules`."""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp
from sympy import Expr

from upge import components
from upge.theory.symbolic.algebra import mean, number, product, total
from upge.theory.symbolic.rules import Tokens, evaluate, per_row, per_token, rule
from upge.theory.symbolic.weights import kl, succeeded
from upge.theory.symbolic.world import REWARD_WEIGHTS, Row, World


@rule(components.ConstantAdvantage)
def _(part, world):
    return per_token(world, lambda row, t: number(part.value))


@rule(components.SignedReward)
def _(part, world):
    return per_row(world, lambda row: number(part.success if succeeded(world, row) else part.failure))


def _group(world: World, row: Row, union: bool) -> list[Row]:
    return [r for r in world.rows if r.group == row.group and (union or not r.is_demonstration)]


@rule(components.GroupRelative)
def _(part, world):
    def value(row):
        rewards = [other.reward for other in _group(world, row, part.baseline == "group")]
        centred = row.reward - mean(rewards)
        if not part.normalize_std:
            return centred
        squares = total((reward - mean(rewards)) ** 2 for reward in rewards)
        return centred / (sp.sqrt(squares / (len(rewards) - int(part.unbiased))) + number(part.epsilon))

    return per_row(world, value)


@rule(components.MeanNormalized)
def _(part, world):
    def value(row):
        average = mean(other.reward for other in _group(world, row, False))
        return (row.reward - average) / average if world.less(0, average) else 0

    return per_row(world, value)


@rule(components.PromptBaseline)
def _(part, world):
    return per_row(world, lambda row: row.reward - row.u)


@rule(components.GuidedRelative)
def _(part, world):
    # No rollout of a world continues a demonstration, so all are plain.
    return per_row(world, lambda row: row.reward - mean(other.reward for other in _group(world, row, False)))


@rule(components.OptimalTokenBaseline)
def _(part, world):
    def value(row, t):
        others = [r for r in _group(world, row, False) if len(r) > t]
        if not others or (others == [row]):
            return row.reward if part.alone == "reward" else 0
        weights = [total(r.w[: t + 1]) for r in others]
        return row.reward - total(w * r.reward for w, r in zip(weights, others, strict=True)) / total(weights)

    return per_token(world, value)


@rule(components.GroupClassification)
def _(part, world):
    def odds(row):
        sign = 1 if succeeded(world, row) else -1
        return product(row.ratios) ** (-sign / (number(part.temperature) * len(row)))

    def value(row):
        if row.is_demonstration:
            return 0
        rollouts, right = _group(world, row, False), succeeded(world, row)
        same = [other for other in rollouts if succeeded(world, other) == right]
        if len(same) == len(rollouts):
            return 0
        share = odds(row) / (1 + total(map(odds, same)))
        return (1 if right else -1) * share / number(part.temperature)

    return per_row(world, value)


@rule(components.LeaveOneOut)
def _(part, world):
    return per_row(
        world, lambda row: row.reward - mean(r.reward for r in _group(world, row, False) if r.index != row.index)
    )


@rule(components.OutcomeReward)
def _(part, world):
    return per_token(world, lambda row, t: row.reward if t == len(row) - 1 else 0)


@rule(components.KLPenalizedReward)
def _(part, world):
    inner = evaluate(part.reward, world)

    def value(row, t):
        return inner[row.index][t] - number(part.coefficient) * kl(part.kind, sp.log(row.f[t]) - sp.log(row.q[t]))

    return per_token(world, value)


def _accumulated(world: World, deltas: Tokens, decay: Expr) -> Tokens:
    """Σ_{k≥t} decay^{k-t}·δ_k."""
    return per_token(world, lambda row, t: total(decay ** (k - t) * deltas[row.index][k] for k in range(t, len(row))))


@rule(components.GAE)
def _(part, world):
    rewards, discount = evaluate(part.reward, world), number(part.discount)

    def delta(row, t):
        following = row.v[t + 1] if t + 1 < len(row) else 0
        return rewards[row.index][t] + discount * following - row.v[t]

    return _accumulated(world, per_token(world, delta), discount * number(part.lam))


@rule(components.ReturnToGo)
def _(part, world):
    return _accumulated(world, evaluate(part.reward, world), number(part.discount))


@rule(components.Whitened)
def _(part, world):
    inner = evaluate(part.advantage, world)
    own = [x for row in world.rollouts for x in inner[row.index]]
    if part.over == "rollouts":
        own = [mean(inner[row.index]) for row in world.rollouts if len(row)]
    centre = mean(own)
    variance = total((x - centre) ** 2 for x in own) / (len(own) - 1)
    return per_token(world, lambda row, t: (inner[row.index][t] - centre) / sp.sqrt(variance + number(part.epsilon)))


def _of_reward(advantage, world: World, name: str) -> Tokens:
    return evaluate(advantage, world.with_rewards([row.rewards[name] for row in world.rows]))


@rule(components.OfReward)
def _(part, world):
    return _of_reward(part.advantage, world, part.reward)


def _weighted_sum(world: World, terms: Iterable[tuple[Expr, Tokens]]) -> Tokens:
    pairs = list(terms)
    return per_token(world, lambda row, t: total(weight * values[row.index][t] for weight, values in pairs))


@rule(components.Summed)
def _(part, world):
    weights = part.weights or (1.0,) * len(part.advantages)
    values = (evaluate(advantage, world) for advantage in part.advantages)
    return _weighted_sum(world, zip(map(number, weights), values, strict=True))


@rule(components.RewardDecoupled)
def _(part, world):
    weights = {name: number(float(weight)) for name, weight in REWARD_WEIGHTS.items()}
    return _weighted_sum(world, ((w, _of_reward(part.advantage, world, name)) for name, w in weights.items()))


@rule(components.Tempered)
def _(part, world):
    inner = evaluate(part.advantage, world)
    return per_token(world, lambda row, t: inner[row.index][t] / (1 + number(part.temperature)))


@rule(components.Shifted)
def _(part, world):
    inner = evaluate(part.advantage, world)
    return per_token(world, lambda row, t: inner[row.index][t] - number(part.delta))


@rule(components.KLShaped)
def _(part, world):
    inner = evaluate(part.advantage, world)

    def penalty(row, t):
        other = row.f[t] if part.towards == "reference" else row.q[t]
        return kl(part.kind, sp.log(other) - sp.log(row.p[t]))

    penalties = per_token(world, penalty)
    if part.future:
        penalties = _accumulated(world, penalties, sp.Integer(1))
    return per_token(world, lambda row, t: inner[row.index][t] - number(part.coefficient) * penalties[row.index][t])


def _target(part, row: Row, t: int) -> Expr:
    return (row.n if part.target == "teacher" else row.f)[t]


@rule(components.LogRatio)
def _(part, world):
    return per_token(world, lambda row, t: sp.log(_target(part, row, t) / row.p[t]))


@rule(components.RatioSign)
def _(part, world):
    def value(row, t):
        ratio = row.p[t] / row.q[t]
        return -1 if world.less(1, ratio) else 0 if ratio == 1 else 1

    return per_token(world, value)


@rule(components.TargetProbability)
def _(part, world):
    return per_token(world, lambda row, t: _target(part, row, t))


@rule(components.JensenShannon)
def _(part, world):
    share, rest = number(part.beta), 1 - number(part.beta)
    return per_token(world, lambda row, t: rest * sp.log(share * _target(part, row, t) / row.p[t] + rest))


@rule(components.SampledTarget)
def _(part, world):
    return per_token(world, lambda row, t: number(1))


@rule(components.Surprisal)
def _(part, world):
    return per_token(world, lambda row, t: -sp.log(row.p[t]))


@rule(components.PrefixWeighted)
def _(part, world):
    inner = evaluate(part.advantage, world)

    def value(row, t):
        sizes = [world.maximum(one, -one) for one in inner[row.index][: len(row)]]
        share = total(sizes[:t]) / total(sizes)
        return inner[row.index][t] * (1 + number(part.gamma) * (1 - share))

    return per_token(world, value)


@rule(components.FutureKLShaped)
def _(part, world):
    inner, decay = evaluate(part.advantage, world), sp.Integer(2) ** (-1 / number(part.half_life))

    def value(row, t):
        counted = [part.outlier is None or not world.less(number(part.outlier), ratio) for ratio in row.ratios]
        powers = [row.ratios[k] ** decay ** (k - t) for k in range(t, len(row)) if counted[k]]
        factor, advantage = world.clip(product(powers), number(part.low), number(part.high)), inner[row.index][t]
        negative = advantage != 0 and world.less(advantage, 0)
        if part.safe is not None and negative and world.less(number(part.safe), row.ratios[t]):
            factor = world.clip(factor, high=sp.Integer(1))
        return advantage * factor

    return per_token(world, value)


@rule(components.OverlongShaped)
def _(part, world):
    limit = number(part.limit)
    start = limit * (1 - number(part.buffer))

    def shaped(row):
        share = 0 if row.is_demonstration else min(max((len(row) - start) / (limit - start), 0), 1)
        return row.reward - number(part.penalty) * share

    return evaluate(part.advantage, world.with_rewards([shaped(row) for row in world.rows]))


@rule(components.PairwisePreference)
def _(part, world):
    beta = number(part.beta)

    def value(row):
        if row.preference == 0:
            return 0
        odds = product(
            product(p / f for p, f in zip(r.p, r.f, strict=True)) ** (r.preference * beta)
            for r in world.rows
            if r.group == row.group and r.preference != 0
        )
        return row.preference * beta / (1 + odds)

    return per_row(world, value)
