"""More objectives on rollouts, of methods from 2025 and 2026. Each is J, to be maximized."""

from __future__ import annotations

from collections.abc import Sequence

from sympy import Expr, Rational, exp, log

from experiments.table1.rollouts import (
    SHAPING,
    Pairs,
    all_centred,
    fixed_length,
    own,
    question_mean,
    succeeded,
    surrogate,
    surrogate_mean,
    token_mean,
)
from upge.theory.symbolic import Row, World, mean, product, total


def maxrl(w: World) -> Expr:
    """grpo with Â = (R - mean R)/mean R, 0 where mean R is not positive."""

    def one(question: Sequence[Row]) -> Expr:
        average = mean(row.reward for row in own(question))
        if not w.less(0, average):
            return Rational(0)
        return surrogate_mean(w, [(row, w.advantage(row, (row.reward - average) / average)) for row in own(question)])

    return mean(map(one, w.questions))


def dppo(w: World) -> Expr:
    """sg[min(r, 20)]·Â·log π_θ over a constant length, where π_θ - π_old is at most 0.15 in the direction of Â."""
    bound = Rational("0.15")

    def one(row: Row, t: int, a: Expr) -> Expr:
        moved = row.p[t] - row.q[t]
        stopped = w.less(bound, moved) if w.less(0, a) else w.less(moved, -bound)
        return 0 if stopped else w.clip(w.sg(row.p[t] / row.q[t]), high=20) * a * log(row.p[t])

    return fixed_length(all_centred(w), one)


def vespo(w: World) -> Expr:
    """Token mean of sg[W^k·e^(λ(1-W))]·Â·log π_θ, W the product of a response's ratios."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        weight = w.sg(product(row.ratios))
        k, rate = (3, 2) if w.less(a, 0) else (2, 3)
        return weight**k * exp(rate * (1 - weight)) * a * log(row.p[t])

    return token_mean(all_centred(w, std=True), one)


def opd(w: World) -> Expr:
    """Token mean of r·sg[log ν/π_θ]."""
    return _distilled(w, Rational(0))


def iw_opd(w: World) -> Expr:
    """The same, each token times 1 + ½·(1 - the share of Σ|Â| that the tokens before it have)."""
    return _distilled(w, Rational(1, 2))


def _distilled(w: World, gamma: Expr) -> Expr:
    def one(row: Row, t: int, _: Expr) -> Expr:
        advantages = [w.sg(log(row.n[k] / row.p[k])) for k in range(len(row))]
        sizes = [w.maximum(a, -a) for a in advantages]
        return row.ratios[t] * advantages[t] * (1 + gamma * (1 - total(sizes[:t]) / total(sizes)))

    return token_mean([(row, Rational(0)) for row in w.rollouts], one)


def luspo(w: World) -> Expr:
    """|τ|·min(s·Â, clip(s)·Â) with s the geometric mean of a response's ratios."""

    def one(row: Row, a: Expr) -> Expr:
        s = product(row.ratios) ** Rational(1, len(row))
        return len(row) * w.minimum(s * a, w.clip(s, 1 - Rational("2e-3"), 1 + Rational("2.5e-3")) * a)

    return question_mean(w, one)


def exgrpo(w: World) -> Expr:
    """Â·r on fresh rollouts, Â·r/(r + 0.1) on replayed ones, r the ratio to the policy that sampled, one divisor."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        r = row.ratios[t]
        return a * (r / (r + SHAPING) if row.is_replayed else r)

    return fixed_length(all_centred(w), one)


def dro(w: World) -> Expr:
    """Token mean of Â·log π_θ - (0.05/2)·log²(π_θ/π_old)."""
    half = Rational("0.025")
    return token_mean(all_centred(w), lambda row, t, a: a * log(row.p[t]) - half * (log(row.p[t]) - log(row.q[t])) ** 2)


def fipo(w: World) -> Expr:
    """dapo's clip with a dual clip at 10, times a factor of 1 to 1.2 from the ratios of the tokens that follow."""

    def factor(row: Row, t: int, a: Expr) -> Expr:
        after = [k for k in range(t, len(row)) if not w.less(10, row.ratios[k])]
        grown = product(w.sg(row.ratios[k]) ** (2 ** Rational(t - k, 32)) for k in after)
        bounded, far = w.clip(grown, 1, Rational("1.2")), w.less(4, row.ratios[t])
        return 1 if far and w.less(a, 0) else bounded

    def one(row: Row, t: int, a: Expr) -> Expr:
        capped, clipped = (
            w.clip(row.ratios[t], *bounds) for bounds in ((None, 10), (Rational("0.8"), Rational("1.28")))
        )
        return factor(row, t, a) * w.minimum(capped * a, clipped * a)

    return token_mean(all_centred(w, std=True), one)


def _covariances(pairs: Pairs) -> list[tuple[Row, int, Expr, Expr]]:
    """(row, t, Â, cov) of each token, cov = (log π_θ - mean log π_θ)·(Â - mean Â) over all tokens."""
    tokens = [(row, t, a) for row, a in pairs for t in range(len(row))]
    level, centre = mean(log(row.p[t]) for row, t, _ in tokens), mean(a for _, _, a in tokens)
    return [(row, t, a, (log(row.p[t]) - level) * (a - centre)) for row, t, a in tokens]


def clip_cov(w: World) -> Expr:
    """Token mean of the surrogate with bounds 0 and 2, without unclipped tokens with 1 < cov < 5."""
    terms = []
    for row, t, a, cov in _covariances(all_centred(w, std=True)):
        clipped = w.less(0, a) and w.less(2, row.ratios[t])
        drawn = not clipped and w.less(1, w.sg(cov)) and w.less(w.sg(cov), 5)
        terms.append(Rational(0) if drawn else surrogate(w, row, t, a, "1", "1"))
    return mean(terms)


def kl_cov(w: World) -> Expr:
    """Token mean of r·Â, minus |log r| for the token with the largest cov."""
    tokens = _covariances(all_centred(w, std=True))
    top = tokens[0]
    for token in tokens[1:]:
        top = token if w.less(w.sg(top[3]), w.sg(token[3])) else top
    gains = [row.ratios[t] * a for row, t, a, _ in tokens]
    distance = log(top[0].p[top[1]]) - log(top[0].q[top[1]])
    return mean(gains) - w.maximum(distance, -distance) / len(tokens)


def real(w: World) -> Expr:
    """Minus the mean over prompts of log(1 + Σ_right e^(-2s)) + log(1 + Σ_wrong e^(2s)), s = mean_t log r."""

    def loss(rows: Sequence[Row], sign: int) -> Expr:
        return log(1 + total(product(row.ratios) ** Rational(-2 * sign, len(row)) for row in rows))

    losses = []
    for question in w.questions:
        right = [row for row in own(question) if succeeded(w, row)]
        wrong = [row for row in own(question) if row not in right]
        losses.append(loss(right, 1) + loss(wrong, -1) if right and wrong else Rational(0))
    return -mean(losses)
