"""Objectives of corrections, applied to the clipped objective with a constant length. Each is J, to be maximized."""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Rational, exp, log

from experiments.table1.rollouts import (
    COEFFICIENT,
    all_centred,
    all_different,
    centred,
    dr_grpo,
    fixed_length,
    punished,
    surrogate,
)
from upge.theory.symbolic import Row, World, mean, product, total


def _weighted(w: World, weight: Callable[[Row, int], Expr]) -> Expr:
    """Σ_t weight(row, t)·min(r·Â, clip(r)·Â)/L; the weight holds no π_θ."""
    return fixed_length(all_centred(w), lambda row, t, a: weight(row, t) * surrogate(w, row, t, a))


def tis(w: World) -> Expr:
    """Weight min(π_old/π_sampler, 2)."""
    return _weighted(w, lambda row, t: w.clip(row.q[t] / row.s[t], high=2))


def icepop(w: World) -> Expr:
    """Weight π_old/π_sampler within [0.5, 5], else 0."""

    def weight(row: Row, t: int) -> Expr:
        ratio = row.q[t] / row.s[t]
        return 0 if w.less(ratio, Rational("0.5")) or w.less(5, ratio) else ratio

    return _weighted(w, weight)


def mis(w: World) -> Expr:
    """Weight Π_t π_old/π_sampler up to 2, else 0."""

    def weight(row: Row, t: int) -> Expr:
        ratio = product(q / s for q, s in zip(row.q, row.s, strict=True))
        return 0 if w.less(2, ratio) else ratio

    return _weighted(w, weight)


def mis_geometric(w: World) -> Expr:
    """Weight 1 where (Π_t π_old/π_sampler)^(1/|τ|) lies within [0.999, 1.001], else 0."""

    def weight(row: Row, t: int) -> Expr:
        ratio = product(q / s for q, s in zip(row.q, row.s, strict=True)) ** Rational(1, len(row))
        return Rational(0 if w.less(ratio, Rational("0.999")) or w.less(Rational("1.001"), ratio) else 1)

    return _weighted(w, weight)


def dual_clip(w: World) -> Expr:
    """max(min(r·Â, clip(r)·Â), 3·Â) where Â < 0."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        inner = surrogate(w, row, t, a)
        return w.maximum(inner, 3 * a) if w.less(a, 0) else inner

    return fixed_length(all_centred(w), one)


def _minus(w: World, penalty: Callable[[Row, int], Expr]) -> Expr:
    return dr_grpo(w) - COEFFICIENT * mean(penalty(row, t) for row in w.rollouts for t in range(len(row)))


def kl_k1(w: World) -> Expr:
    """Minus c·log(π_θ/π_0)."""
    return _minus(w, lambda row, t: log(row.p[t] / row.f[t]))


def kl_k2(w: World) -> Expr:
    """Minus c·½·log²(π_θ/π_0)."""
    return _minus(w, lambda row, t: log(row.p[t] / row.f[t]) ** 2 / 2)


def kl_k3(w: World) -> Expr:
    """Minus c·(x - log x - 1), x = π_0/π_θ."""
    return _minus(w, lambda row, t: row.f[t] / row.p[t] - log(row.f[t] / row.p[t]) - 1)


def entropy(w: World) -> Expr:
    """Plus c·H; not a factor in front of ∇π_θ, so it shows in the derivative by H."""
    return _minus(w, lambda row, t: -row.h[t])


def kl_reward(w: World) -> Expr:
    """Â minus c·Σ_{k≥t} sg[log(π_θ/π_0)], the current policy's; clipped like any other Â."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        return surrogate(w, row, t, a - COEFFICIENT * total(w.sg(log(row.p[k] / row.f[k])) for k in range(t, len(row))))

    return fixed_length(all_centred(w), one)


def overlong(w: World) -> Expr:
    """Rewards that fall near the response limit."""
    pairs = [pair for question in w.questions for pair in centred(w, question, reward=punished)]
    return fixed_length(pairs, lambda row, t, a: surrogate(w, row, t, a))


def dynamic_sampling(w: World) -> Expr:
    """Only prompts whose responses differ, in sum and divisor."""
    pairs = [pair for question in all_different(w) for pair in centred(w, question)]
    return fixed_length(pairs, lambda row, t, a: surrogate(w, row, t, a)) if pairs else Rational(0)


def ratio_kl(w: World) -> Expr:
    """Minus c·r·(x - log x - 1), x = π_0/π_θ, r = π_θ/π_old."""

    def penalty(row: Row, t: int) -> Expr:
        x = row.f[t] / row.p[t]
        return row.p[t] / row.q[t] * (x - log(x) - 1)

    return _minus(w, penalty)


def sequence_mask(w: World) -> Expr:
    """No response with Â < 0 and a mean log(π_old/π_θ) above 0.5."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        fallen = product(w.sg(1 / r) for r in row.ratios) ** Rational(1, len(row))
        return 0 if w.less(a, 0) and w.less(exp(Rational(1, 2)), fallen) else surrogate(w, row, t, a)

    return fixed_length(all_centred(w), one)


def optimal_baseline(w: World) -> Expr:
    """R minus the mean reward of the prompt's rollouts that are longer than t, weighted by Σ_{k≤t} w_k."""

    def value(row: Row, t: int) -> Expr:
        rows = [r for r in w.rollouts if r.group == row.group and len(r) > t]
        weights = [total(r.w[: t + 1]) for r in rows]
        baseline = total(x * r.reward for x, r in zip(weights, rows, strict=True)) / total(weights)
        return w.advantage(row, row.reward - (baseline if len(rows) > 1 else 0), t)

    rows = [(row, None) for row in w.rollouts]
    return fixed_length(rows, lambda row, t, _: surrogate(w, row, t, value(row, t)))


def overlong_filter(w: World) -> Expr:
    """Only responses that ended by themselves, in sum and divisor."""
    pairs = [(row, a) for row, a in all_centred(w) if row.finished]
    return fixed_length(pairs, lambda row, t, a: surrogate(w, row, t, a)) if pairs else Rational(0)
