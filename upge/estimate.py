"""The result of an algorithm on a batch: the loss, the weights, the factors, and metrics that describe the gradient."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.candidates import SupportCoefficients
from upge.estimator import TermFactors
from upge.views import TokenView


@dataclass(frozen=True)
class Estimate:
    """The unified gradient on a batch. For packed tokens, every shape [B, T] is [N].

    Attributes:
        loss: scalar surrogate; `backward()` gives minus the unified gradient. Its value has no meaning of its own.
        weights: [B, T] the detached number in front of ∇log π_θ, summed over terms.
        terms: name → factors of each term.
        penalty_values: name → value of each regularizer on sampled tokens, a detached scalar.
        batch: the batch that the estimate belongs to.
        compared: names of the terms whose mask compares the policy with the behavior policy.
        off_policy: names of the terms that read the behavior policy's log-probs.
        on_support: name → coefficients of each term whose support is not the sampled token. They are not in `weights`.
        divergences: name → coefficients of each regularizer on whole distributions.
    """

    loss: Float[Tensor, ""]
    weights: Float[Tensor, "*shape"]
    terms: Mapping[str, TermFactors]
    penalty_values: Mapping[str, Tensor]
    batch: TokenView
    compared: frozenset[str] = frozenset()
    on_support: Mapping[str, SupportCoefficients] = field(default_factory=dict[str, SupportCoefficients])
    divergences: Mapping[str, SupportCoefficients] = field(default_factory=dict[str, SupportCoefficients])
    off_policy: frozenset[str] = frozenset()

    @property
    def coefficients(self) -> list[SupportCoefficients]:
        """The coefficients of all terms and regularizers that move tokens other than the sampled one."""
        return [*self.on_support.values(), *self.divergences.values()]

    @property
    def response_mask(self) -> Bool[Tensor, "*shape"]:
        """[B, T] True on the tokens that count."""
        return self.batch.response_mask

    @property
    def penalties(self) -> dict[str, float]:
        """Name → value of each regularizer. That of a divergence covers the tokens that were evaluated so far."""
        of_divergences = {name: coefficients.value for name, coefficients in self.divergences.items()}
        return {name: float(value) for name, value in {**self.penalty_values, **of_divergences}.items()}

    @property
    def records(self) -> dict[str, TermRecord]:
        """Term → record of the tokens that have a non-zero coefficient in it."""
        return {
            name: term_record(factors, self.batch, name in self.compared, name in self.off_policy)
            for name, factors in self.terms.items()
        }

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of each term (see `summarise`) and the value of each regularizer."""
        return summarise({n: [r] for n, r in self.records.items()}) | {
            f"{n}/value": v for n, v in self.penalties.items()
        }


class TermRecord(NamedTuple):
    """What a run records of the n tokens of a micro-batch that have a non-zero coefficient in a term.

    Attributes:
        weight: [n] the number in front of ∇log π_θ.
        relative: [n] `weight` divided by |gate·reduction|. A token of plain maximum likelihood has 1.
        advantage: sum of the advantages.
        signals: number of tokens with a non-zero advantage.
        masked: number of these that the stabilization mask stops.
        above, below: number of stopped tokens whose ratio to the behavior policy is above and below 1; None if the mask
            does not compare the two policies.
        trajectories: Σ|weight| of each trajectory, by its row in the batch or another unique key.
        extreme: number of tokens whose ratio to the behavior policy is outside [1/2, 2]; None if the data are on-policy
            or the term does not read the behavior policy's log-probs.
    """

    weight: Tensor
    relative: Tensor
    advantage: float
    signals: int
    masked: int
    above: int | None
    below: int | None
    trajectories: Mapping[Hashable, float]
    extreme: int | None = None


def term_record(factors: TermFactors, batch: TokenView, compared: bool, off_policy: bool) -> TermRecord:
    """The record of a term's tokens in a micro-batch.

    Args:
        compared: whether its mask compares the policies.
        off_policy: whether some part of it reads the behavior policy's log-probs.
    """
    scale = factors.gate * factors.reduction
    active = scale != 0
    columns = (factors.weights, factors.mask, factors.advantages, scale)
    weight, mask, advantage, scale = (column[active].detach().float().cpu() for column in columns)
    signal = advantage != 0
    stopped = signal & (mask == 0)
    above = below = extreme = None
    if off_policy and batch.behavior_logprobs is not None:
        log_ratio = batch.log_importance_ratio[active].float().cpu()
        extreme = int(is_extreme(log_ratio).sum())
        if compared:
            moved = log_ratio[stopped]
            above, below = int((moved > 0).sum()), int((moved < 0).sum())
    rows, place = batch.places[0][active].cpu().unique(return_inverse=True)
    masses = torch.zeros(len(rows), dtype=torch.float64).index_add(0, place, weight.double().abs())
    counts = int(signal.sum()), int(stopped.sum()), above, below
    trajectories = dict(zip(rows.tolist(), masses.tolist(), strict=True))
    return TermRecord(weight, weight / scale.abs(), float(advantage.double().sum()), *counts, trajectories, extreme)


def is_extreme(log_ratio: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """[n] True where a ratio of two probabilities of a token is outside [1/2, 2], or is not a number."""
    return ~(log_ratio.abs() <= math.log(2))


#: The recorded percentiles of the signed weights.
PERCENTILES = (1, 10, 50, 90, 99)


def summarise(records: Mapping[str, Sequence[TermRecord]]) -> dict[str, float]:
    """The metrics of each term as `TERM/METRIC`, from one record per micro-batch.

    The weights are relative to |gate·reduction|: a token of plain maximum likelihood has weight 1. The metrics are

    - `tokens`, `trajectories`: numbers with a non-zero coefficient;
    - `advantage_mean`;
    - `weight_abs_mean`, `weight_abs_p50`, `weight_abs_p99`: mean and percentiles of |weight|;
    - `weight_p1` to `weight_p99`: percentiles of the signed weight;
    - `effective_tokens`: (Σ|v|)²/Σv² of the numbers v in front of ∇log π_θ; `effective_share`: the same divided by
      `tokens`; `effective_trajectories`: (Σ|u|)²/Σu² with u = Σ|v| of each trajectory;
    - `extreme_ratio_share`: share of the tokens whose ratio to the behavior policy is outside [1/2, 2];
    - `masked_share`: share of the tokens with a non-zero advantage that the mask stops; `masked_above` and
      `masked_below`: the shares that are stopped with a ratio to the behavior policy above and below 1.
    """
    metrics: dict[str, float] = {}
    for name, micro_batches in records.items():
        tokens = float(sum(len(record.weight) for record in micro_batches))
        values = {"tokens": tokens}
        if tokens:
            values |= _weights(micro_batches) | _masked(micro_batches)
            values["advantage_mean"] = sum(record.advantage for record in micro_batches) / tokens
            if any(record.extreme is not None for record in micro_batches):
                values["extreme_ratio_share"] = sum(record.extreme or 0 for record in micro_batches) / tokens
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    return metrics


def _weights(records: Sequence[TermRecord]) -> dict[str, float]:
    weight = torch.cat([record.weight for record in records])
    relative = torch.cat([record.relative for record in records])
    signed, absolute = relative.sort().values, relative.abs().sort().values
    metrics = {"weight_abs_mean": float(absolute.mean())}
    metrics |= {f"weight_abs_p{percent}": _percentile(absolute, percent) for percent in (50, 99)}
    metrics |= {f"weight_p{percent}": _percentile(signed, percent) for percent in PERCENTILES}
    metrics["effective_tokens"] = _effective(weight.double())
    metrics["effective_share"] = metrics["effective_tokens"] / len(weight)
    masses: dict[Hashable, float] = {}
    for record in records:
        for row, mass in record.trajectories.items():
            masses[row] = masses.get(row, 0.0) + mass
    metrics["trajectories"] = float(len(masses))
    metrics["effective_trajectories"] = _effective(torch.tensor(list(masses.values()), dtype=torch.float64))
    return metrics


def _masked(records: Sequence[TermRecord]) -> dict[str, float]:
    """Shares of the tokens with an advantage. Above and below are given only if some mask compares the policies."""
    signals = sum(record.signals for record in records)
    if not signals:
        return {}
    shares = {"masked_share": sum(record.masked for record in records) / signals}
    if any(record.above is not None for record in records):
        shares |= {
            f"masked_{side}": sum(getattr(r, side) or 0 for r in records) / signals for side in ("above", "below")
        }
    return shares


def _effective(weight: Tensor) -> float:
    """(Σ|v|)²/Σv²: the effective number of weights, equal to their number if all are equal."""
    squares = weight.square().sum()
    return float(weight.abs().sum() ** 2 / squares) if squares != 0 else 0.0


def _percentile(rising: Tensor, percent: int) -> float:
    """A percentile of sorted values, NaN if one of them is. `torch.quantile` takes at most 16 million values."""
    if bool(rising[-1].isnan()):  # NaN is sorted last
        return math.nan
    return float(rising[min(len(rising) - 1, percent * len(rising) // 100)])
