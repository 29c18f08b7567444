"""grpo's objective under each correction, and some others' where the two meet, written out in plain loops; to be
minimised. Nothing here uses upge."""

from __future__ import annotations

import math

import torch

from tests import textbook_mixed, textbook_onpolicy
from tests.policy import Sample, changed
from tests.textbook import average, centred, clipped, over, rollouts


def question_mean(questions, value):
    """Mean over questions, then responses, then tokens, of value(row, advantage) per token."""
    total = 0.0
    for question in questions:
        group = centred(question, std=True)
        total += sum(average(value(r, a)) for r, a in group) / len(group)
    return over(total, len(questions))


def token_mean(s, value):
    """Mean of value(row) over all tokens of all rollouts."""
    rows = [r for r in s.rows if not r["demo"]]
    return over(sum(value(r).sum() for r in rows), sum(len(r["logp"]) for r in rows))


def grpo(s):
    return -question_mean(s.questions, clipped)


def opd(s):
    """On-policy distillation by policy gradient, which iw_opd corrects."""
    return distilled(s, gamma=0.0)


def iw_opd(s):
    return distilled(s, gamma=0.5)


def distilled(s, gamma):
    def value(row):
        advantage = (row["teacher"] - row["logp"]).detach()
        size, weights = advantage.abs().tolist(), []
        for t in range(len(size)):
            weights.append(1 + gamma * (1 - sum(size[:t]) / (sum(size) or 1.0)))
        return -torch.exp(row["logp"] - row["behavior"]) * advantage * torch.tensor(weights, dtype=torch.float64)

    return token_mean(s, value)


def weighted(s, weight):
    """The clipped objective with a weight, from the list of log π_old/π_sampler of the response, before each token."""

    def value(row, advantage):
        ratios = (row["behavior"] - row["sampler"]).tolist()
        factors = torch.tensor([weight(ratios, t) for t in range(len(ratios))], dtype=torch.float64)
        return torch.where(factors == 0, 0.0, factors * clipped(row, advantage))

    return -question_mean(s.questions, value)


def tis(s):
    return weighted(s, lambda ratios, t: min(math.exp(ratios[t]), 2.0))


def icepop(s):
    return weighted(s, lambda ratios, t: math.exp(ratios[t]) if 0.5 <= math.exp(ratios[t]) <= 5 else 0.0)


def mis(s):
    return weighted(s, lambda ratios, t: math.exp(sum(ratios)) if math.exp(sum(ratios)) <= 2 else 0.0)


def mis_geometric(s, low=0.9, high=1.1):
    """The band widened to the mismatch of the tests' samplers."""

    def weight(ratios, t):
        return 1.0 if low <= math.exp(sum(ratios) / len(ratios)) <= high else 0.0

    return weighted(s, weight)


def kl_k1(s):
    return grpo(s) + 0.001 * token_mean(s, lambda r: r["logp"] - r["reference"])


def kl_k2(s):
    return grpo(s) + 0.001 * token_mean(s, lambda r: 0.5 * (r["logp"] - r["reference"]) ** 2)


def kl_k3(s):
    def k3(row):
        x = torch.exp(row["reference"] - row["logp"])
        return x - torch.log(x) - 1

    return grpo(s) + 0.001 * token_mean(s, k3)


def kl_full(s):
    """The expectation over all tokens in place of the sampled one."""

    def kl(row):
        return (row["all"].exp() * (row["all"] - row["reference_all"])).sum(dim=-1)

    return grpo(s) + 0.001 * token_mean(s, kl)


def kl_full_forward(s):
    def kl(row):
        return (row["reference_all"].exp() * (row["reference_all"] - row["all"])).sum(dim=-1)

    return grpo(s) + 0.001 * token_mean(s, kl)


def kl_full_jsd(s):
    def divergence(row):
        p, q = row["all"].exp(), row["reference_all"].exp()
        middle = ((p + q) / 2).log()
        return (p * (row["all"] - middle) + q * (row["reference_all"] - middle)).sum(dim=-1) / 2

    return grpo(s) + 0.001 * token_mean(s, divergence)


def ratio_kl(s):
    def value(row):
        x = torch.exp(row["reference"] - row["logp"])
        return torch.exp(row["logp"] - row["behavior"]) * (x - torch.log(x) - 1)

    return grpo(s) + 0.001 * token_mean(s, value)


def sequence_mask(s, threshold=0.05):
    """The threshold lowered to the drift of the tests' policies."""

    def value(row, advantage):
        fallen = float(average(row["behavior"] - row["logp"].detach()))
        return 0.0 * row["logp"] if advantage < 0 and fallen > threshold else clipped(row, advantage)

    return -question_mean(s.questions, value)


def optimal_baseline(s):
    """A baseline per place t, over the question's rollouts that are longer than t; none for a single one."""

    def baseline(rows, t):
        pairs = [(float(r["score_norms"][: t + 1].sum()), r["reward"]) for r in rows if len(r["logp"]) > t]
        return sum(w * reward for w, reward in pairs) / sum(w for w, _ in pairs) if len(pairs) > 1 else 0.0

    def value(rows, row):
        tokens = [row["reward"] - baseline(rows, t) for t in range(len(row["logp"]))]
        return average(clipped(row, torch.tensor(tokens, dtype=torch.float64)))

    questions = [[r for r in q if not r["demo"]] for q in s.questions]
    return -over(sum(sum(value(q, r) for r in q) / len(q) for q in questions), len(questions))


def overlong_filter(s):
    """Advantages are those of all rollouts; questions and means are over the ones that ended by themselves."""
    totals = []
    for question in s.questions:
        kept = [average(clipped(r, a)) for r, a in centred(question, std=True) if r["finished"]]
        if kept:
            totals.append(sum(kept) / len(kept))
    return -over(sum(totals), len(totals))


def kl_reward(s):
    def value(row, advantage):
        paid = [float(k) for k in (row["logp"] - row["reference"]).detach()]
        tokens = [advantage - 0.001 * sum(paid[t:]) for t in range(len(paid))]
        return clipped(row, torch.tensor(tokens, dtype=torch.float64))

    return -question_mean(s.questions, value)


def entropy(s):
    return grpo(s) - 0.001 * token_mean(s, lambda r: r["entropy"])


def dual_clip(s):
    def value(row, advantage):
        ordinary = clipped(row, advantage)
        return torch.maximum(ordinary, torch.full_like(ordinary, 3.0 * advantage)) if advantage < 0 else ordinary

    return -question_mean(s.questions, value)


def curriculum(s):
    """The batch is that of other prompts, and nothing makes up for it."""
    return grpo(s)


def dynamic_sampling(s):
    solved = [[r["reward"] for r in rollouts(question)] for question in s.questions]
    kept = [q for q, rewards in zip(s.questions, solved, strict=True) if 0 < sum(rewards) < len(rewards)]
    return -question_mean(kept, clipped)


def punished(row, limit=6, buffer=0.5, penalty=0.75):
    """Eq. 13 of arXiv 2503.14476, with the limit within the lengths of the tests."""
    cache, length = buffer * limit, len(row["logp"])
    if row["demo"] or length <= limit - cache:
        return row
    fine = (limit - cache - length) / cache if length <= limit else -1.0
    return {**row, "reward": row["reward"] + penalty * fine}


def overlong(s):
    return -question_mean([[punished(r) for r in question] for question in s.questions], clipped)


# Where a correction meets what only another algorithm has.


def shortened(s: Sample) -> Sample:
    """The sample with the punished rewards."""
    return changed(s, rewards=torch.tensor([punished(row)["reward"] for row in s.rows], dtype=torch.float64))


def ppo_overlong(s):
    return textbook_onpolicy.ppo(shortened(s))


def ppo_overlong_returns(s):
    """[τ][t] what a critic is to say: its advantages of the punished rewards, plus its old values."""
    rows = shortened(s).rows
    advantages = map(textbook_onpolicy.critics_advantages, rows)
    return [
        [a + float(v) for a, v in zip(own, r["values"], strict=True)] for own, r in zip(advantages, rows, strict=True)
    ]


def luffy_overlong(s):
    """The mean that a demonstration is compared with, too, is that of the punished rewards."""
    return textbook_mixed.luffy(shortened(s))


def truncated(row, cap):
    """min(π_old/π_sampler, cap) per token."""
    return torch.exp(row["behavior"] - row["sampler"]).clamp(max=cap)


def srft_tis(s, cap=1.1):
    """Both terms of the rollouts are weighted, by one cap; those of the demonstrations are not."""
    imitated, offline, positive, negative = [], [], [], []
    for question in s.questions:
        for r, a in textbook_mixed.relative(question, std=True):
            entropy = average(r["entropy"].detach())
            if r["demo"]:
                imitated.append(-0.5 * torch.exp(-entropy) * average(r["logp"]))
                offline.append(-a * average(r["logp"].exp()))
            else:
                won, weighted_mean = float(r["reward"] == 1), average(truncated(r, cap) * r["logp"])
                positive.append(-won * 0.1 * torch.exp(entropy) * weighted_mean)
                negative.append((1 - won) * weighted_mean)
    return sum(textbook_mixed.average(part, s) for part in (imitated, offline, positive, negative))


def chord_mu_tis(s, cap=1.1, decay=200, peak=0.9, end=0.05):
    mu = end + (peak - end) * (1 + math.cos(math.pi * min(s.batch.step, decay) / decay)) / 2
    objectives = []
    for question in s.questions:
        for r, a in textbook_mixed.relative(rollouts(question), std=True):
            objectives.append(truncated(r, cap) * clipped(r, a))
    return (1 - mu) * textbook_mixed.token_mean(objectives, s) + mu * textbook_mixed.supervised(s)
