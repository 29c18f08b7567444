"""Objectives on rollouts: on-policy, off-policy, preference pairs, corrections. Each is J, to be maximised.

The corrections apply to the clipped objective with a constant length.
"""

from __future__ import annotations

from sympy import Expr, Rational, exp, log

from experiments.table1.written import (
    LENGTH,
    all_centred,
    all_different,
    centred,
    clipped_white,
    gae,
    likelihood,
    own,
    paid,
    punished,
    succeeded,
    surrogate,
    surrogate_mean,
    token_mean,
)
from upge.theory.symbolic import Row, World, mean, product, total


def reinforce(w: World) -> Expr:
    """(1/N) Σ (1/L) Σ_t ±log π_θ."""
    sign = {row.index: w.advantage(row, Rational(1 if succeeded(w, row) else -1)) for row in w.rollouts}
    return mean(sign[row.index] * likelihood(row) / LENGTH for row in w.rollouts)


def reinforce_plus_plus(w: World) -> Expr:
    """Clipped, with the whitened sum of rewards from a token on."""
    return clipped_white(w, {row.index: [total(paid(row)[t:]) for t in range(len(row))] for row in w.rollouts})


def rloo(w: World) -> Expr:
    """(1/N) Σ (R - mean of the others)·log π_θ(τ)."""
    terms = []
    for question in w.questions:
        for row in own(question):
            others = mean(other.reward for other in own(question) if other is not row)
            terms.append(w.advantage(row, row.reward - others) * likelihood(row))
    return mean(terms)


def ppo(w: World) -> Expr:
    """Clipped, with whitened GAE of rewards that include a KL penalty."""
    return clipped_white(w, {row.index: gae(row, paid(row)) for row in w.rollouts})


def grpo(w: World) -> Expr:
    """Clipped; mean over tokens, then responses, then prompts."""
    return mean(surrogate_mean(w, centred(w, question, std=True)) for question in w.questions)


def dr_grpo(w: World) -> Expr:
    """Clipped, Â without the standard deviation, a constant length."""
    return mean(total(surrogate(w, row, t, a) for t in range(len(row))) / LENGTH for row, a in all_centred(w))


def dapo(w: World) -> Expr:
    """Clipped at 1.28, token mean, prompts whose responses differ, rewards that fall near the limit, by 0.5."""
    reward = lambda row: punished(row, "0.5")  # noqa: E731
    pairs = [pair for question in all_different(w) for pair in centred(w, question, std=True, reward=reward)]
    return token_mean(pairs, lambda row, t, a: surrogate(w, row, t, a, high="0.28")) if pairs else Rational(0)


def cispo(w: World) -> Expr:
    """Token mean of sg[min(r, 5)]·Â·log π_θ."""
    return token_mean(
        all_centred(w, std=True), lambda row, t, a: w.clip(w.sg(row.p[t] / row.q[t]), high=5) * a * log(row.p[t])
    )


def gspo(w: World) -> Expr:
    """min(s·Â, clip(s)·Â) with s the geometric mean of a response's ratios."""

    def one(row: Row, a: Expr) -> Expr:
        s = product(row.ratios) ** Rational(1, len(row))
        return w.minimum(s * a, w.clip(s, 1 - Rational("3e-4"), 1 + Rational("4e-4")) * a)

    return mean(mean(one(row, a) for row, a in centred(w, question, std=True)) for question in w.questions)


def sapo(w: World) -> Expr:
    """(4/τ)·σ(τ(r - 1))·Â."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        tau = Rational(1) if w.less(0, a) else Rational("1.05")
        return 4 / tau / (1 + exp(-tau * (row.p[t] / row.q[t] - 1))) * a

    return mean(
        mean(mean(one(row, t, a) for t in range(len(row))) for row, a in centred(w, question, std=True))
        for question in w.questions
    )


def gmpo(w: World) -> Expr:
    """Â·exp(mean_t of log r, bounded on one side)."""
    bound = Rational("0.4")

    def one(row: Row, a: Expr) -> Expr:
        up = w.less(0, a)
        logs = [w.minimum(log(r), bound) if up else w.maximum(log(r), -bound) for r in row.ratios]
        return a * exp(mean(logs))

    return mean(mean(one(row, a) for row, a in centred(w, question, std=True)) for question in w.questions)


def opmd(w: World) -> Expr:
    """½ of the token mean of (R - mean R)·log π_θ."""
    return token_mean(all_centred(w), lambda row, t, a: a * log(row.p[t])) / 2


def asymre(w: World) -> Expr:
    """Token mean of (R - (mean R - 0.1))·log π_θ."""
    return token_mean(all_centred(w), lambda row, t, a: (a + Rational("0.1")) * log(row.p[t]))


def relift(w: World) -> Expr:
    """The ordinary step: Â·r over a constant length, no clip."""
    return mean(a * total(row.ratios) / LENGTH for row, a in all_centred(w))


def dpo(w: World) -> Expr:
    """Mean over pairs of log σ(0.1·[log(π_θ/π_frozen)(chosen) - log(π_θ/π_frozen)(rejected)])."""
    gains = []
    for question in w.questions:
        (win,), (lose,) = ([row for row in question if row.preference == sign] for sign in (1, -1))
        margin = [total(log(p) - log(f) for p, f in zip(row.p, row.f, strict=True)) for row in (win, lose)]
        gains.append(log(1 / (1 + exp(-Rational("0.1") * (margin[0] - margin[1])))))
    return mean(gains)


COEFFICIENT = Rational("0.001")


def _weighted(w: World, weight) -> Expr:
    """Σ_t weight(row, t)·min(r·Â, clip(r)·Â)/L; the weight holds no π_θ."""
    return mean(
        total(weight(row, t) * surrogate(w, row, t, a) for t in range(len(row))) / LENGTH for row, a in all_centred(w)
    )


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

    return mean(total(one(row, t, a) for t in range(len(row))) / LENGTH for row, a in all_centred(w))


def _minus(w: World, penalty) -> Expr:
    tokens = [penalty(row, t) for row in w.rollouts for t in range(len(row))]
    return dr_grpo(w) - COEFFICIENT * mean(tokens)


def kl_k1(w: World) -> Expr:
    """Minus c·log(π_θ/π_frozen)."""
    return _minus(w, lambda row, t: log(row.p[t] / row.f[t]))


def kl_k2(w: World) -> Expr:
    """Minus c·½·log²(π_θ/π_frozen)."""
    return _minus(w, lambda row, t: log(row.p[t] / row.f[t]) ** 2 / 2)


def kl_k3(w: World) -> Expr:
    """Minus c·(x - log x - 1), x = π_frozen/π_θ."""
    return _minus(w, lambda row, t: row.f[t] / row.p[t] - log(row.f[t] / row.p[t]) - 1)


def entropy(w: World) -> Expr:
    """Plus c·H; not a factor in front of ∇π_θ, so it shows in the derivative by H."""
    return _minus(w, lambda row, t: -row.h[t])


def kl_reward(w: World) -> Expr:
    """Â minus c·Σ_{k≥t} sg[log(π_θ/π_frozen)], the current policy's; clipped like any other Â."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        return surrogate(w, row, t, a - COEFFICIENT * total(w.sg(log(row.p[k] / row.f[k])) for k in range(t, len(row))))

    return mean(total(one(row, t, a) for t in range(len(row))) / LENGTH for row, a in all_centred(w))


def overlong(w: World) -> Expr:
    """Rewards that fall near the response limit."""
    reward = lambda row: punished(row, "0.5")  # noqa: E731
    pairs = [pair for question in w.questions for pair in centred(w, question, reward=reward)]
    return mean(total(surrogate(w, row, t, a) for t in range(len(row))) / LENGTH for row, a in pairs)


def dynamic_sampling(w: World) -> Expr:
    """Only prompts whose responses differ, in sum and divisor."""
    pairs = [pair for question in all_different(w) for pair in centred(w, question)]
    values = [total(surrogate(w, row, t, a) for t in range(len(row))) / LENGTH for row, a in pairs]
    return mean(values) if values else Rational(0)
