"""What an algorithm says about a batch: loss, weights, factors, and figures that show what the gradient did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
        response_mask: [B, T] the tokens that count.
    """

    loss: Float[Tensor, ""]
    weights: Float[Tensor, "*shape"]
    terms: Mapping[str, TermFactors]
    penalties: Mapping[str, float]
    response_mask: Bool[Tensor, "*shape"]

    @property
    def records(self) -> dict[str, TokenRecord]:
        """Per term, the figures of the tokens that have a part in it, without padding."""
        return {name: token_record(factors) for name, factors in self.terms.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Figures per term, see `summarise`, and the value of each regularizer."""
        return summarise({n: [r] for n, r in self.records.items()}) | {
            f"{n}/value": v for n, v in self.penalties.items()
        }


class TokenRecord(NamedTuple):
    """Packed figures [N] of the tokens with a coefficient other than zero in a term."""

    weight: Tensor
    mask: Tensor
    advantage: Tensor
    scale: Tensor


def token_record(factors: TermFactors) -> TokenRecord:
    """The tokens of a term, packed: weight, mask, advantage, and gate·reduction as `scale`."""
    scale = factors.gate * factors.reduction
    active = scale != 0
    columns = (factors.weights, factors.mask, factors.advantages, scale)
    return TokenRecord(*(column[active].detach().float().cpu() for column in columns))


def summarise(records: Mapping[str, Sequence[TokenRecord]]) -> dict[str, float]:
    """Figures per term over all its pieces:

    `tokens` that have a coefficient; `masked_share` of those with an advantage, stopped by the mask; `weight_abs_mean`,
    `weight_abs_p50` and `weight_abs_p99` of |weight| relative to its average scale gate·reduction, so 1 means a plain
    maximum-likelihood token; `effective_tokens` = (Σ|weight|)²/Σ weight²; `advantage_mean`.
    """
    metrics: dict[str, float] = {}
    for name, pieces in records.items():
        weight, mask, advantage, scale = (torch.cat(column) for column in zip(*pieces, strict=True))
        metrics[f"{name}/tokens"] = float(len(weight))
        if not len(weight):
            continue
        relative = (weight / scale).abs()
        signal = advantage != 0
        metrics[f"{name}/weight_abs_mean"] = float(relative.mean())
        metrics[f"{name}/weight_abs_p50"] = _quantile(relative, 0.50)
        metrics[f"{name}/weight_abs_p99"] = _quantile(relative, 0.99)
        squares = weight.double().square().sum()
        metrics[f"{name}/effective_tokens"] = float(weight.double().abs().sum() ** 2 / squares) if squares > 0 else 0.0
        metrics[f"{name}/advantage_mean"] = float(advantage.mean())
        if bool(signal.any()):
            metrics[f"{name}/masked_share"] = float((mask[signal] == 0).float().mean())
    return metrics


def _quantile(values: Tensor, share: float) -> float:
    """By sorting: `torch.quantile` refuses more than 16 million values."""
    return float(values.sort().values[min(len(values) - 1, int(share * len(values)))])
