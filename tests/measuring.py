"""A policy of a few responses as `Scores`, and pools drawn from it: what is measured there is known exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from upge.measure import Group, Pool, Request, deal
from upge.measure.scores import Pair
from upge.theory.draws import Setting
from upge.theory.policy import SoftmaxPolicy
from upge.train.sample import Trajectory


class TableScores:
    """The gradients of a `SoftmaxPolicy` by its table, whole, in float64."""

    def __init__(self, policy: SoftmaxPolicy) -> None:
        self.policy, self.width = policy, policy.logits.numel()
        self.number = {response: i for i, response in enumerate(policy.responses.lists())}

    def columns(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        results = []
        for _, response in pairs:
            row, length = self.number[response], len(response)
            both = self.policy.token_logprobs[row, :length], self.policy.token_entropies[row, :length]
            results.append(tuple(values.detach() for values in both))
        return results

    def gradients(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Tensor]]:
        scores, entropy_scores = self.policy.token_scores, self.policy.entropy_scores
        for number, ((_, response), by_logprobs, by_entropies, _) in enumerate(requests):
            row, length = self.number[response], len(response)
            total = torch.einsum("t,tpv->pv", by_logprobs, scores[row, :length])
            if by_entropies is not None:
                total = total + torch.einsum("t,tpv->pv", by_entropies, entropy_scores[row, :length])
            yield [number], total.flatten()[None]


def drawn(
    setting: Setting,
    prompts: int,
    rounds: int,
    group_size: int,
    parts: int,
    seed: int = 0,
    part_size: int = 2,
) -> Pool:
    """A pool whose prompts are all alike, in batches of one prompt; rollouts and demonstrations are drawn anew in
    every round."""
    generator = torch.Generator().manual_seed(seed)
    responses, reward = setting.policy.responses.lists(), setting.reward.tolist()

    def some(policy: SoftmaxPolicy, count: int, q: int, shown: bool = False) -> tuple[Trajectory, ...]:
        chosen = torch.multinomial(policy.probabilities, count, replacement=True, generator=generator).tolist()
        return tuple(Trajectory(q, q, (q,), responses[i], reward[i], shown) for i in chosen)

    def group(q: int) -> Group:
        shown = () if setting.expert is None else some(setting.expert, 1, q, shown=True)
        return Group(some(setting.drawn_from, group_size, q), shown)

    groups = [[group(q) for _ in range(rounds)] for q in range(prompts)]
    reference = [[some(setting.policy, part_size, q) for _ in range(parts)] for q in range(prompts)]
    return Pool(groups, deal(prompts, 1, rounds, seed), reference, torch.full((prompts,), 0.5, dtype=torch.float64))
