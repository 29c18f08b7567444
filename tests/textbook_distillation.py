"""Objectives of distributions over the vocabulary as their papers print them, to be minimised; see textbook.py.

A row has "all", [n, V] log π_θ of every token at each position, with "teacher_all" and "reference_all" of the other
models, and "tokens", [n] the sampled ones.
"""

from __future__ import annotations

import torch

from tests.textbook import average, demos, over, rollouts, success


def jsd(row, beta=0.5):
    """The generalized Jensen-Shannon divergence at each position."""
    policy, teacher = row["all"], row["teacher_all"]
    mixture = torch.log(beta * teacher.exp() + (1 - beta) * policy.exp())
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(dim=1)
    of_policy = (policy.exp() * (policy - mixture)).sum(dim=1)
    return beta * of_teacher + (1 - beta) * of_policy


def token_mean(s, rows, loss):
    return over(sum(loss(r).sum() for r in rows), sum(len(r["logp"]) for r in rows))


def gkd(s):
    return token_mean(s, [r for r in s.rows if not r["demo"]], jsd)


def opsd(s):
    """The same objective with another teacher: the policy's own predictions on a prompt that holds more."""
    return gkd(s)


def opd(s):
    def loss(r):
        advantage = (r["teacher"] - r["logp"]).detach()
        return -torch.exp(r["logp"] - r["behavior"]) * advantage

    return token_mean(s, [r for r in s.rows if not r["demo"]], loss)


def sdpo(s):
    """Over the wrong rollouts of questions that some rollout answers."""
    chosen = []
    for question in s.questions:
        group = rollouts(question)
        if any(success(r) for r in group):
            chosen += [r for r in group if not success(r)]
    return over(sum(average(jsd(r)) for r in chosen), len(chosen))


def asft(s, coefficient=0.1):
    def loss(r):
        reference = r["reference_all"]
        anchor = (reference.exp() * (reference - r["all"])).sum(dim=1)
        return -r["logp"].detach().exp() * r["logp"] + coefficient * anchor

    return token_mean(s, [r for q in s.questions for r in demos(q)], loss)


def eaft(s):
    def loss(r):
        likeliest = r["all"].detach().sort(dim=1, descending=True).values[:, :20]
        p = likeliest.exp() / likeliest.exp().sum(dim=1, keepdim=True)
        return -(-(p * p.log()).sum(dim=1) / 3) * r["logp"]

    return token_mean(s, [r for q in s.questions for r in demos(q)], loss)


def gift(s, beta=20.0):
    def loss(r):
        raised = r["reference_all"] + beta * torch.nn.functional.one_hot(r["tokens"], r["all"].shape[1])
        return -(raised.softmax(dim=1) * r["all"]).sum(dim=1)

    return token_mean(s, [r for q in s.questions for r in demos(q)], loss)
