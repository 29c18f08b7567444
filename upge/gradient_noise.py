"""The noise of the gradients of rollouts and demonstrations, and their distance, from the coefficients of ∇log π.

The gradients themselves would need a backward pass per trajectory. Their coefficients per token are known after a
forward pass (arXiv 2605.26184).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from upge.errors import ConfigError
from upge.estimator import UnifiedGradient
from upge.stateful import GRADIENT_NOISE, StatefulGate
from upge.support import SampledToken
from upge.term import Term
from upge.trajectories import Trajectories
from upge.views import LIVE_COLUMNS, masked_mean

#: The current policy's columns that are known when the noise is measured.
_KNOWN = frozenset({"logprobs", "behavior_logprobs"})
#: Share of the demonstrations that is left out at each end of their log-likelihoods.
TRIM = 0.1


def measured_terms(terms: Mapping[str, Term], gate: StatefulGate) -> tuple[UnifiedGradient, UnifiedGradient]:
    """The estimators whose gradients the gate's signals compare: that of rollouts and that of demonstrations.

    Raises:
        ConfigError: there is not exactly one term of each source, or one of them has coefficients that a forward pass
            of the sampled tokens does not give.
    """
    estimators: list[UnifiedGradient] = []
    for source in ("rollouts", "demonstrations"):
        names = [name for name, term in terms.items() if term.source == source]
        if len(names) != 1:
            raise ConfigError(
                f"terms: {type(gate).__name__} compares the gradients of two terms, one with source rollouts and one "
                f"with source demonstrations, but found {len(names)} of source {source}"
                f"{' (' + ', '.join(names) + ')' if names else ''}; give one of each"
            )
        term = terms[names[0]]
        read = frozenset[str]().union(*(part.columns for slot, part in term.estimator.parts.items() if slot != "mask"))
        unknown = sorted(read & LIVE_COLUMNS - _KNOWN)
        if unknown or not isinstance(term.support, SampledToken):
            what = f"reads {', '.join(unknown)}" if unknown else f"has support {type(term.support).__name__}"
            raise ConfigError(
                f"terms.{names[0]}: {type(gate).__name__} measures coefficients by the log-probs of sampled tokens, "
                f"but this term {what}; use another gate, or other parts"
            )
        estimators.append(term.estimator)
    return estimators[0], estimators[1]


def gradient_noise(rollouts: UnifiedGradient, demonstrations: UnifiedGradient, batch: Trajectories) -> dict[str, float]:
    """The three signals of a batch with the log-probs of the current policy. NaN where there are no trajectories.

        rollout_noise        σ_r² = Var_i mean_t Â_it over the rollouts i
        demonstration_noise  σ_s² = Var_i mean_t(-log π_it) over the demonstrations i, without a tenth at each end
        disagreement         Δ²   = mean_i mean_t (φ_it - Â_it)² over all trajectories, Â = 0 on demonstrations

    φ = f′·π_θ/π_ref is what the estimator of demonstrations gives a token with advantage 1. Variances are divided by n.
    The tenth is rounded down, so that nothing is left out of fewer than ten demonstrations.

    Args:
        rollouts, demonstrations: the estimators of `measured_terms`.
        batch: with log-probs [B, T].
    """
    assert batch.logprobs is not None
    logprobs = batch.logprobs.detach().double()
    if batch.behavior_logprobs is None:
        batch = replace(batch, behavior_logprobs=batch.logprobs.detach())
    expert, tokens = batch.is_demonstration, batch.response_mask
    advantages = rollouts.advantage(rollouts.advantage.view(batch)).double() * ~expert[:, None]
    nll = masked_mean(-logprobs, tokens)[expert, 0]
    denominator, likelihood = (
        part(part.view(batch)).detach().double() for part in (demonstrations.denominator, demonstrations.likelihood)
    )
    apart = (torch.exp(logprobs - denominator + likelihood) - advantages).square()
    values = (
        _variance(masked_mean(advantages, tokens)[~expert, 0]),
        _variance(_trimmed(nll)),
        float(masked_mean(torch.where(tokens, apart, 0.0), tokens).mean()),
    )
    return dict(zip(GRADIENT_NOISE, values, strict=True))


def _trimmed(values: Float[Tensor, "n"]) -> Float[Tensor, "m"]:
    left_out = int(TRIM * len(values))
    return values.sort().values[left_out : len(values) - left_out]


def _variance(values: Float[Tensor, "n"]) -> float:
    return float(values.var(correction=0)) if len(values) else float("nan")
