"""Which objective an estimator maximizes: its expected gradient over several prompts, against those of objectives.

For one prompt and rewards 0 and 1, all objectives of the pass rate p have the direction of ∇p. They differ in the
weight f′(p) that a prompt has among others. Therefore the expected gradients of several prompts with different pass
rates, each with a table of its own, are compared as one vector:

    report = comparison(algorithm, prompts, group_size=4)["log p, n terms"]
    report.bias, report.cosine, report.scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.theory.draws import Setting
from upge.theory.enumerate import expectation
from upge.theory.policy import exact_gradient, forward_kl_gradient, reverse_kl_gradient


def success_weights(pass_rate: float, n: int) -> dict[str, float]:
    """Objective → f′(p), its derivative with respect to a prompt's pass rate p, for groups of n rollouts.

    - 'E[R]': p, the expected reward.
    - 'log p': the log-likelihood of success.
    - 'log p, m terms': the first m terms of log p = -Σ_k (1 - p)^k/k (arXiv 2602.02710), with m = n and m = n - 1; the
      first term alone has the gradient of E[R].
    - 'pass@n': 1 - (1 - p)^n.
    """
    failing = 1 - pass_rate
    terms = [failing**k for k in range(n)]
    return {
        "E[R]": 1.0,
        "log p": 1 / pass_rate,
        "log p, n−1 terms": sum(terms[:-1]),
        "log p, n terms": sum(terms),
        "pass@n": n * failing ** (n - 1),
    }


def objectives(setting: Setting, n: int) -> dict[str, Float[Tensor, "P V"]]:
    """The exact gradient of every objective of one prompt, in the direction of ascent.

    In addition to `success_weights`, '−KL(π‖ν)' and '−KL(ν‖π)' with a teacher ν, and '−KL(π_β‖π)' with an expert.

    Raises:
        ConfigError: a reward is not 0 or 1, or no response or every response is right.
    """
    policy, rewards = setting.policy, setting.rewards
    pass_rate = float((policy.probabilities.detach() * rewards).sum())
    if not bool(((rewards == 0) | (rewards == 1)).all()) or not 0 < pass_rate < 1:
        raise ConfigError("objectives: rewards must be 0 or 1, and both must occur")
    slope = exact_gradient(policy, rewards)
    gradients = {name: weight * slope for name, weight in success_weights(pass_rate, n).items()}
    if setting.teacher is not None:
        gradients["−KL(π‖ν)"] = -reverse_kl_gradient(policy, setting.teacher)
        gradients["−KL(ν‖π)"] = -forward_kl_gradient(policy, setting.teacher)
    if setting.expert is not None:
        gradients["−KL(π_β‖π)"] = -forward_kl_gradient(policy, setting.expert)
    return gradients


@dataclass(frozen=True)
class Comparison:
    """An expected gradient g against the gradient ∇J of an objective, both over all prompts.

    Attributes:
        cosine: of g and ∇J; 0 if one of them vanishes.
        scale: the c > 0 with the smallest ‖g/c - ∇J‖, a factor that the learning rate absorbs; 0 if the cosine is not
            positive.
        bias: min_c ‖c·g - ∇J‖/‖∇J‖ over c ≥ 0, which is √(1 - cosine²), or 1 if the cosine is not positive.
    """

    cosine: float
    scale: float
    bias: float


def compared(mean: Tensor, target: Tensor) -> Comparison:
    """The comparison of two gradients of equal shape."""
    product, own, length = (float((a * b).sum()) for a, b in ((mean, target), (mean, mean), (target, target)))
    if product <= 0 or own * length == 0:
        return Comparison(product / (own * length) ** 0.5 if own * length else 0.0, 0.0, 1.0)
    best = product / own
    # From the difference itself: 1 - cosine² loses half of the digits.
    bias = float((best * mean - target).norm()) / length**0.5
    return Comparison(product / (own * length) ** 0.5, 1 / best, bias)


def comparison(
    algorithm: Algorithm, prompts: Sequence[Setting], *, group_size: int, demonstrations: int = 1
) -> Mapping[str, Comparison]:
    """The comparison with every objective that all prompts have, for batches of one prompt drawn uniformly.

    If a group is not kept, another prompt is drawn, so a prompt's gradient is weighted by the probability that its
    group is kept.
    """
    reports = [
        expectation(algorithm, prompt, group_size=group_size, demonstrations=demonstrations) for prompt in prompts
    ]
    mean = torch.stack([report.accepted * report.mean for report in reports])
    targets = [objectives(prompt, group_size) for prompt in prompts]
    return {name: compared(mean, torch.stack([one[name] for one in targets])) for name in targets[0]}
