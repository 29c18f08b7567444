"""Metrics of single prompts: by pass rate, and by the number of successes in their group, which gates depend on.

Legend: q prompts of a bin; M as in `upge.measure.pool`; R, H and k as in `upge.measure.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.measure.metrics import (
    Estimated,
    Metrics,
    Sample,
    cosine_with,
    gram,
    jackknife,
    metrics,
    within,
    without_rounding,
)
from upge.measure.pool import Pool

#: The edges of the pass-rate bins; pass rates of exactly 0 and 1 have bins of their own.
_ENDS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Bin:
    """Prompts of similar pass rate, by their numbers in the pool; `pass_rate` is the mean over them."""

    label: str
    pass_rate: float
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class AtRate:
    """One estimator on the prompts of a bin, where an estimate is the contribution of a single prompt.

    Attributes:
        pooled: relative to the true gradient of the whole pool, which is the objective's gradient.
        own: cosine with the true gradient of these prompts alone.
        snr: ‖m‖²/E‖g - m‖² if both the prompt and its rollouts are sampled, the prompt from all prompts of such a pass
            rate. The bin's prompts are a sample of these, so the interval covers other prompts; it needs at least
            three prompts.
        prompt_snr: ‖m_q‖²/E‖g_q - m_q‖² if only the rollouts of a prompt q are sampled; numerator and denominator are
            averaged over the prompts.
    """

    bin: str
    pooled: Metrics
    own: Estimated
    snr: Estimated
    prompt_snr: Estimated


@dataclass(frozen=True)
class AtCount:
    """One estimator on the groups with a given number of successes, which is what a gate can depend on.

    Attributes:
        pooled: a single prompt's contribution relative to the true gradient of the whole pool.
    """

    successes: int
    groups: int
    pooled: Metrics


def bins_of(pass_rates: Float[Tensor, "M"]) -> list[Bin]:
    """The bins that contain prompts, in order of increasing pass rate."""
    members = [("0", pass_rates <= 0)]
    for low, high in zip(_ENDS, _ENDS[1:], strict=False):
        inside = (pass_rates > low) & (pass_rates <= high if high < 1 else pass_rates < high)
        members.append((f"{low:g}–{high:g}", inside))
    members.append(("1", pass_rates >= 1))
    return [
        Bin(label, float(pass_rates[inside].mean()), tuple(inside.nonzero()[:, 0].tolist()))
        for label, inside in members
        if bool(inside.any())
    ]


def at_rates(single: Float[Tensor, "M R k"], bins: Sequence[Bin], true: Float[Tensor, "M H k"]) -> Iterable[AtRate]:
    """The metrics of each bin in which some prompt contributes.

    `single` are the contributions of prompts in rounds, `true` independent estimates of each prompt's true gradient.
    """
    rounds = single.shape[1]
    for one in bins:
        members = list(one.prompts)
        mine = single[members]
        if not bool(mine.any()):
            continue
        sample = Sample.of(mine.flatten(0, 1), torch.arange(rounds).repeat(len(members)), rounds)
        own = cosine_with(sample, true[members].mean(dim=0))
        yield AtRate(one.label, metrics(sample, true.mean(dim=0)), own, _snr(mine), _prompt_snr(mine))


def _snr(mine: Float[Tensor, "q R k"]) -> Estimated:
    """The signal-to-noise ratio of one prompt that is itself sampled.

    The bin's own mean contains 1/q of each prompt's individual deviation, so it would overestimate the signal, more so
    with fewer prompts. Products of different prompts in different rounds do not contain it.
    """
    sums = mine.sum(dim=0)
    whole, own = gram(sums, sums), torch.stack([gram(one, one) for one in mine])
    cross = torch.stack([gram(one, sums) for one in mine])
    shares, rounds = cross + cross.mT - own, torch.ones(mine.shape[1], dtype=torch.float64)

    def snr(weights: list[Tensor]) -> Tensor:
        # Subtract the absent prompt's share from the products of the sums; the jackknife never leaves out two.
        present, count = weights[0], weights[0].sum()
        products = whole - torch.einsum("q,qrs->rs", 1 - present, shares)
        alone = torch.einsum("q,qrs->rs", present, own)
        signal = within(products - alone, rounds) / (count * (count - 1))
        power = alone.diagonal().mean() / count
        return (signal / without_rounding(power - signal, power))[None]

    return jackknife(snr, [torch.ones(len(mine), dtype=torch.float64)])[0]


def _prompt_snr(mine: Float[Tensor, "q R k"]) -> Estimated:
    """The signal-to-noise ratio of fixed prompts, from products of different rounds of the same prompt."""
    products = torch.stack([gram(one, one) for one in mine]).mean(dim=0)

    def snr(weights: list[Tensor]) -> Tensor:
        signal, power = within(products, weights[0]), (weights[0] * products.diagonal()).sum() / weights[0].sum()
        return (signal / without_rounding(power - signal, power))[None]

    return jackknife(snr, [torch.ones(len(products), dtype=torch.float64)])[0]


def at_counts(pool: Pool, single: Float[Tensor, "M R k"], pooled: Float[Tensor, "H k"]) -> Iterable[AtCount]:
    """The metrics of the groups with each number of successes.

    `single` are the contributions of prompts in rounds, `pooled` independent estimates of the pool's true gradient.
    """
    successes = pool.successes
    for count in range(pool.group_size + 1):
        prompts, rounds = (successes == count).nonzero(as_tuple=True)
        mine = single[prompts, rounds]
        if len(mine) and bool(mine.any()):
            yield AtCount(count, len(mine), metrics(Sample.of(mine, rounds, pool.rounds), pooled))
