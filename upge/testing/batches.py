"""Test batches that are hard for parts and algorithms: off-policy, ragged, extreme, with holes, or degenerate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upge.trajectories import Trajectories
from upge.views import NAMED_REWARDS, TOKEN_COLUMNS, TRAJECTORY_COLUMNS

#: What a batch has besides numbers per token or trajectory.
_REST = ("step", "state", "pass_threshold", "reward_weights")
#: Columns with one floating-point number per token.
NUMBERS = tuple(name for name in TOKEN_COLUMNS if name not in ("response_mask", "is_demonstration_token"))


def random_batch(
    seed: int = 0,
    groups: int = 4,
    group_size: int = 4,
    length: int = 7,
    pairs: bool = True,
    rewards: Collection[str] = (),
) -> Trajectories:
    """An off-policy batch in float64 with rollouts and one demonstration per group, and with every column filled.

    It has several rewards by name: 'correct', which is the column `rewards`, 'format', and those that are asked for.

    All rollouts of the first group fail and all of the second succeed; one response is empty. In every second
    trajectory the trainer and the sampler agree. Every third trajectory was cut.

    Args:
        length: tokens of the longest response.
        pairs: whether each group has one chosen and one rejected rollout.
        rewards: names of further rewards.
    """
    g = torch.Generator().manual_seed(seed)
    size = group_size + 1
    b = groups * size
    lengths = torch.randint(1, length + 1, (b,), generator=g)
    lengths[torch.randint(0, b, (1,), generator=g)] = length
    lengths[3] = 0

    def noise(scale: float = 1.0) -> Tensor:
        return torch.randn(b, length, dtype=torch.float64, generator=g) * scale

    logprobs = -noise().abs() - 0.05
    correct = torch.randint(0, 2, (b,), generator=g).double()
    correct[:size], correct[size : 2 * size] = 0.0, 1.0
    is_demonstration = torch.arange(b) % size == group_size
    correct[is_demonstration] = 1.0
    preference = torch.zeros(b, dtype=torch.long)
    if pairs:
        preference[torch.arange(b) % size == 0], preference[torch.arange(b) % size == 1] = 1, -1
    behavior, sampler = ((logprobs + noise(0.3)).clamp(max=-1e-3) for _ in range(2))
    sampler[::2] = behavior[::2]
    return Trajectories(
        logprobs=logprobs.requires_grad_(),
        response_mask=torch.arange(length) < lengths[:, None],
        rewards=correct,
        named_rewards=_further_rewards(seed, b, rewards) | {"correct": correct},
        reward_weights={"format": -0.5},
        group=torch.arange(b) // size * 7 + 3,
        is_demonstration=is_demonstration,
        behavior_logprobs=behavior,
        sampler_logprobs=sampler,
        reference_logprobs=(logprobs.detach() + noise(0.5)).clamp(max=-1e-3),
        values=noise(0.5),
        entropies=noise().abs().requires_grad_(),
        teacher_logprobs=(logprobs.detach() + noise(0.5)).clamp(max=-1e-3),
        score_norms=noise().abs().clamp(max=2.0),
        finished=torch.arange(b) % 3 != 2,
        is_replayed=~is_demonstration & (torch.arange(b) % size == 1),
        preference=preference,
        step=3,
        **remembered(torch.arange(b) // size, 3),
    )


def _further_rewards(seed: int, b: int, names: Collection[str]) -> dict[str, Tensor]:
    """[b] for 'correct', 'format' and each of `names`, from -1/2 to 1."""
    g = torch.Generator().manual_seed(seed + 1000)
    return {n: torch.randint(-1, 3, (b,), generator=g).double() / 2 for n in sorted({"correct", "format", *names})}


def remembered(prompt: Tensor, step: int) -> dict[str, Any]:
    """[B] columns of the memory for trajectories of the prompts 0, 1, 2, ...; the first prompt is new in this step."""
    visits = (prompt % 3).clamp(max=step)
    attempts = visits * 4
    successes = (attempts * (prompt % 5) / 5).long()
    rate = successes.double() / attempts.clamp(min=1)  # 0 for the new prompt, because comparisons with NaN fail
    # No two prompts have the same value, and none is a round number.
    value = 0.05 + 0.9 * (((prompt + 1) * 0.6180339887498949) % 1.0)
    return {
        "prompt_value": value.double(),
        "prompt_attempts": attempts,
        "prompt_successes": successes,
        "prompt_last_pass_rate": rate,
        "prompt_age": torch.where(attempts > 0, torch.ones_like(prompt), torch.full_like(prompt, step + 1)),
    }


def guided(batch: Trajectories, longest: int = 5) -> Trajectories:
    """The batch with one to `longest` tokens of a demonstration at the start of two of every four rollouts."""
    rollouts = (~batch.is_demonstration).nonzero()[:, 0]
    rollouts = rollouts[torch.arange(len(rollouts)) // 2 % 2 == 1]
    lengths = torch.zeros_like(batch.lengths)
    lengths[rollouts] = torch.arange(len(rollouts)) % longest + 1
    places = batch.response_mask.cumsum(dim=1)
    tokens = batch.is_demonstration_token | (batch.response_mask & (places <= lengths[:, None]))
    return dataclasses.replace(batch, is_demonstration_token=tokens)


def extreme_batch(pairs: bool = True, ratio: float = 30.0, rewards: Collection[str] = ()) -> Trajectories:
    """A batch with the most extreme numbers that training can produce.

    It has log-probs of -40, -1e-12 and 0, ratios of e^±`ratio` to the behavior and the reference policy and of e^±20
    to the sampler, entropies of 0, and rewards of -1, 0 and 1, which are equal in some groups.
    """
    batch = random_batch(5, groups=6, pairs=pairs, rewards=rewards)
    g = torch.Generator().manual_seed(5)

    def choice(*numbers: float) -> Tensor:
        places = torch.randint(0, len(numbers), batch.response_mask.shape, generator=g)
        return torch.tensor(numbers, dtype=torch.float64)[places]

    logprobs = choice(-40.0, -1e-12, 0.0, -0.7)
    behavior = (logprobs - choice(-ratio, 0.0, ratio)).clamp(max=0)
    correct = batch.rewards.clone()
    third, fourth, fifth = (batch.group_index == q for q in (2, 3, 4))
    correct[third], correct[fourth] = -1.0, correct[fourth] * 2 - 1
    correct[fifth & ~batch.is_demonstration] = 0.0
    return dataclasses.replace(
        batch,
        logprobs=logprobs.requires_grad_(),
        behavior_logprobs=behavior,
        sampler_logprobs=(behavior - choice(-20.0, 0.0, 20.0)).clamp(max=0),
        reference_logprobs=(logprobs.detach() - choice(-ratio, 0.0, ratio)).clamp(max=0),
        values=choice(-5.0, 0.0, 5.0),
        entropies=choice(0.0, 12.0).requires_grad_(),
        teacher_logprobs=(logprobs.detach() - choice(-ratio, 0.0, ratio)).clamp(max=0),
        score_norms=choice(0.0, 1e-12, 2.0),
        rewards=correct,
        named_rewards={**batch.named_rewards, "correct": correct},
    )


class Degenerate(NamedTuple):
    """A batch without anything to compare.

    Attributes:
        has_rollouts: False if there is no pass rate, because the batch has no rollouts. Parts that require several
            rollouts per prompt by their `min_group_size` never get such a batch.
    """

    description: str
    batch: Trajectories
    has_rollouts: bool = True


def degenerate_batches(rewards: Collection[str] = ()) -> list[Degenerate]:
    """Batches with groups of one, one kind of trajectory, equal rewards, no tokens, one trajectory, or none."""
    batch = random_batch(7, pairs=False, rewards=rewards)
    rollouts, demonstrations = (rows.nonzero()[:, 0] for rows in (~batch.is_demonstration, batch.is_demonstration))
    nothing = torch.zeros_like(batch.response_mask)
    right = torch.ones_like(batch.rewards)
    wrong = torch.where(batch.is_demonstration, right, 0.0)
    alone = _alone(batch, rollouts)
    return [
        Degenerate("groups of one rollout", dataclasses.replace(alone, group=torch.arange(len(alone)))),
        Degenerate("rollouts alone", alone),
        Degenerate("demonstrations alone", _alone(batch, demonstrations), has_rollouts=False),
        Degenerate("rollouts that all succeed", _rewarded(batch, right)),
        Degenerate("rollouts that all fail", _rewarded(batch, wrong)),
        Degenerate("empty responses", dataclasses.replace(batch, response_mask=nothing)),
        Degenerate("a single rollout", _alone(batch, rollouts[-1:])),
        Degenerate("a single demonstration", _alone(batch, demonstrations[-1:]), has_rollouts=False),
        Degenerate("no trajectories", _alone(batch, rollouts[:0])),
    ]


def _rewarded(batch: Trajectories, rewards: Tensor) -> Trajectories:
    """The batch with the same numbers in all of its rewards."""
    return dataclasses.replace(batch, rewards=rewards, named_rewards=dict.fromkeys(batch.named_rewards, rewards))


def _alone(batch: Trajectories, rows: Tensor) -> Trajectories:
    return dataclasses.replace(select_rows(batch, rows), row=None)


# The same batch in another form.


def select_rows(batch: Trajectories, rows: Tensor) -> Trajectories:
    """Some rows of the batch with their log-probs and entropies, cut to their longest response."""
    assert batch.logprobs is not None and batch.entropies is not None
    return batch.select(rows, batch.logprobs[rows], entropies=batch.entropies[rows])


def padded(batch: Trajectories) -> Trajectories:
    """The batch with three more columns and NaN in all padding."""
    return _rebuilt(batch, lambda column, fill: torch.nn.functional.pad(column, (0, 3), value=fill))


def punched(batch: Trajectories) -> Trajectories:
    """The batch with three more columns and holes in the response mask, within responses and before them.

    The holes contain NaN and large numbers. The tokens in the response mask are the same, in the same order.
    """
    rows, width = batch.response_mask.shape
    g = torch.Generator().manual_seed(rows)
    places = torch.rand(rows, width + 3, generator=g).argsort(dim=1)[:, :width].sort(dim=1).values

    def spread(column: Tensor, fill: float | bool) -> Tensor:
        wide = torch.full((rows, width + 3), fill, dtype=column.dtype)
        if column.dtype != torch.bool:
            wide[:, ::2] = 1e30
        return wide.scatter(1, places, column)

    return _rebuilt(batch, spread)


def _rebuilt(batch: Trajectories, spread: Callable[[Tensor, float | bool], Tensor]) -> Trajectories:
    """The batch with each column widened by `spread(column, fill)`, and `fill` outside the response mask."""
    mask, columns = batch.response_mask, {"response_mask": spread(batch.response_mask, False)}
    columns["is_demonstration_token"] = spread(batch.is_demonstration_token, False)
    for name in NUMBERS:
        column = getattr(batch, name)
        columns[name] = spread(column.detach().masked_fill(~mask, float("nan")), float("nan"))
    rest = {name: getattr(batch, name) for name in (*TRAJECTORY_COLUMNS, *_REST, NAMED_REWARDS, "succeeded")}
    return Trajectories(**columns, **rest)


def reordered(batch: Trajectories, order: Tensor) -> Trajectories:
    """The trajectories in another order, as a separate batch."""
    columns = {name: getattr(batch, name).detach()[order] for name in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS)}
    rest = {name: getattr(batch, name) for name in _REST}
    rest[NAMED_REWARDS] = {name: column[order] for name, column in batch.named_rewards.items()}
    rest["succeeded"] = None if batch.succeeded is None else batch.succeeded[order]
    return Trajectories(**{**columns, "row": None}, **rest)


def in_precision(batch: Trajectories, dtype: torch.dtype) -> Trajectories:
    """The batch with its per-token columns in another precision, as an engine provides them."""
    columns = {name: getattr(batch, name).detach().to(dtype) for name in NUMBERS}
    live = {name: columns[name].requires_grad_() for name in ("logprobs", "entropies")}
    return dataclasses.replace(batch, **{**columns, **live})


def splits(batch: Trajectories, reach: str, seed: int) -> Iterator[list[Tensor]]:
    """Splits of the batch into micro-batches that respect `reach`, each as a list of row indices."""
    g = torch.Generator().manual_seed(seed + 100)
    if reach == "batch":  # evaluated before the batch is split
        yield [torch.arange(len(batch))]
    elif reach == "group":
        groups = [(batch.group == q).nonzero()[:, 0] for q in batch.group.unique()]
        yield groups
        yield [torch.cat(groups[1:]), groups[0]]
    else:
        order = torch.randperm(len(batch), generator=g)
        yield list(order.split([1, 1, 1, 2, 3, 5, len(batch) - 13]))
        yield list(torch.arange(len(batch)).split(4))
