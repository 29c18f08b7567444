"""The pieces of written objectives: groups, advantages, surrogates, means. Nothing here uses the algorithms' parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sympy import Expr, Rational, log, sqrt

from upge.theory.symbolic import Row, World, mean, total

#: The response limit that the files' constants divide by outside a run.
LENGTH = 1024
EPSILON = Rational(1, 10**6)
SHAPING = Rational(1, 10)
#: Rows with their advantages.
Pairs = list[tuple[Row, Expr]]


def own(question: Sequence[Row]) -> list[Row]:
    """The rollouts of a prompt."""
    return [row for row in question if not row.is_demonstration]


def experts(question: Sequence[Row]) -> list[Row]:
    """The demonstrations of a prompt."""
    return [row for row in question if row.is_demonstration]


def succeeded(w: World, row: Row) -> bool:
    """Whether the reward, a symbol here, is above one half."""
    return w.less(Rational(1, 2), row.reward)


def pass_rate(w: World, question: Sequence[Row]) -> Rational:
    """P, the share of successes among the rollouts."""
    return Rational(sum(succeeded(w, row) for row in own(question)), len(own(question)))


def centred(
    w: World,
    question: Sequence[Row],
    std: bool = False,
    union: bool = False,
    reward: Callable[[Row], Expr] = lambda row: row.reward,
) -> Pairs:
    """Rows with R - mean R, divided by std R + 1e-6 with `std`; with `union` the group includes demonstrations."""
    members = list(question) if union else own(question)
    average = mean(map(reward, members))
    scale = sqrt(total((reward(row) - average) ** 2 for row in members) / (len(members) - 1)) + EPSILON if std else 1
    return [(row, w.advantage(row, (reward(row) - average) / scale)) for row in members]


def all_different(w: World) -> list[list[Row]]:
    """The prompts for which some rollouts succeed and some fail."""
    return [question for question in w.questions if 0 < pass_rate(w, question) < 1]


def all_centred(w: World, std: bool = False, union: bool = False) -> Pairs:
    """The rows of `centred` for all prompts."""
    return [pair for question in w.questions for pair in centred(w, question, std, union)]


def surrogate(w: World, row: Row, t: int, a: Expr, low: str = "0.2", high: str = "0.2") -> Expr:
    """min(r·A, clip(r, 1 - low, 1 + high)·A)."""
    r = row.p[t] / row.q[t]
    return w.minimum(r * a, w.clip(r, 1 - Rational(low), 1 + Rational(high)) * a)


def surrogate_mean(w: World, pairs: Pairs) -> Expr:
    """The mean over responses of the mean over tokens of the surrogate."""
    return mean(mean(surrogate(w, row, t, a) for t in range(len(row))) for row, a in pairs)


def token_mean(pairs: Pairs, value: Callable[[Row, int, Expr], Expr]) -> Expr:
    """Σ value(row, t, A) over all tokens, divided by their number."""
    return total(value(row, t, a) for row, a in pairs for t in range(len(row))) / sum(len(row) for row, _ in pairs)


def expert_mean(w: World, value: Callable[[Row, int], Expr]) -> Expr:
    """Σ value(row, t) over all tokens of demonstrations, divided by their number."""
    return token_mean([(row, Rational(1)) for row in w.demonstrations], lambda row, t, _: value(row, t))


def likelihood(row: Row) -> Expr:
    """log π_θ of a response."""
    return total(map(log, row.p))


#: The response limit in proofs of overlong shaping, and the number of tokens before it in which the penalty grows.
LIMIT, BUFFER = 4, 2


def punished(row: Row, penalty: str = "1") -> Expr:
    """R - penalty·clip((|τ| - (limit - buffer))/buffer, 0, 1)."""
    return row.reward - Rational(penalty) * max(0, min(1, Rational(len(row) - (LIMIT - BUFFER), BUFFER)))


def paid(row: Row, coefficient: str = "0.001") -> list[Expr]:
    """Reward per token: the outcome's at the end, minus coefficient·log(π_old/π_frozen) everywhere."""
    penalties = [Rational(coefficient) * (log(q) - log(f)) for q, f in zip(row.q, row.f, strict=True)]
    return [(row.reward if t == len(row) - 1 else 0) - penalty for t, penalty in enumerate(penalties)]


def gae(row: Row, rewards: Sequence[Expr], lam: str = "0.95") -> list[Expr]:
    """Σ_{k≥t} λ^{k-t}·(r_k + V_{k+1} - V_k), no discount."""
    deltas = [r + (row.v[t + 1] if t + 1 < len(row) else 0) - row.v[t] for t, r in enumerate(rewards)]
    return [total(Rational(lam) ** (k - t) * deltas[k] for k in range(t, len(row))) for t in range(len(row))]


def clipped_white(w: World, values: Mapping[int, Sequence[Expr]]) -> Expr:
    """The token mean of the clipped surrogate with the whitened advantages (A - mean A)/√(var A + 1e-8).

    Args:
        w: the world.
        values: row index → A of each token; mean and variance are over all rollout tokens.
    """
    everything = [a for row in w.rollouts for a in values[row.index]]
    centre = mean(everything)
    scale = sqrt(total((a - centre) ** 2 for a in everything) / (len(everything) - 1) + Rational(1, 10**8))

    def value(row: Row, t: int, _: Expr) -> Expr:
        return surrogate(w, row, t, w.advantage(row, (values[row.index][t] - centre) / scale, t))

    return token_mean([(row, Rational(1)) for row in w.rollouts], value)
