"""Objectives on rollouts: on-policy, off-policy, preference pairs. Each is J, to be maximized.

The pieces come first: groups, advantages, surrogates, means. Nothing here uses the algorithms' parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sympy import Expr, Rational, exp, log, sqrt

from upge.theory.symbolic import Row, World, mean, product, total

#: The response limit that the files' constants divide by outside a run.
LENGTH = 1024
#: The coefficient of a KL or entropy penalty.
COEFFICIENT = Rational("0.001")
SHAPING = Rational(1, 10)
#: The response limit in proofs of overlong shaping, and the number of tokens before it in which the penalty grows.
LIMIT, BUFFER = 4, 2
#: Rows with their advantages.
Pairs = list[tuple[Row, Expr]]
Reward = Callable[[Row], Expr]


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
    w: World, question: Sequence[Row], std: bool = False, union: bool = False, reward: Reward = lambda row: row.reward
) -> Pairs:
    """Rows with R - mean R, divided by std R + 1e-6 with `std`; with `union` the group includes demonstrations."""
    members = list(question) if union else own(question)
    average = mean(map(reward, members))
    scale = Rational(1)
    if std:
        scale = sqrt(total((reward(row) - average) ** 2 for row in members) / (len(members) - 1)) + Rational("1e-6")
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


def fixed_length(pairs: Pairs, value: Callable[[Row, int, Expr], Expr]) -> Expr:
    """The mean over responses of Σ_t value(row, t, A)/L."""
    return mean(total(value(row, t, a) for t in range(len(row))) / LENGTH for row, a in pairs)


def question_mean(w: World, value: Callable[[Row, Expr], Expr]) -> Expr:
    """The mean over prompts of the mean over responses of value(row, A), A divided by the standard deviation."""
    return mean(mean(value(row, a) for row, a in centred(w, question, std=True)) for question in w.questions)


def token_mean(pairs: Pairs, value: Callable[[Row, int, Expr], Expr]) -> Expr:
    """Σ value(row, t, A) over all tokens, divided by their number."""
    return total(value(row, t, a) for row, a in pairs for t in range(len(row))) / sum(len(row) for row, _ in pairs)


def expert_mean(w: World, value: Callable[[Row, int], Expr]) -> Expr:
    """Σ value(row, t) over all tokens of demonstrations, divided by their number."""
    return token_mean([(row, Rational(1)) for row in w.demonstrations], lambda row, t, _: value(row, t))


def likelihood(row: Row) -> Expr:
    """log π_θ of a response."""
    return total(map(log, row.p))


def punished(row: Row) -> Expr:
    """R - 0.5·clip((|τ| - (limit - buffer))/buffer, 0, 1)."""
    return row.reward - Rational("0.5") * max(0, min(1, Rational(len(row) - (LIMIT - BUFFER), BUFFER)))


def paid(row: Row) -> list[Expr]:
    """Reward per token: the outcome's at the end, minus 0.001·log(π_old/π_0) everywhere."""
    penalties = [COEFFICIENT * (log(q) - log(f)) for q, f in zip(row.q, row.f, strict=True)]
    return [(row.reward if t == len(row) - 1 else 0) - penalty for t, penalty in enumerate(penalties)]


def gae(row: Row, rewards: Sequence[Expr]) -> list[Expr]:
    """Σ_{k≥t} 0.95^{k-t}·(r_k + V_{k+1} - V_k), no discount."""
    deltas = [r + (row.v[t + 1] if t + 1 < len(row) else 0) - row.v[t] for t, r in enumerate(rewards)]
    return [total(Rational("0.95") ** (k - t) * deltas[k] for k in range(t, len(row))) for t in range(len(row))]


def clipped_white(w: World, values: Mapping[int, Sequence[Expr]]) -> Expr:
    """The token mean of the clipped surrogate with the whitened advantages (A - mean A)/√(var A + 1e-8).

    `values` maps a row's index to A of each token; mean and variance are over all rollout tokens.
    """
    everything = [a for row in w.rollouts for a in values[row.index]]
    centre = mean(everything)
    scale = sqrt(total((a - centre) ** 2 for a in everything) / (len(everything) - 1) + Rational(1, 10**8))

    def value(row: Row, t: int, _: Expr) -> Expr:
        return surrogate(w, row, t, w.advantage(row, (values[row.index][t] - centre) / scale, t))

    return token_mean([(row, Rational(1)) for row in w.rollouts], value)


# On-policy, off-policy, preference pairs.


def reinforce(w: World) -> Expr:
    """(1/N) Σ (1/L) Σ_t ±log π_θ."""
    sign = {row.index: w.advantage(row, Rational(1 if succeeded(w, row) else -1)) for row in w.rollouts}
    return mean(sign[row.index] * likelihood(row) / LENGTH for row in w.rollouts)


def reinforce_plus_plus(w: World) -> Expr:
    """Clipped, with the whitened sum of rewards from a token on."""
    return clipped_white(w, {row.index: [total(paid(row)[t:]) for t in range(len(row))] for row in w.rollouts})


def spo(w: World) -> Expr:
    """Clipped at 1.28 and, where Â < 0, dually at 10; token mean. Â = R - v, whitened over the rollouts."""
    apart = {row.index: row.reward - row.u for row in w.rollouts}
    centre = mean(apart.values())
    scale = sqrt(total((a - centre) ** 2 for a in apart.values()) / (len(apart) - 1) + Rational(1, 10**8))

    def one(row: Row, t: int, a: Expr) -> Expr:
        inner = surrogate(w, row, t, a, high="0.28")
        return w.maximum(inner, 10 * a) if w.less(a, 0) else inner

    return token_mean([(row, w.advantage(row, (apart[row.index] - centre) / scale)) for row in w.rollouts], one)


def rloo(w: World) -> Expr:
    """(1/N) Σ (R - mean of the others)·log π_θ(τ)."""

    def one(row: Row, group: Sequence[Row]) -> Expr:
        others = mean(other.reward for other in group if other is not row)
        return w.advantage(row, row.reward - others) * likelihood(row)

    return mean(one(row, own(question)) for question in w.questions for row in own(question))


def ppo(w: World) -> Expr:
    """Clipped, with whitened GAE of rewards that include a KL penalty."""
    return clipped_white(w, {row.index: gae(row, paid(row)) for row in w.rollouts})


def grpo(w: World) -> Expr:
    """Clipped; mean over tokens, then responses, then prompts."""
    return mean(surrogate_mean(w, centred(w, question, std=True)) for question in w.questions)


def gdpo(w: World) -> Expr:
    """As grpo, with Σ_k w_k·Â of two rewards, whitened over the rollouts of all prompts."""
    sums: dict[int, Expr] = {row.index: Rational(0) for row in w.rollouts}
    for name, weight in (("first", Rational(1)), ("second", Rational(1, 2))):
        for question in w.questions:
            group = [(row, row.rewards[name]) for row in own(question)]
            average = mean(reward for _, reward in group)
            deviation = sqrt(total((reward - average) ** 2 for _, reward in group) / (len(group) - 1))
            for row, reward in group:
                sums[row.index] += weight * (reward - average) / (deviation + Rational("1e-6"))
    centre = mean(sums.values())
    scale = sqrt(total((a - centre) ** 2 for a in sums.values()) / (len(sums) - 1) + Rational(1, 10**8))
    white = {row.index: w.advantage(row, (sums[row.index] - centre) / scale) for row in w.rollouts}
    return mean(surrogate_mean(w, [(row, white[row.index]) for row in own(question)]) for question in w.questions)


def dr_grpo(w: World) -> Expr:
    """Clipped, Â without the standard deviation, a constant length."""
    return fixed_length(all_centred(w), lambda row, t, a: surrogate(w, row, t, a))


def dapo(w: World) -> Expr:
    """Clipped at 1.28, token mean, prompts whose responses differ, rewards that fall near the limit, by 0.5."""
    pairs = [pair for question in all_different(w) for pair in centred(w, question, std=True, reward=punished)]
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

    return question_mean(w, one)


def sapo(w: World) -> Expr:
    """(4/τ)·σ(τ(r - 1))·Â."""

    def one(row: Row, t: int, a: Expr) -> Expr:
        tau = Rational(1) if w.less(0, a) else Rational("1.05")
        return 4 / tau / (1 + exp(-tau * (row.p[t] / row.q[t] - 1))) * a

    return question_mean(w, lambda row, a: mean(one(row, t, a) for t in range(len(row))))


def gmpo(w: World) -> Expr:
    """Â·exp(mean_t of log r, bounded on one side)."""
    bound = Rational("0.4")

    def one(row: Row, a: Expr) -> Expr:
        up = w.less(0, a)
        logs = [w.minimum(log(r), bound) if up else w.maximum(log(r), -bound) for r in row.ratios]
        return a * exp(mean(logs))

    return question_mean(w, one)


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
    """Mean over pairs of log σ(0.1·[log(π_θ/π_0)(chosen) - log(π_θ/π_0)(rejected)])."""
    gains = []
    for question in w.questions:
        (win,), (lose,) = ([row for row in question if row.preference == sign] for sign in (1, -1))
        margin = [total(log(p) - log(f) for p, f in zip(row.p, row.f, strict=True)) for row in (win, lose)]
        gains.append(log(1 / (1 + exp(-Rational("0.1") * (margin[0] - margin[1])))))
    return mean(gains)
