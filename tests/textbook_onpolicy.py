"""The objectives that learn from rollouts alone, from demonstrations alone or from pairs, as their papers print them.

Plain loops over questions, responses and tokens; nothing here uses upge. Each takes a `Sample` (see policy.py) and
returns a scalar to be minimised, whose autograd gradient is the reference; what a paper holds fixed is `.detach()`ed.
A lone response is no better than its group, and the mean of nothing is 0.
"""

from __future__ import annotations

import math
import statistics

import torch

from tests.textbook import average, centred, clipped, over, rollouts, success

# Demonstrations alone.


def dft(s):
    total, count = 0.0, 0
    for r in s.rows:
        if r["demo"]:
            total, count = total + (r["logp"].exp().detach() * r["logp"]).sum(), count + len(r["logp"])
    return -over(total, count)


def iw_sft(s, low=0.2, high=1.8):
    total, count = 0.0, 0
    for r in s.rows:
        if r["demo"]:
            weight = (r["logp"] - r["reference"]).exp().detach().clamp(low, high)
            total, count = total + (weight * r["logp"]).sum(), count + len(r["logp"])
    return -over(total, count)


def iw_sft_sequence(s, power=2.0, high=16.0):
    total, count = 0.0, 0
    for r in s.rows:
        if r["demo"]:
            weight = torch.exp(power * average(r["logp"] - r["reference"])).detach().clamp(0, high)
            total, count = total + weight * r["logp"].sum(), count + len(r["logp"])
    return -over(total, count)


def offline_rl(s):
    total, learned = 0.0, 0
    for question in s.questions:
        experts = [(r, a) for r, a in centred(question, std=True, union=True) if r["demo"]]
        if experts:
            total += sum(average(r["logp"].exp() * a) for r, a in experts) / len(experts)
            learned += 1
    return -over(total, learned)


# Rewards that add up over time.


def token_rewards(r, kl=0.001):
    """The reward at the last token, and at every token -kl·log(π_old/π_0)."""
    rewards = [-kl * float(b - f) for b, f in zip(r["behavior"], r["reference"], strict=True)]
    if rewards:
        rewards[-1] += r["reward"]
    return rewards


def whitened(rows):
    """Numbers per token with their mean taken off, over their deviation, all rows together."""
    flat = [x for row in rows for x in row]
    centre, scale = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    return [torch.tensor([(x - centre) / scale for x in row], dtype=torch.float64) for row in rows]


def clipped_token_mean(rows, advantages):
    count = sum(len(r["logp"]) for r in rows)
    return -sum(clipped(r, a).sum() for r, a in zip(rows, advantages, strict=True)) / count


def reinforce_plus_plus(s):
    rows = [r for r in s.rows if not r["demo"]]
    rewards = [token_rewards(r) for r in rows]
    returns = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
    return clipped_token_mean(rows, whitened(returns))


def spo(s):
    """The reward over what is remembered of the prompt, whitened over trajectories, with a dual clip."""
    rows = [r for r in s.rows if not r["demo"]]
    apart = [r["reward"] - r["prompt_value"] for r in rows if len(r["logp"])]
    centre, scale = statistics.fmean(apart), math.sqrt(statistics.variance(apart) + 1e-8)
    total = 0.0
    for r in rows:
        a = (r["reward"] - r["prompt_value"] - centre) / scale
        objective = clipped(r, a, 0.2, 0.28)
        total = total + (torch.maximum(objective, torch.full_like(objective, 10 * a)) if a < 0 else objective).sum()
    return -total / sum(len(r["logp"]) for r in rows)


def critics_advantages(r, lam=0.95):
    """Σ_k λ^k δ_{t+k} with discount 1, each sum written out."""
    rewards, values = token_rewards(r), [*r["values"].tolist(), 0.0]
    deltas = [rewards[t] + values[t + 1] - values[t] for t in range(len(rewards))]
    return [sum(lam ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def ppo(s):
    rows = [r for r in s.rows if not r["demo"]]
    return clipped_token_mean(rows, whitened([critics_advantages(r) for r in rows]))


def ppo_values(s, values, clip=0.2):
    """The critic's loss at `values` [B, T], the values before the update being those of the sample."""
    total, count = 0.0, 0
    for i, r in enumerate(s.rows):
        if r["demo"]:
            continue
        for t, (a, old) in enumerate(zip(critics_advantages(r), r["values"], strict=True)):
            target, new = a + old, values[i, t]
            near = old + (new - old).clamp(-clip, clip)
            total, count = total + 0.5 * torch.maximum((new - target) ** 2, (near - target) ** 2), count + 1
    return total / count


# Groups.


def rloo(s):
    terms = []
    for question in s.questions:
        group = rollouts(question)
        for i, r in enumerate(group):
            others = [o["reward"] for j, o in enumerate(group) if j != i]
            advantage = r["reward"] - statistics.fmean(others) if others else 0.0
            terms.append(advantage * r["logp"].sum())
    return -sum(terms) / len(terms)


def dapo(s, limit=1024, buffer=0.2, penalty=0.5):
    """Only questions that are neither solved nor failed altogether; the last `buffer` of the limit costs reward, as in
    Eq. 13, whose -1 goes with rewards of 1 and -1: half of it where they are 1 and 0."""
    cache = buffer * limit
    total, count = 0.0, 0
    for question in s.questions:
        group = rollouts(question)
        if not 0 < sum(success(r) for r in group) < len(group):
            continue
        shaped = []
        for r in group:
            length = len(r["logp"])
            fine = 0.0 if length <= limit - cache else (limit - cache - length) / cache if length <= limit else -1.0
            shaped.append(r["reward"] + penalty * fine)
        mean, scale = statistics.fmean(shaped), statistics.stdev(shaped) + 1e-6
        for r, reward in zip(group, shaped, strict=True):
            total, count = total + clipped(r, (reward - mean) / scale, 0.2, 0.28).sum(), count + len(r["logp"])
    return -over(total, count)


def cispo(s, high=5.0):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question, std=True):
            weight = torch.exp(r["logp"] - r["behavior"]).detach().clamp(max=high)
            total, count = total + (weight * a * r["logp"]).sum(), count + len(r["logp"])
    return -total / count


def per_question(s, objective):
    """Minus the mean over questions of the mean over their responses, each with its standardised advantage."""
    total = 0.0
    for question in s.questions:
        group = centred(question, std=True)
        total += sum(objective(r, a) for r, a in group) / len(group)
    return -total / len(s.questions)


def gspo(s, low=3e-4, high=4e-4):
    def objective(r, a):
        ratio = torch.exp(average(r["logp"] - r["behavior"]))
        return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)

    return per_question(s, objective)


def sapo(s, positive=1.0, negative=1.05):
    def objective(r, a):
        ratio, tau = torch.exp(r["logp"] - r["behavior"]), positive if a > 0 else negative
        # Saturated, the sigmoid itself differentiates to 0 by rounding; its logarithm does not.
        return average(4 / tau * torch.nn.functional.logsigmoid(tau * (ratio - 1)).exp() * a)

    return per_question(s, objective)


def gmpo(s, bound=0.4):
    """sign(Â)·|Â|·(Π_t min(r^sign, clip(r, e^-bound, e^bound)^sign)^sign)^(1/|τ|), in logarithms as in its code."""

    def objective(r, a):
        sign = 1.0 if a > 0 else -1.0
        log_ratio = sign * (r["logp"] - r["behavior"])
        return a * torch.exp(average(sign * torch.minimum(log_ratio, log_ratio.clamp(-bound, bound))))

    return per_question(s, objective)


def opmd(s, temperature=1.0):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            total, count = total + a * r["logp"].sum(), count + len(r["logp"])
    return -total / count / (1 + temperature)


def asymre(s, shift=-0.1):
    total, count = 0.0, 0
    for question in s.questions:
        group = rollouts(question)
        baseline = statistics.fmean(r["reward"] for r in group) + shift
        for r in group:
            total, count = total + (r["reward"] - baseline) * r["logp"].sum(), count + len(r["logp"])
    return -total / count


def gdpo(s, over="rollouts"):
    """Each reward normalized in its group, the weighted sum normalized over the batch; without names, one reward."""
    weights = s.batch.reward_weights if s.batch.named_rewards else {"": 1.0}
    sums = {r["index"]: 0.0 for r in s.rows if not r["demo"]}
    for name, weight in weights.items():
        for question in s.questions:
            group = rollouts(question)
            values = [r["rewards"][name] if name else r["reward"] for r in group]
            if len(set(values)) < 2:
                continue
            scale = statistics.stdev(values) + 1e-6
            for r, value in zip(group, values, strict=True):
                sums[r["index"]] += weight * (value - statistics.fmean(values)) / scale
    members = [sums[r["index"]] for r in s.rows if not r["demo"] for _ in r["logp"][: None if over == "tokens" else 1]]
    if len(members) < 2:
        return 0.0 * s.logits.sum()
    centre, scale = statistics.fmean(members), math.sqrt(statistics.variance(members) + 1e-8)
    if abs(centre) < 1e-15:  # rounding: the numbers of each question add up to 0
        centre = 0.0
    total = 0.0
    for question in s.questions:
        group = rollouts(question)
        total += sum(average(clipped(r, (sums[r["index"]] - centre) / scale)) for r in group) / len(group)
    return -total / len(s.questions)


def maxrl(s):
    total = 0.0
    for question in s.questions:
        group = rollouts(question)
        mean = statistics.fmean(r["reward"] for r in group)
        if mean > 0:
            total += sum(average(clipped(r, (r["reward"] - mean) / mean)) for r in group) / len(group)
    return -total / len(s.questions)


def dppo(s, bound=0.15, high=20.0):
    responses = [pair for question in s.questions for pair in centred(question)]
    total = 0.0
    for r, a in responses:
        moved = (r["logp"].exp() - r["behavior"].exp()).detach()
        kept = (moved <= bound) if a > 0 else (moved >= -bound)
        weight = torch.exp(r["logp"] - r["behavior"]).detach().clamp(max=high)
        total += (kept * weight * a * r["logp"]).sum() / 1024
    return -total / len(responses)


def vespo(s, positive=(2.0, 3.0), negative=(3.0, 2.0)):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question, std=True):
            k, rate = positive if a >= 0 else negative
            log_weight = (r["logp"] - r["behavior"]).sum().detach()
            weight = torch.exp(rate + k * log_weight - rate * torch.exp(log_weight))
            total, count = total + weight * a * r["logp"].sum(), count + len(r["logp"])
    return -total / count


def luspo(s, low=2e-3, high=2.5e-3):
    def objective(r, a):
        ratio = torch.exp(average(r["logp"] - r["behavior"]))
        return len(r["logp"]) * torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)

    return per_question(s, objective)


def dro(s, beta=0.05):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            penalty = 0.5 * beta * (r["logp"] - r["behavior"]) ** 2
            total, count = total + (a * r["logp"] - penalty).sum(), count + len(r["logp"])
    return -total / count


def fipo(s, half_life=32.0, high=1.2, outlier=10.0, safe=4.0):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question, std=True):
            logs = (r["logp"] - r["behavior"]).tolist()
            n, counted = len(logs), [0.0 if math.exp(x) > outlier else x for x in logs]
            objective = clipped(r, a, 0.2, 0.28)
            if a < 0:
                objective = torch.maximum(objective, torch.full_like(objective, outlier * a))
            for t in range(n):
                future = sum(0.5 ** ((k - t) / half_life) * counted[k] for k in range(t, n))
                factor = min(max(math.exp(future), 1.0), high)
                if a < 0 and math.exp(logs[t]) > safe:
                    factor = 1.0
                total = total + factor * objective[t]
            count += n
    return -total / count


def real(s, temperature=0.5):
    total = 0.0
    for question in s.questions:
        logits = [(average(r["logp"] - r["behavior"]) / temperature, success(r)) for r in rollouts(question)]
        right, wrong = [-x for x, won in logits if won], [x for x, won in logits if not won]
        if right and wrong:
            anchor = torch.zeros((), dtype=torch.float64)
            total += sum(torch.logsumexp(torch.stack([anchor, *group]), dim=0) for group in (right, wrong))
    return total / len(s.questions)


def token_key(*identity):
    """SplitMix64 over seed, step, trajectory and position, as a signed number: the one with the smallest is drawn."""
    state, mask = 0, (1 << 64) - 1
    for number in identity:
        z = ((state ^ number) + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state - (1 << 64) if state >> 63 else state


def with_covariance(s):
    """(row, t, A, cov) of each rollout token."""
    tokens = [
        (r, t, a) for question in s.questions for r, a in centred(question, std=True) for t in range(len(r["logp"]))
    ]
    logs = [float(r["logp"][t].detach()) for r, t, _ in tokens]
    level, centre = math.fsum(logs) / len(logs), math.fsum(a for _, _, a in tokens) / len(tokens)
    return [(r, t, a, (x - level) * (a - centre)) for (r, t, a), x in zip(tokens, logs, strict=True)]


def clip_cov(s, share=2e-4, low=1.0, high=5.0, seed=0, clip=(1.0, 1.0)):
    tokens = with_covariance(s)
    ratios = [torch.exp(r["logp"][t] - r["behavior"][t]) for r, t, _, _ in tokens]
    plain = [ratio * a for (_, _, a, _), ratio in zip(tokens, ratios, strict=True)]
    bounded = [r.clamp(1 - clip[0], 1 + clip[1]) * a for (_, _, a, _), r in zip(tokens, ratios, strict=True)]
    eligible = [i for i, (_, _, _, cov) in enumerate(tokens) if low < cov < high and bool(plain[i] <= bounded[i])]
    eligible.sort(key=lambda i: token_key(seed, 7, tokens[i][0]["index"], tokens[i][1] + 1))
    drawn = set(eligible[: max(int(share * len(tokens)), 1)])
    kept = [torch.minimum(plain[i], bounded[i]) for i in range(len(tokens)) if i not in drawn]
    return -sum(kept) / len(tokens)


def kl_cov(s, share=2e-3, beta=1.0):
    tokens = with_covariance(s)
    key = lambda r, t, _, cov: (-cov, token_key(0, 7, r["index"], t + 1))  # noqa: E731
    ranked = sorted(range(len(tokens)), key=lambda i: key(*tokens[i]))
    chosen, total = set(ranked[: max(int(share * len(tokens)), 1)]), 0.0
    for i, (r, t, a, _) in enumerate(tokens):
        log_ratio = r["logp"][t] - r["behavior"][t]
        total = total + torch.exp(log_ratio) * a - (beta * log_ratio.abs() if i in chosen else 0.0)
    return -total / len(tokens)


# Pairs.


def dpo(s, beta=0.1):
    losses = []
    for question in s.questions:
        chosen, rejected = ([r for r in question if r["preference"] == sign] for sign in (1, -1))
        if chosen:
            (win,), (lose,) = chosen, rejected
            margin = (win["logp"] - win["reference"]).sum() - (lose["logp"] - lose["reference"]).sum()
            losses.append(-torch.nn.functional.logsigmoid(beta * margin))
    return sum(losses) / len(losses)
