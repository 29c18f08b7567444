"""The objectives that learn from demonstrations and rollouts together, as their papers or their code print them.

Plain loops; nothing here uses upge. Each takes a `Sample` (see policy.py) and returns a scalar to be minimised, whose
autograd gradient is the reference. sg is `.detach()`. Degenerate batches are given the obvious reading: an empty sum is
0, the mean of nothing is 0, a lone response is no better than its group.
"""

from __future__ import annotations

import math
import statistics

import torch

from tests.textbook import success

LENGTH = 1024  # the divisor in place of a response's own length, outside a run
GAMMA = 0.1  # of the shaping p / (p + gamma)
BETA = 0.1  # of the shaping r / (r + beta) of the ratio on replayed rollouts


def split(question):
    """The rollouts of a question and its demonstrations."""
    return [r for r in question if not r["demo"]], [r for r in question if r["demo"]]


def mean(values):
    return values.sum() / max(1, len(values))


def average(losses, s):
    """The mean of some losses; a zero that autograd knows where there is none."""
    nothing = sum(r["logp"].sum() for r in s.rows) * 0.0
    return nothing + sum(losses) / max(1, len(losses))


def relative(members, std):
    """(response, reward - mean, over the unbiased standard deviation if `std`) for each of `members`."""
    rewards = [r["reward"] for r in members]
    if len(set(rewards)) < 2:
        return [(r, 0.0) for r in members]
    scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
    return [(r, (r["reward"] - statistics.fmean(rewards)) / scale) for r in members]


def pass_rate(question):
    own = split(question)[0]
    return sum(success(r) for r in own) / len(own)


def ratio(r):
    return torch.exp(r["logp"] - r["behavior"])


def clipped(r, advantage, bound=0.2):
    return torch.minimum(ratio(r) * advantage, ratio(r).clamp(1 - bound, 1 + bound) * advantage)


def token_mean(pairs, s):
    """(per-token objectives) → minus their mean over all tokens."""
    tokens = [t for objective in pairs for t in objective]
    return -average(tokens, s)


def supervised(s):
    """Maximum likelihood on demonstrations, mean over all their tokens."""
    return token_mean([r["logp"] for r in s.rows if r["demo"]], s)


def grouped(s):
    """Clipped objective with the advantage over the standard deviation, mean over all rollout tokens."""
    return token_mean([clipped(r, a) for q in s.questions for r, a in relative(split(q)[0], std=True)], s)


# A demonstration in each group.


def luffy(s):
    losses = []
    for question in s.questions:
        for r, a in relative(question, std=False):
            p = r["logp"].exp()
            objective = p / (p + GAMMA) if r["demo"] else ratio(r)
            losses.append(-(a * objective).sum() / LENGTH)
    return average(losses, s)


def exgrpo(s):
    losses = []
    for question in s.questions:
        for r, a in relative(split(question)[0], std=False):
            x = ratio(r)
            losses.append(-(a * (x / (x + BETA) if r["replayed"] else x)).sum() / LENGTH)
    return average(losses, s)


def uft(s):
    """Hints are imitated, and what follows them is reinforced, with a KL to the reference policy and an entropy bonus.

    A token is shown if it comes from a demonstration.
    """
    rl, distances, entropies = [], [], []
    for question in s.questions:
        for r, a in relative(split(question)[0], std=True):
            own = ~r["shown"]
            log_x = (r["reference"] - r["logp"])[own]
            rl.append(clipped(r, a)[own])
            distances.append(-(torch.exp(log_x) - log_x - 1))
            entropies.append(r["entropy"][own])
    hints = [r["logp"][r["shown"]] for r in s.rows]
    return token_mean(rl, s) + 0.001 * sum(token_mean(part, s) for part in (hints, distances, entropies))


def prefix_rft(s):
    """A rollout counts among those that begin alike; what it begins with, among those that begin with nothing."""
    losses = []
    for question in s.questions:
        plain, guided = ([r for r in question if bool(r["shown"].any()) == is_guided] for is_guided in (False, True))
        for members in (plain, guided):
            for r, a in relative(members, std=False):
                losses.append(-dual_clipped(r, a)[~r["shown"]].sum() / LENGTH)
        for r in guided:
            a = (r["reward"] - statistics.fmean(p["reward"] for p in plain)) / len(guided) if plain else 0.0
            shown = r["shown"].nonzero()[:, 0].tolist()
            by_entropy = sorted(shown, key=lambda t: float(r["entropy"][t].detach()))
            uncertain = by_entropy[int(len(shown) * 0.8) :]
            losses.append(-dual_clipped(r, a)[uncertain].sum() / LENGTH)
    return sum(losses, 0.0 * sum(r["logp"].sum() for r in s.rows)) / max(1, len(s.rows))


def dual_clipped(r, advantage, most=3.0):
    inner = clipped(r, advantage)
    return inner if advantage >= 0 else torch.maximum(inner, torch.full_like(inner, most * advantage))


def rl_plus(s):
    losses = []
    for question in s.questions:
        for r, a in relative(question, std=False):
            if r["demo"]:
                p, old = r["logp"].exp(), r["behavior"].exp()
                omega = (old + 1) / 2
                objective = 2 * p / (old + omega) * torch.sqrt(1 - p.detach())
            else:
                objective = ratio(r)
            losses.append(-(a * objective).sum() / LENGTH)
    return average(losses, s)


def srft(s):
    """Entropies detached, as the paper's stop-gradient says."""
    imitated, offline, positive, negative = [], [], [], []
    for question in s.questions:
        for r, a in relative(question, std=True):
            entropy = mean(r["entropy"].detach())
            if r["demo"]:
                imitated.append(-0.5 * torch.exp(-entropy) * mean(r["logp"]))
                offline.append(-a * mean(r["logp"].exp()))
            else:
                won = float(success(r))
                positive.append(-won * 0.1 * torch.exp(entropy) * mean(r["logp"]))
                negative.append((1 - won) * mean(r["logp"]))
    return sum(average(part, s) for part in (imitated, offline, positive, negative))


# A choice, or a balance, per question.


def imitate(experts):
    """-(1/|τ*|) Σ_t log π(τ*_t), averaged over the demonstrations of a question."""
    return -sum(mean(r["logp"]) for r in experts) / len(experts)


def reinforce_question(own):
    """-(1/n) Σ_i (1/length) Σ_t Â·r without clip and standard deviation."""
    return -sum((ratio(r) * a).sum() for r, a in relative(own, std=False)) / len(own) / LENGTH


def hpt_soft(s):
    """The table by successes among seven, straight lines between its points."""
    alphas, betas = [0, 0.125, 0.25, 0.5, 1, 1, 1, 1], [1, 0.5, 0.25, 0.125, 0, 0, 0, 0]
    losses = []
    for question in s.questions:
        own, experts = split(question)
        place = 7 * pass_rate(question)
        left = min(6, int(place + 1e-9))
        alpha, beta = (t[left] + (place - left) * (t[left + 1] - t[left]) for t in (alphas, betas))
        if place > 1e-9 or experts:
            losses.append(alpha * reinforce_question(own) + (beta * imitate(experts) if experts else 0.0))
    return average(losses, s)


def hpt_offpolicy(s):
    losses = []
    for question in s.questions:
        own, experts = split(question)
        if pass_rate(question) > 0:
            losses.append(reinforce_question(own))
        elif experts:
            shaped = [r["reward"] * (r["logp"].exp() / (r["logp"].exp() + GAMMA)).sum() for r in experts]
            losses.append(-sum(shaped) / len(experts) / LENGTH)
    return average(losses, s)


def superrl(s):
    losses = []
    for question in s.questions:
        own, experts = split(question)
        if max(r["reward"] for r in own) > 0:
            losses.append(-sum(mean(clipped(r, a)) for r, a in relative(own, std=True)) / len(own))
        elif experts:
            losses.append(imitate(experts))
    return average(losses, s)


# A balance that follows the step.


def chord_mu(s, decay=200, peak=0.9, end=0.05):
    share = min(s.batch.step, decay) / decay
    mu = end + (peak - end) * (1 + math.cos(math.pi * share)) / 2
    return (1 - mu) * grouped(s) + mu * supervised(s)


def gac(s, mu=0.5):
    """At the μ that it starts from."""
    return chord_phi(s, mu)


def chord_phi(s, mu=0.1):
    undecided = []
    for r in s.rows:
        if r["demo"]:
            p = r["logp"].detach().exp()
            undecided.append(p * (1 - p) * r["logp"])
    return (1 - mu) * grouped(s) + mu * token_mean(undecided, s)


def advantages_of_critic(r, lam=0.95):
    """Generalised advantage estimation with discount 1, backwards from the reward at the last token."""
    values = [*r["values"].tolist(), 0.0]
    results, following = [], 0.0
    for t in reversed(range(len(values) - 1)):
        reward = r["reward"] if t == len(values) - 2 else 0.0
        following = reward + values[t + 1] - values[t] + lam * following
        results.insert(0, following)
    return results


def amft(s, mu=0.8):
    """At the μ that it starts from; the policy's part, the critic has its own loss."""
    own = [r for r in s.rows if not r["demo"]]
    raw = [advantages_of_critic(r) for r in own]
    flat = [a for row in raw for a in row]
    centre = statistics.fmean(flat) if flat else 0.0
    scale = math.sqrt((statistics.variance(flat) if len(flat) > 1 else 0.0) + 1e-8)
    objectives = []
    for r, row in zip(own, raw, strict=True):
        white = torch.tensor([(a - centre) / scale for a in row], dtype=r["logp"].dtype)
        objectives.append(clipped(r, white))
    return (1 - mu) * token_mean(objectives, s) + mu * supervised(s)


def amft_values(s, values, clip=0.2):
    """The critic's loss at `values` [B, T], the values before the update being those of the sample."""
    losses = []
    for i, r in enumerate(s.rows):
        if not r["demo"]:
            for t, (a, old) in enumerate(zip(advantages_of_critic(r), r["values"].tolist(), strict=True)):
                value, target = values[i, t], a + old
                held = torch.clamp(value, old - clip, old + clip)
                losses.append(torch.maximum((value - target) ** 2, (held - target) ** 2) / 2)
    return sum(losses) / len(losses)


def relift(s):
    """The step's own update; the interleaved update's is maximum likelihood."""
    losses = [-(ratio(r) * a).sum() / LENGTH for q in s.questions for r, a in relative(split(q)[0], std=False)]
    return average(losses, s)
