"""Batches that lie on the edges of the settings: ratios a hair inside and outside of every bound, rewards other than 0
and 1, demonstrations that are wrong, pass rates of every size. Each is called as the cases of policy.py are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests import policy
from tests.policy import Sample, changed, log_softmax, sample

#: How far from a bound a ratio lies, as a share of it: a bound that is changed by 1 % passes over some of them.
HAIR = 0.005


def around(bound: float) -> tuple[float, float]:
    return bound * (1 - HAIR), bound * (1 + HAIR)


#: log r of single tokens: clips relative to 1, clips of log r, caps on r itself, mean log r of a response.
TOKEN_RATIOS = (
    *(math.log1p(-x) for x in around(0.2)),
    *(math.log1p(x) for bound in (0.2, 0.28) for x in around(bound)),
    *(side * x for bound in (0.4,) for x in around(bound) for side in (-1, 1)),
    *(math.log(x) for bound in (0.2, 1.8, 4.0, 5.0, 10.0, 20.0) for x in around(bound)),
)
#: π_θ - π_old of single tokens.
MOVED = tuple(side * x for x in around(0.15) for side in (-1, 1))
#: s - 1 of whole responses.
SEQUENCE_RATIOS = (
    *(-x for x in (*around(3e-4), 2.5e-4, 3.5e-4, *around(2e-3))),
    *(x for x in (*around(3e-4), *around(4e-4), 3.5e-4, 4.5e-4, *around(2.5e-3))),
)


def placed(values: tuple[float, ...], shape: tuple[int, int]) -> Tensor:
    """[B, T] the values in turn, each row beginning with another one."""
    number = torch.arange(shape[0])[:, None] + torch.arange(shape[1])
    return torch.tensor(values, dtype=torch.float64)[number % len(values)]


def alternating(s: Sample) -> Tensor:
    """[B] every other rollout of a question succeeds; demonstrations do."""
    number = torch.arange(len(s.tokens)) - torch.searchsorted(s.batch.group, s.batch.group)
    return torch.where(s.batch.is_demonstration, 1.0, (number % 2).double()).double()


def token_bounds(seed: int, pairs: bool, ratios: tuple[float, ...] = TOKEN_RATIOS, groups: int = 4) -> Sample:
    """Every one of `ratios`, with advantages of both signs; the critic knows next to nothing."""
    length = len(ratios)
    s = sample(seed, pairs=pairs, groups=groups, length=length, vocabulary=101)  # a ratio of 0.2 leaves room below 1
    mask = torch.ones_like(s.batch.response_mask)
    mask[2::7, length // 2 :] = False
    logprobs, entropies = log_softmax(s.logits, s.tokens)  # of the tokens that `sample` has as padding, too
    noise = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 70))
    away = logprobs.detach() - placed(ratios, mask.shape)
    columns = {f"{name}_logprobs": away for name in ("behavior", "reference", "sampler")}
    columns |= {"logprobs": logprobs, "entropies": entropies, "values": 0.02 * noise}
    return changed(s, response_mask=mask, rewards=alternating(s), **columns)


def guided(case: str, seed: int, s: Sample) -> Sample:
    """The sample `s` of a case with guided rollouts; at the bounds of tokens with more of them and longer prefixes."""
    if case != "token_bounds":
        return policy.guided(s)
    ratios = (*TOKEN_RATIOS, *(math.log(x) for x in around(3.0)))
    return policy.guided(token_bounds(seed, False, ratios, groups=24), longest=len(ratios) - 4)


def probability_bounds(seed: int, pairs: bool) -> Sample:
    """Every change of `MOVED`, of tokens that are neither rare nor certain, with advantages of both signs."""
    s = sample(seed, pairs=pairs, vocabulary=3, spread=0.5)
    now = s.batch.logprobs.detach().exp()
    before = now - placed(MOVED, now.shape)
    inside = (before > 0.01) & (before < 0.99)
    return changed(s, rewards=alternating(s), behavior_logprobs=torch.where(inside, before, now).log())


def sequence_bounds(seed: int, pairs: bool) -> Sample:
    """Every ratio of `SEQUENCE_RATIOS` as the geometric mean of four responses, two right and two wrong; the
    reference policy is far off, on either side in turn."""
    s = sample(seed, pairs=pairs, groups=len(SEQUENCE_RATIOS), vocabulary=401)
    mask = s.batch.response_mask
    noise = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 80)) * mask
    noise = 0.1 * (noise - noise.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True))
    wanted = torch.tensor(SEQUENCE_RATIOS, dtype=torch.float64).log1p()[s.batch.group][:, None]
    far = torch.where(s.batch.group % 2 == 0, 2.5, -2.5)[:, None]
    away = {
        f"{name}_logprobs": s.batch.logprobs.detach() - (noise + mean) * mask
        for name, mean in zip(("behavior", "reference"), (wanted, far), strict=True)
    }
    return changed(s, rewards=alternating(s), **away)


def fractional(seed: int, pairs: bool) -> Sample:
    """Rewards between 0 and 1, half among them, of demonstrations too; two questions have but one reward."""
    s = sample(seed, pairs=pairs, groups=8)
    rewards = torch.randint(0, 5, s.batch.rewards.shape, generator=torch.Generator().manual_seed(seed + 90)) / 4
    rewards[s.batch.group == 0], rewards[s.batch.group == 1] = 0.25, 0.75
    return changed(s, rewards=rewards.double())


def signed(seed: int, pairs: bool) -> Sample:
    """Rewards of 1 and -1."""
    s = sample(seed, pairs=pairs)
    return changed(s, rewards=2 * s.batch.rewards - 1)


def wrong_demonstrations(seed: int, pairs: bool) -> Sample:
    """Two demonstrations a question; of three questions the first is wrong, one of these fails and one succeeds."""
    s = sample(seed, pairs=pairs, demonstrations=2)
    first = s.batch.is_demonstration & ~s.batch.is_demonstration.roll(1)
    return changed(s, rewards=torch.where(first & (s.batch.group < 3), 0.0, s.batch.rewards))


def rates(seed: int, pairs: bool) -> Sample:
    """Questions with 0, 1, ..., 11 successes among 11 rollouts."""
    s = sample(seed, pairs=pairs, groups=12, rollouts=11, length=3)
    number = torch.arange(len(s.tokens)) % 12
    return changed(s, rewards=torch.where(s.batch.is_demonstration, 1.0, (number < s.batch.group).double()).double())


def quiet(seed: int, pairs: bool) -> Sample:
    """No rollout earns anything, the critic hardly expects anything: what is left to whiten is tiny."""
    s = sample(seed, pairs=pairs)
    return changed(s, rewards=s.batch.is_demonstration.double(), values=1e-3 * s.batch.values)


EDGES: dict[str, Callable[[int, bool], Sample]] = {
    "token_bounds": token_bounds,
    "probability_bounds": probability_bounds,
    "sequence_bounds": sequence_bounds,
    "fractional": fractional,
    "signed": signed,
    "wrong_demonstrations": wrong_demonstrations,
    "rates": rates,
    "quiet": quiet,
}
