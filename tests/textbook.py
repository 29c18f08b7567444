"""The objectives as their papers print them, written out in plain loops; to be minimised.

Nothing here uses upge. Each takes a `Sample` (see policy.py) and returns a scalar whose autograd gradient is the
reference.
"""

from __future__ import annotations

import math
import statistics

import torch

G = 0.1  # the shaping constant of LUFFY


def rollouts(question):
    return [r for r in question if not r["demo"]]


def demos(question):
    return [r for r in question if r["demo"]]


def centred(question, std=False, union=False):
    """Advantage of each rollout of a question (and of its demonstration with `union`), in order."""
    members = question if union else rollouts(question)
    rewards = [r["reward"] for r in members]
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
    return [(r, (r["reward"] - mean) / scale) for r in members]


def clipped(row, advantage, low=0.2, high=0.2):
    ratio = torch.exp(row["logp"] - row["behavior"])
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sft(s):
    rows = [r for r in s.rows if r["demo"]]
    return -sum(r["logp"].sum() for r in rows) / sum(len(r["logp"]) for r in rows)


def reinforce(s):
    rows = [r for r in s.rows if not r["demo"]]
    return -sum((1.0 if r["reward"] == 1 else -1.0) * r["logp"].sum() / 1024 for r in rows) / len(rows)


def grpo(s):
    total = 0.0
    for question in s.questions:
        group = centred(question, std=True)
        total += sum(clipped(r, a).mean() for r, a in group) / len(group)
    return -total / len(s.questions)


def dr_grpo(s):
    terms = [clipped(r, a).sum() / 1024 for question in s.questions for r, a in centred(question)]
    return -sum(terms) / len(terms)


def hpt(s, threshold=0.0):
    total = 0.0
    for question in s.questions:
        group = rollouts(question)
        pass_rate = sum(r["reward"] for r in group) / len(group)
        if pass_rate > threshold:
            ratios = [(torch.exp(r["logp"] - r["behavior"]) * a).sum() for r, a in centred(question)]
            total -= sum(ratios) / len(ratios) / 1024
        else:
            experts = demos(question)
            total -= sum(r["logp"].mean() for r in experts) / len(experts)
    return total / len(s.questions)


def gae_ppo(s, discount=0.9, lam=0.8):
    """PPO with a critic's values, token mean over all rollout tokens."""
    rows = [r for r in s.rows if not r["demo"]]
    total, count = 0.0, 0
    for r in rows:
        n, v = len(r["logp"]), r["values"].tolist()
        deltas = [(r["reward"] if t == n - 1 else discount * v[t + 1]) - v[t] for t in range(n)]
        for t in range(n):
            a = sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, n))
            ratio = torch.exp(r["logp"][t] - r["behavior"][t])
            total += torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        count += n
    return -total / count


def rloo(s):
    terms = []
    for question in s.questions:
        group = rollouts(question)
        for i, r in enumerate(group):
            others = [o["reward"] for j, o in enumerate(group) if j != i]
            terms.append((r["reward"] - statistics.fmean(others)) * r["logp"].sum())
    return -sum(terms) / len(terms)


def gspo(s, low=0.05, high=0.05):
    total = 0.0
    for question in s.questions:
        group = centred(question, std=True)
        for r, a in group:
            ratio = torch.exp((r["logp"] - r["behavior"]).mean())
            total += torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a) / len(group)
    return -total / len(s.questions)


def cispo(s, high=1.2):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question, std=True):
            weight = torch.exp(r["logp"] - r["behavior"]).detach().clamp(max=high)
            total, count = total + (weight * a * r["logp"]).sum(), count + len(r["logp"])
    return -total / count


def luffy(s):
    """Union advantage; importance sampling on rollouts, shaped likelihood over 1 on demonstrations; one divisor."""
    terms = []
    for question in s.questions:
        for r, a in centred(question, std=True, union=True):
            p = r["logp"].exp()
            objective = p / (p + G) if r["demo"] else torch.exp(r["logp"] - r["behavior"])
            terms.append(a * objective.sum() / 1024)
    return -sum(terms) / len(terms)


def srft(s):
    """Four parts, entropies detached: demonstration likelihood, offline reinforcement, signed rollout likelihood."""
    demo = [r for r in s.rows if r["demo"]]
    own = [r for r in s.rows if not r["demo"]]
    loss = -sum((0.5 * torch.exp(-r["entropy"].detach().mean()) * r["logp"]).mean() for r in demo) / len(demo)
    pairs = [(r, a) for q in s.questions for r, a in centred(q, std=True, union=True) if r["demo"]]
    loss = loss - sum((a * r["logp"].exp()).mean() for r, a in pairs) / len(pairs)
    for r in own:
        weight = 0.1 * torch.exp(r["entropy"].detach().mean()) if r["reward"] == 1 else -1.0
        loss = loss - (weight * r["logp"]).mean() / len(own)
    return loss


def dpo(s, beta=0.1):
    total = 0.0
    for question in s.questions:
        (win,) = [r for r in question if r["preference"] == 1]
        (lose,) = [r for r in question if r["preference"] == -1]
        margin = (win["logp"] - win["reference"]).sum() - (lose["logp"] - lose["reference"]).sum()
        total -= torch.nn.functional.logsigmoid(beta * margin)
    return total / (2 * len(s.questions))


def corrected_ppo(s, cap=1.1):
    """PPO's clipped objective times a truncated correction for the sampler's mismatch."""
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            weight = torch.exp(r["behavior"] - r["sampler"]).clamp(max=cap)
            total, count = total + (weight * clipped(r, a)).sum(), count + len(r["logp"])
    return -total / count


def banded(s, low=0.8, high=1.25):
    """Tokens whose trainer/sampler ratio leaves the band are dropped; the others are weighted by π_θ/π_sampler."""
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            mismatch = torch.exp(r["behavior"] - r["sampler"])
            inside = ((mismatch >= low) & (mismatch <= high)).double()
            total += (inside * torch.exp(r["logp"] - r["sampler"]) * a).sum()
            count += len(r["logp"])
    return -total / count


def dual_clip(s, c=1.3):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            objective = clipped(r, a)
            if a < 0:
                objective = torch.maximum(objective, torch.full_like(objective, c * a))
            total, count = total + objective.sum(), count + len(r["logp"])
    return -total / count


def kl_shaped(s, coefficient=0.05):
    total, count = 0.0, 0
    for question in s.questions:
        for r, a in centred(question):
            shaped = a - coefficient * (r["logp"].detach() - r["reference"])
            total, count = total + (torch.exp(r["logp"] - r["behavior"]) * shaped).sum(), count + len(r["logp"])
    return -total / count


def regularised(s, kind, kl=0.02, bonus=0.01):
    """GRPO plus a KL estimator and an entropy bonus, each a token mean over rollouts."""
    rows = [r for r in s.rows if not r["demo"]]
    count = sum(len(r["logp"]) for r in rows)
    loss = grpo(s)
    for r in rows:
        d = r["reference"] - r["logp"]
        penalty = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[kind]
        loss = loss + (kl * penalty - bonus * r["entropy"]).sum() / count
    return loss


def chord(s, step=7, warmup=4, decay=20, peak=0.9, end=0.05):
    """(1-μ) × GRPO + μ × SFT with a μ that warms up and then decays along a cosine."""
    share = (step - warmup) / decay
    mu = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))
    return (1 - mu) * grpo(s) + mu * sft(s)
