"""What a single prompt contributes: by its pass rate, and by the successes of its group, which a gate sees.

Legend: q prompts of a bin; M, R, H and k as in `upge.measure.pool` and `upge.measure.statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.measure.figures import Figures, Sample, cosine_with, figures, without_rounding
from upge.measure.pool import Pool
from upge.measure.statistics import Estimated, gram, jackknife, within

#: The ends of the intervals of the pass rate by which prompts are told apart; 0 and 1 have one of their own.
_ENDS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Bin:
    """Prompts of similar pass rate."""

    label: str
    pass_rate: float
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class AtRate:
    """One estimator on the prompts of a bin; an estimate is now what a single prompt contributes.

    Attributes:
        bin: which.
        pooled: against the true gradient of the whole pool, which is what is climbed.
        own: cosine with the true gradient of these prompts alone.
        snr: ‖m‖²/E‖g - m‖² where prompt and rollouts are drawn anew, among all prompts of such a pass rate, of which
            those of the bin are a sample: so its interval is about other prompts, and needs three of them.
        prompt_snr: ‖m_q‖²/E‖g_q - m_q‖² of one prompt's group, averaged over the prompts above and below: only its
            rollouts are drawn anew.
    """

    bin: str
    pooled: Figures
    own: Estimated
    snr: Estimated
    prompt_snr: Estimated


@dataclass(frozen=True)
class AtCount:
    """One estimator on the groups that show so many successes, which is what a gate can see: a single prompt's
    contribution against the true gradient of the whole pool."""

    successes: int
    groups: int
    pooled: Figures


def bins_of(pass_rates: Float[Tensor, "M"]) -> list[Bin]:
    """The bins that have prompts, by rising pass rate."""
    chosen = [("0", pass_rates <= 0)]
    for low, high in zip(_ENDS, _ENDS[1:], strict=False):
        inside = (pass_rates > low) & (pass_rates <= high if high < 1 else pass_rates < high)
        chosen.append((f"{low:g}–{high:g}", inside))
    chosen.append(("1", pass_rates >= 1))
    found = []
    for label, inside in chosen:
        if bool(inside.any()):
            members = tuple(inside.nonzero()[:, 0].tolist())
            found.append(Bin(label, float(pass_rates[inside].mean()), members))
    return found


def at_rates(single: Float[Tensor, "M R k"], bins: Sequence[Bin], true: Float[Tensor, "M H k"]) -> Iterable[AtRate]:
    """The figures of each bin in which there is any weight, from what each prompt contributes and its true gradient."""
    rounds = single.shape[1]
    for one in bins:
        members = list(one.prompts)
        mine = single[members]
        if not bool(mine.any()):
            continue
        sample = Sample.of(mine.flatten(0, 1), torch.arange(rounds).repeat(len(members)), rounds)
        own = cosine_with(sample, true[members].mean(dim=0))
        yield AtRate(one.label, figures(sample, true.mean(dim=0)), own, _snr(mine), _prompt_snr(mine))


def _snr(mine: Float[Tensor, "q R k"]) -> Estimated:
    """Of one of such prompts. A bin's own mean would hold 1/q of what each prompt has for itself, and so the more
    signal the fewer prompts there are; products of different prompts, in different rounds, have nothing of it."""
    sums = mine.sum(dim=0)
    whole, own = gram(sums, sums), torch.stack([gram(one, one) for one in mine])
    cross = torch.stack([gram(one, sums) for one in mine])
    shares, rounds = cross + cross.mT - own, torch.ones(mine.shape[1], dtype=torch.float64)

    def snr(weights: list[Tensor]) -> Tensor:
        # What is left of the products of the sums without a prompt, of which the jackknife never takes two.
        there, count = weights[0], weights[0].sum()
        products = whole - torch.einsum("q,qrs->rs", 1 - there, shares)
        alone = torch.einsum("q,qrs->rs", there, own)
        signal = within(products - alone, rounds) / (count * (count - 1))
        power = alone.diagonal().mean() / count
        return (signal / without_rounding(power - signal, power))[None]

    return jackknife(snr, [torch.ones(len(mine), dtype=torch.float64)])[0]


def _prompt_snr(mine: Float[Tensor, "q R k"]) -> Estimated:
    """Of single prompts, from products of different rounds of the same prompt."""
    products = torch.stack([gram(one, one) for one in mine]).mean(dim=0)

    def snr(weights: list[Tensor]) -> Tensor:
        signal, power = within(products, weights[0]), (weights[0] * products.diagonal()).sum() / weights[0].sum()
        return (signal / without_rounding(power - signal, power))[None]

    return jackknife(snr, [torch.ones(len(products), dtype=torch.float64)])[0]


def at_counts(pool: Pool, single: Float[Tensor, "M R k"], pooled: Float[Tensor, "H k"]) -> Iterable[AtCount]:
    """The figures of the groups of each number of successes, against the true gradient of the pool."""
    successes = pool.successes
    for count in range(pool.group_size + 1):
        prompts, rounds = (successes == count).nonzero(as_tuple=True)
        mine = single[prompts, rounds]
        if len(mine) and bool(mine.any()):
            yield AtCount(count, len(mine), figures(Sample.of(mine, rounds, pool.rounds), pooled))
