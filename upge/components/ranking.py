"""Parts of reach 'batch': masks that rank the tokens of an update by the current policy.

They see all tokens of their term in the update, whatever the split into micro-batches and the number of ranks. Ties are
broken by `token_keys`, a pseudo-random number per token, so that no trajectory is preferred. Log-probs that differ only
by rounding may rank differently in another split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upge.components.base import AdvantageEstimator, StabilizationMask, floor_of
from upge.components.mask import PPOClip
from upge.errors import ConfigError
from upge.formula import Formula, tex, times
from upge.views import TrajectoryView


def token_keys(batch: TrajectoryView, seed: int = 0) -> Int[Tensor, "B T"]:
    """[B, T] a pseudo-random 64-bit integer for each token, from `seed`, step, trajectory and position.

    The position is the number of the token among those of `response_mask`. A part that calls this function lists
    `index` in its `reads`.
    """
    position = batch.response_mask.cumsum(dim=1)
    key = _mixed(torch.full_like(position, seed))
    for identity in (batch.step, batch.index[:, None], position):
        key = _mixed(key ^ identity)
    return key


def largest(
    values: Float[Tensor, "B T"], among: Bool[Tensor, "B T"], count: int, keys: Int[Tensor, "B T"]
) -> Bool[Tensor, "B T"]:
    """[B, T] True for the `count` largest `values` of the tokens in `among`; ties go to smaller `keys`."""
    places = among.nonzero(as_tuple=True)
    order = keys[places].argsort()
    order = order[values[places][order].argsort(descending=True, stable=True)][:count]
    chosen = torch.zeros_like(among)
    chosen[places[0][order], places[1][order]] = True
    return chosen


def covariance(batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """[B, T] cov = (log π_θ - mean log π_θ)·(Â - mean Â), means over all tokens of the response mask; 0 outside it."""
    mask = batch.response_mask
    centred = [_centred(values.detach().double(), mask) for values in (batch.logprobs, advantages)]
    return centred[0] * centred[1]


def share_of(share: float, mask: Bool[Tensor, "B T"]) -> int:
    """The number of tokens in a share of `mask`, rounded down, but at least 1."""
    return max(1, floor_of(share, int(mask.sum())))


@dataclass(frozen=True)
class CovarianceClip(StabilizationMask):
    """1_clip-cov (arXiv 2505.22617): stops a few random tokens whose update lowers the entropy most.

    Of the tokens that `mask` lets through and whose cov = (log π_θ - mean log π_θ)·(Â - mean Â) lies in (low, high),
    ⌊share·N⌋, at least 1, are stopped; N is the number of tokens of the term in the update, and the means are over
    them. The draw depends only on `seed`, the step, the trajectory and the position (see `token_keys`), so all epochs
    of a step draw in the same order.

    Attributes:
        mask: the mask that is applied first.
        share: the largest share of the N tokens that is stopped in addition.
        low, high: bounds of cov.
        seed: the seed of the draw.
    """

    mask: StabilizationMask = PPOClip()
    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    seed: int = 0
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "index"})
    reach: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, self.share)
        if not self.low < self.high:
            raise ConfigError(f"CovarianceClip: low={self.low}, high={self.high}; need low < high")

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        mask, cov, keys = self.mask(batch, advantages), covariance(batch, advantages), token_keys(batch, self.seed)
        eligible = (cov > self.low) & (cov < self.high) & (mask != 0) & batch.response_mask
        count = share_of(self.share, batch.response_mask)
        return mask * ~largest(torch.zeros_like(cov), eligible, count, keys)

    def formula(self) -> Formula:
        drawn = f"1[not drawn, ⌊{self.share:g}·N⌋ of {self.low:g} < cov < {self.high:g}]"
        latex = rf"\mathbb{{1}}[\text{{not drawn}},\ \lfloor {tex(self.share)}N\rfloor\ \text{{of}}\ "
        return times([self.mask.formula(), Formula(drawn, rf"{latex}{self.low:g}<\mathrm{{cov}}<{self.high:g}]")])


@dataclass(frozen=True)
class TopCovariance(StabilizationMask):
    """1 for the ⌊share·N⌋ tokens, at least 1, with the largest cov of the update, 0 for all others (arXiv 2505.22617).

    cov = (log π_θ - mean log π_θ)·(A - mean A), N and the means over the tokens of the term in the update. As the mask
    of a term with `CurrentPolicy` and `RatioSign` it confines the penalty |log r| to these tokens (KL-Cov).

    Attributes:
        advantage: A, which need not be the term's own.
        share: the share of tokens.
    """

    advantage: AdvantageEstimator
    share: float = 2e-3
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "index"})
    reach: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, self.share)

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        cov, count = covariance(batch, self.advantage(batch)), share_of(self.share, batch.response_mask)
        return largest(cov, batch.response_mask, count, token_keys(batch)).to(batch.logprobs.dtype)

    def formula(self) -> Formula:
        inner = self.advantage.formula()
        return Formula(
            f"1[cov(log π_θ, {inner.text}) in top {self.share:g}]",
            rf"\mathbb{{1}}[\mathrm{{cov}}(\log\pi_\theta,{inner.latex})\in\mathrm{{top}}_{{{tex(self.share)}}}]",
        )


@dataclass(frozen=True)
class TopEntropy(StabilizationMask):
    """1 for the ⌊share·N⌋ tokens, at least 1, with the largest entropy of the update, 0 for all others.

    This is the rule of arXiv 2506.01939: only tokens at which the policy is undecided are updated. N is the number of
    tokens of the term in the update. The divisors of the reduction still count all tokens.
    """

    share: float = 0.2
    reads: ClassVar[frozenset[str]] = frozenset({"entropies", "index"})
    reach: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, self.share)

    def __call__(self, batch: TrajectoryView, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        entropies, count = batch.entropies.detach(), share_of(self.share, batch.response_mask)
        return largest(entropies, batch.response_mask, count, token_keys(batch)).to(entropies.dtype)

    def formula(self) -> Formula:
        return Formula(f"1[H in top {self.share:g}]", rf"\mathbb{{1}}[H\in\mathrm{{top}}_{{{tex(self.share)}}}]")


def _check_share(part: StabilizationMask, share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(
            f"{type(part).__name__}.share: {share} must be in (0, 1]; it is a share of the tokens of an update"
        )


def _centred(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The values minus their mean over `mask`; 0 outside it."""
    # Sorted, so that the rounding of the sum does not depend on the order of the trajectories.
    inside = values[mask].sort().values
    mean = inside.sum() / max(1, len(inside))
    return torch.where(mask, values - mean, torch.zeros_like(values))


def _mixed(key: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The step of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit integers whose values look random."""
    key = key + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ _shifted(key, shift)) * _signed(factor)
    return key ^ _shifted(key, 31)


def _shifted(key: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """A logical shift to the right; that of int64 copies the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
