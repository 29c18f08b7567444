"""The objectives as their papers print them, written out in plain loops; to be minimised.

Nothing here uses upge. Each takes a `Sample` (see policy.py) and returns a scalar whose autograd gradient is the
reference.
"""

from __future__ import annotations

import math
import statistics

import torch


def rollouts(question):
    return [r for r in question if not r["demo"]]


def demos(question):
    return [r for r in question if r["demo"]]


def average(values):
    """Mean over the tokens of a response; 0 for one without a token."""
    return values.sum() / max(1, len(values))


def over(total, number):
    """total / number; where nothing counts there is nothing to divide."""
    return total / max(1, number)


def success(row):
    """Where papers, whose rewards are 0 and 1, say R = 1: above the middle."""
    return row["reward"] > 0.5


def centred(question, std=False, union=False):
    """Advantage of each rollout of a question (and of its demonstration with `union`), in order.

    One response alone has nothing to be compared with: 0.
    """
    members = question if union else rollouts(question)
    if len(members) < 2:
        return [(r, 0.0) for r in members]
    rewards = [r["reward"] for r in members]
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
    return [(r, (r["reward"] - mean) / scale) for r in members]


def clipped(row, advantage, low=0.2, high=0.2):
    ratio = torch.exp(row["logp"] - row["behavior"])
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sft(s):
    rows = [r for r in s.rows if r["demo"]]
    return -over(sum(r["logp"].sum() for r in rows), sum(len(r["logp"]) for r in rows))


def reinforce(s):
    rows = [r for r in s.rows if not r["demo"]]
    return -sum((1.0 if success(r) else -1.0) * r["logp"].sum() / 1024 for r in rows) / len(rows)


def grpo(s):
    total = 0.0
    for question in s.questions:
        group = centred(question, std=True)
        total += sum(average(clipped(r, a)) for r, a in group) / len(group)
    return -total / len(s.questions)


def dr_grpo(s):
    terms = [clipped(r, a).sum() / 1024 for question in s.questions for r, a in centred(question)]
    return -sum(terms) / len(terms)


def hpt(s, threshold=0.0):
    """A failing question without a demonstration has nothing to be learned from: it is none of the questions."""
    total, learned = 0.0, 0
    for question in s.questions:
        group, experts = rollouts(question), demos(question)
        pass_rate = sum(success(r) for r in group) / len(group)
        if pass_rate > threshold:
            ratios = [(torch.exp(r["logp"] - r["behavior"]) * a).sum() for r, a in centred(question)]
            total, learned = total - sum(ratios) / len(ratios) / 1024, learned + 1
        elif experts:
            total, learned = total - sum(average(r["logp"]) for r in experts) / len(experts), learned + 1
    return over(total, learned)


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
