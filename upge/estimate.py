"""What an algorithm says about a batch: loss, weights, factors, and figures that show what the gradient did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.views import TokenView


class TermFactors(NamedTuple):
    """The factors of one term, each [B, T] (of packed tokens [N]) and detached. Their product

        gate · reduction · mask · advantages · shape · exp(log π_θ - log_denominator) = weights

    is the number in front of each token's ∇log π_θ; `gate` includes the term's coefficient, `shape` is f′(π_θ).
    """

    mask: Tensor
    log_denominator: Tensor
    advantages: Tensor
    shape: Tensor
    gate: Tensor
    reduction: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Estimate:
    """The unified gradient on a batch; on packed tokens everything is [N] in place of [B, T].

    Attributes:
        loss: scalar; `backward()` gives minus the unified gradient. Its value is a surrogate and says little.
        weights: [B, T] the detached number in front of ∇log π_θ, all terms added up.
        terms: the factors of each term.
        penalties: the value of each regularizer.
        batch: what it was made for.
        compared: the terms whose mask compares the policy with the one that generated the data.
    """

    loss: Float[Tensor, ""]
    weights: Float[Tensor, "*shape"]
    terms: Mapping[str, TermFactors]
    penalties: Mapping[str, float]
    batch: TokenView
    compared: frozenset[str] = frozenset()

    @property
    def response_mask(self) -> Bool[Tensor, "*shape"]:
        """[B, T] the tokens that count."""
        return self.batch.response_mask

    @property
    def records(self) -> dict[str, TermRecord]:
        """Per term, what is kept of the tokens that have a part in it."""
        return {name: term_record(factors, self.batch, name in self.compared) for name, factors in self.terms.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Figures per term, see `summarise`, and the value of each regularizer."""
        return summarise({n: [r] for n, r in self.records.items()}) | {
            f"{n}/value": v for n, v in self.penalties.items()
        }


class TermRecord(NamedTuple):
    """What is kept of the n tokens of a piece that have a coefficient other than zero in a term.

    Attributes:
        weight: [n] the number in front of ∇log π_θ.
        relative: [n] the same relative to the absolute of its scale gate·reduction: ±1 is a plain likelihood's token.
        advantage: sum of the advantages.
        signals: how many have an advantage other than zero; the counts below are of these.
        masked: how many the stabilization mask stops.
        above, below: of the stopped, those that the policy has become more, and less, likely to choose than the one
            that generated the data; None where the mask does not compare the two.
        trajectories: Σ|weight| of each trajectory, by its row in the batch, or whatever else tells it from others.
    """

    weight: Tensor
    relative: Tensor
    advantage: float
    signals: int
    masked: int
    above: int | None
    below: int | None
    trajectories: Mapping[Hashable, float]


def term_record(factors: TermFactors, batch: TokenView, compared: bool) -> TermRecord:
    """What is kept of a term's tokens in a piece of a batch; `compared` as in `TermRecord.above`."""
    scale = factors.gate * factors.reduction
    active = scale != 0
    columns = (factors.weights, factors.mask, factors.advantages, scale)
    weight, mask, advantage, scale = (column[active].detach().float().cpu() for column in columns)
    signal = advantage != 0
    stopped = signal & (mask == 0)
    above = below = None
    if compared and batch.behavior_logprobs is not None:
        moved = batch.log_importance_ratio[active].float().cpu()[stopped]
        above, below = int((moved > 0).sum()), int((moved < 0).sum())
    rows, place = batch.places[0][active].cpu().unique(return_inverse=True)
    masses = torch.zeros(len(rows), dtype=torch.float64).index_add(0, place, weight.double().abs())
    return TermRecord(
        weight,
        weight / scale.abs(),
        float(advantage.double().sum()),
        int(signal.sum()),
        int(stopped.sum()),
        above,
        below,
        dict(zip(rows.tolist(), masses.tolist(), strict=True)),
    )


#: Of the signed weights, which percentiles are recorded.
PERCENTILES = (1, 10, 50, 90, 99)


def summarise(records: Mapping[str, Sequence[TermRecord]]) -> dict[str, float]:
    """Figures per term over all its pieces. A weight is relative to its scale |gate·reduction|: ±1 is a plain
    likelihood's token.

    `tokens`, `trajectories` that have a coefficient; `advantage_mean`; `weight_abs_mean`, `weight_abs_p50`,
    `weight_abs_p99` of |weight|; `weight_p1` to `weight_p99`, percentiles of the signed weight; `effective_tokens` =
    (Σ|w|)²/Σw² of the numbers w in front of ∇log π_θ, `effective_share` of the tokens, `effective_trajectories` the
    same of each trajectory's Σ|w|; `masked_share` of the tokens with an advantage, stopped by the mask, and of them
    `masked_above` and `masked_below`, with a ratio to the behaviour policy above and below 1.
    """
    metrics: dict[str, float] = {}
    for name, pieces in records.items():
        found = {"tokens": float(sum(len(piece.weight) for piece in pieces))}
        if found["tokens"]:
            found |= _weights(pieces) | _masked(pieces)
            found["advantage_mean"] = sum(piece.advantage for piece in pieces) / found["tokens"]
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return metrics


def _weights(pieces: Sequence[TermRecord]) -> dict[str, float]:
    weight = torch.cat([piece.weight for piece in pieces])
    relative = torch.cat([piece.relative for piece in pieces])
    signed, absolute = relative.sort().values, relative.abs().sort().values
    found = {"weight_abs_mean": float(absolute.mean())}
    found |= {f"weight_abs_p{percent}": _percentile(absolute, percent) for percent in (50, 99)}
    found |= {f"weight_p{percent}": _percentile(signed, percent) for percent in PERCENTILES}
    found["effective_tokens"] = _effective(weight.double())
    found["effective_share"] = found["effective_tokens"] / len(weight)
    masses: dict[Hashable, float] = {}
    for piece in pieces:
        for row, mass in piece.trajectories.items():
            masses[row] = masses.get(row, 0.0) + mass
    found["trajectories"] = float(len(masses))
    found["effective_trajectories"] = _effective(torch.tensor(list(masses.values()), dtype=torch.float64))
    return found


def _masked(pieces: Sequence[TermRecord]) -> dict[str, float]:
    """Shares of the tokens with an advantage; the sides only where some piece tells them apart."""
    signals = sum(piece.signals for piece in pieces)
    if not signals:
        return {}
    found = {"masked_share": sum(piece.masked for piece in pieces) / signals}
    if any(piece.above is not None for piece in pieces):
        found |= {f"masked_{side}": sum(getattr(p, side) or 0 for p in pieces) / signals for side in ("above", "below")}
    return found


def _effective(weight: Tensor) -> float:
    """(Σ|w|)²/Σw²: how many equal ones would weigh as unequally as these."""
    squares = weight.square().sum()
    return float(weight.abs().sum() ** 2 / squares) if squares > 0 else 0.0


def _percentile(rising: Tensor, percent: int) -> float:
    """Of sorted values: `torch.quantile` refuses more than 16 million of them."""
    return float(rising[min(len(rising) - 1, percent * len(rising) // 100)])
