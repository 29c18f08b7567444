"""Objectives on demonstrations, alone and together with rollouts. Each is J, to be maximized."""

from __future__ import annotations

from collections.abc import Sequence

from sympy import Expr, Rational, exp, log, sqrt

from experiments.table1.rollouts import (
    LENGTH,
    SHAPING,
    all_centred,
    centred,
    clipped_white,
    expert_mean,
    experts,
    fixed_length,
    gae,
    pass_rate,
    succeeded,
    surrogate,
    surrogate_mean,
    token_mean,
)
from upge.theory.symbolic import Row, World, mean, total


def sft(w: World) -> Expr:
    """Token mean of log π_θ."""
    return expert_mean(w, lambda row, t: log(row.p[t]))


def dft(w: World) -> Expr:
    """Token mean of sg[π_θ]·log π_θ."""
    return expert_mean(w, lambda row, t: w.sg(row.p[t]) * log(row.p[t]))


def iw_sft(w: World) -> Expr:
    """Token mean of sg[clip(π_θ/π_0, 0.2, 1.8)]·log π_θ."""
    low, high = Rational("0.2"), Rational("1.8")
    return expert_mean(w, lambda row, t: w.clip(w.sg(row.p[t] / row.f[t]), low, high) * log(row.p[t]))


def iw_sft_sequence(w: World) -> Expr:
    """The same with one weight per response, clip(exp(2·mean log π_θ/π_0), 0, 16)."""

    def weight(row: Row) -> Expr:
        return w.clip(w.sg(exp(2 * mean(log(p) - log(f) for p, f in zip(row.p, row.f, strict=True)))), high=16)

    return expert_mean(w, lambda row, t: weight(row) * log(row.p[t]))


def offline_rl(w: World) -> Expr:
    """Â·π_θ on demonstrations; means over tokens, demonstrations of a prompt, prompts."""
    return mean(
        mean(a * mean(row.p) for row, a in centred(w, question, std=True, union=True) if row.is_demonstration)
        for question in w.questions
    )


def luffy(w: World) -> Expr:
    """Â·r on rollouts, Â·π_θ/(π_θ + 0.1) on demonstrations, one divisor."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        return a * (row.p[t] / (row.p[t] + SHAPING) if row.is_demonstration else row.ratios[t])

    return fixed_length(all_centred(w, union=True), one)


def rl_plus(w: World) -> Expr:
    """As luffy, with 2π_θ/(π_old + ω)·√(1 - π_θ), the root detached, ω = (π_old + 1)/2, on demonstrations."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        if not row.is_demonstration:
            return a * row.ratios[t]
        omega = (row.q[t] + 1) / 2
        return a * 2 * row.p[t] / (row.q[t] + omega) * sqrt(1 - w.sg(row.p[t]))

    return fixed_length(all_centred(w, union=True), one)


def srft_offline(w: World) -> Expr:
    """Only its offline reinforcement: Â·π_θ on demonstrations."""
    pairs = all_centred(w, std=True, union=True)
    return mean(a * mean(row.p) for row, a in pairs if row.is_demonstration)


def srft(w: World) -> Expr:
    """Four parts: 0.5·sg[e^-H]·log π_θ and Â·π_θ on demonstrations; 0.1·sg[e^H]·log π_θ on rollouts that succeeded,
    -log π_θ on the others; H the mean entropy of a response."""

    def weight(row: Row) -> Expr:
        return Rational("0.1") * w.sg(exp(mean(row.h))) if succeeded(w, row) else -1

    imitated = mean(Rational("0.5") * w.sg(exp(-mean(row.h))) * mean(map(log, row.p)) for row in w.demonstrations)
    return imitated + srft_offline(w) + mean(weight(row) * mean(map(log, row.p)) for row in w.rollouts)


def _reinforced(w: World, question: Sequence[Row]) -> Expr:
    return mean(a * total(row.ratios) / LENGTH for row, a in centred(w, question))


def _imitated(question: Sequence[Row]) -> Expr:
    return mean(mean(map(log, row.p)) for row in experts(question))


def hpt(w: World) -> Expr:
    """Per prompt Â·r/L where P > 0, else mean log π_θ of its demonstrations."""
    return mean(_reinforced(w, q) if pass_rate(w, q) > 0 else _imitated(q) for q in w.questions)


def hpt_offpolicy(w: World) -> Expr:
    """As hpt, with R·π_θ/(π_θ + 0.1)/L on the demonstrations."""

    def off(question: Sequence[Row]) -> Expr:
        earned = {row.index: int(succeeded(w, row)) for row in experts(question)}
        return mean(earned[row.index] * total(p / (p + SHAPING) for p in row.p) / LENGTH for row in experts(question))

    return mean(_reinforced(w, q) if pass_rate(w, q) > 0 else off(q) for q in w.questions)


def hpt_soft(w: World) -> Expr:
    """Per prompt α(P)·Â·r/L + β(P)·mean log π_θ of its demonstrations; α, β given at 0, 1, ... 4 of 7 successes."""

    def between(rate: Rational, table: Sequence[str]) -> Rational:
        place = min(7 * rate, Rational(4))
        below = min(int(place), 3)
        low, high = Rational(table[below]), Rational(table[below + 1])
        return low + (place - below) * (high - low)

    def one(question: Sequence[Row]) -> Expr:
        alpha = between(pass_rate(w, question), ("0", "0.125", "0.25", "0.5", "1"))
        beta = between(pass_rate(w, question), ("1", "0.5", "0.25", "0.125", "0"))
        return alpha * _reinforced(w, question) + beta * _imitated(question)

    return mean(one(question) for question in w.questions)


def superrl(w: World) -> Expr:
    """Per prompt the clipped surrogate where P > 0, else mean log π_θ of its demonstrations."""
    return mean(
        surrogate_mean(w, centred(w, q, std=True)) if pass_rate(w, q) > 0 else _imitated(q) for q in w.questions
    )


def _clipped(w: World) -> Expr:
    return token_mean(all_centred(w, std=True), lambda row, t, a: surrogate(w, row, t, a))


def chord_mu(w: World) -> Expr:
    """(1 - μ)·clipped + μ·log-likelihood, both token means."""
    mu = w.variable("mu")
    return (1 - mu) * _clipped(w) + mu * sft(w)


def uft(w: World) -> Expr:
    """Clipped + 0.001·(log-likelihood of demonstrations - k3 + H), all token means."""
    pairs = [(row, Rational(1)) for row in w.rollouts]
    distance = token_mean(pairs, lambda row, t, _: row.f[t] / row.p[t] - log(row.f[t] / row.p[t]) - 1)
    entropy = token_mean(pairs, lambda row, t, _: row.h[t])
    return _clipped(w) + Rational("0.001") * (sft(w) - distance + entropy)


def chord_phi(w: World) -> Expr:
    """As chord_mu, with μ = 0.1 and sg[π_θ(1 - π_θ)] on each demonstration token."""
    phi = expert_mean(w, lambda row, t: w.sg(row.p[t] * (1 - row.p[t])) * log(row.p[t]))
    return Rational("0.9") * _clipped(w) + Rational("0.1") * phi


def gac(w: World) -> Expr:
    """As chord_phi, with a variable μ."""
    mu = w.variable("mu")
    phi = expert_mean(w, lambda row, t: w.sg(row.p[t] * (1 - row.p[t])) * log(row.p[t]))
    return (1 - mu) * _clipped(w) + mu * phi


def amft(w: World) -> Expr:
    """(1 - μ)·clipped with whitened GAE + μ·log-likelihood."""
    mu = w.variable("mu")
    earned = {row.index: [*[Rational(0)] * (len(row) - 1), row.reward] for row in w.rollouts}
    return (1 - mu) * clipped_white(w, {row.index: gae(row, earned[row.index]) for row in w.rollouts}) + mu * sft(w)
