"""The sample that all algorithms are measured on: prompts, each with rollouts in independent rounds.

The pool is the data set of the measurement: M prompts, each with R groups of n rollouts, its demonstrations and, if the
data has them, a preference pair. Each round assigns the prompts to batches of Q at random, as an epoch of training
does, and each prompt brings its group of that round. A batch is thus a random set of Q prompts with fresh rollouts, and
results of different rounds are independent given the prompts.

Two more sets of rollouts belong to no batch: the reference rollouts, in H independent parts, which give the gradient of
E[R], and the rollouts that give the prompts' pass rates.

Legend: M prompts, R rounds, Q prompts of a batch, n rollouts of a group, H parts of the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.measure.scores import Pair
from upge.prompt_memory import PromptRecord
from upge.train.prompt_order import permutation, stream_seed
from upge.train.sample import Trajectory, assemble
from upge.trajectories import Trajectories
from upge.views import Distributions

#: Column name → [t] its values on the tokens of one response.
Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A prompt's trajectories in one round.

    Attributes:
        rollouts: the policy's responses, with the prompt's number in the pool as their `group`, like the others.
    """

    rollouts: tuple[Trajectory, ...]
    demonstrations: tuple[Trajectory, ...] = ()
    pair: tuple[Trajectory, ...] = ()

    @property
    def successes(self) -> int:
        """The number of rollouts that count as a success."""
        return sum(rollout.passed for rollout in self.rollouts)

    def members(self, algorithm: Algorithm) -> list[Trajectory]:
        """The trajectories that the algorithm learns from or compares with, in the order of training."""
        needs = algorithm.step_needs
        members = list(self.rollouts) if needs.rollouts else []
        if needs.preference_pairs and self.pair:
            return members + list(self.pair)
        return members + (list(self.demonstrations) if needs.demonstrations else [])


@dataclass(frozen=True)
class Pool:
    """The sample.

    Attributes:
        groups: [M][R] the group of each prompt in each round.
        batches: [R][M/Q] the prompts of each batch of a round.
        reference: [M][H] rollouts of the policy itself, for the true gradient.
        pass_rates: [M] the prompts' pass rates, from separate rollouts.
    """

    groups: Sequence[Sequence[Group]]
    batches: Sequence[Sequence[Sequence[int]]]
    reference: Sequence[Sequence[Sequence[Trajectory]]]
    pass_rates: Float[Tensor, "M"]

    @property
    def prompts(self) -> int:
        """M, the number of prompts."""
        return len(self.groups)

    @property
    def rounds(self) -> int:
        """R, the number of rounds."""
        return len(self.batches)

    @property
    def group_size(self) -> int:
        """n, the rollouts of a group."""
        return len(self.groups[0][0].rollouts)

    @property
    def prompts_per_batch(self) -> int:
        """Q, the prompts of a batch."""
        return len(self.batches[0][0])

    @property
    def successes(self) -> Float[Tensor, "M R"]:
        """[M, R] the number of successes in each group."""
        return torch.tensor([[group.successes for group in groups] for groups in self.groups])

    def pairs(self) -> list[Pair]:
        """The distinct (prompt, response) pairs of all groups."""
        trajectories = (t for groups in self.groups for g in groups for t in (*g.rollouts, *g.demonstrations, *g.pair))
        return list(dict.fromkeys(map(pair_of, trajectories)))


def pair_of(trajectory: Trajectory) -> Pair:
    """The trajectory's prompt and response; trajectories that share both have the same gradient of log π."""
    return tuple(trajectory.prompt_ids), tuple(trajectory.response_ids)


def deal(prompts: int, per_batch: int, rounds: int, seed: int) -> list[list[list[int]]]:
    """[R][M/Q] the prompts of each batch; every round has all prompts, in an order that follows from the seed.

    Raises:
        ConfigError: `per_batch` does not divide the number of prompts.
    """
    if per_batch < 1 or prompts % per_batch:
        raise ConfigError(
            f"prompts_per_step: {per_batch} does not divide prompts={prompts}; choose a divisor, so that all batches "
            "have the same number of prompts"
        )
    orders = [permutation(prompts, stream_seed(seed, "deal", number)) for number in range(rounds)]
    return [[order[i : i + per_batch] for i in range(0, prompts, per_batch)] for order in orders]


def batches(
    pool: Pool, algorithm: Algorithm, columns: Mapping[Pair, Columns], step: int = 0
) -> Iterator[tuple[int, list[Trajectory], Trajectories]]:
    """Iterate over the batches of a pool that have trajectories for an algorithm.

    Args:
        columns: pair → 'logprobs', 'entropies' and, where known or read, 'reference_logprobs', 'teacher_logprobs',
            'behavior_logprobs', 'score_norms' and [t, V] 'distribution/MODEL'.
        step: number of training steps before the batch, for schedules. Stateful gates have their initial state.

    Yields:
        (round, trajectories, the batch with all columns that the algorithm reads).
    """
    for number, dealt in enumerate(pool.batches):
        for prompts in dealt:
            members = [t for q in prompts for t in pool.groups[q][number].members(algorithm)]
            if members:
                yield number, members, _filled(members, algorithm, columns, step)


def _filled(
    members: Sequence[Trajectory], algorithm: Algorithm, columns: Mapping[Pair, Columns], step: int
) -> Trajectories:
    """The batch with the columns that the trainer adds for one update, and the current policy's log-probs.

    The memory of its prompts is empty.
    """
    if algorithm.memory is not None:
        new = algorithm.memory.remembered(PromptRecord(), 0)
        members = [dataclasses.replace(one, remembered=new) for one in members]
    batch, needs = assemble(members, step), algorithm.step_needs
    responses = [columns[pair_of(t)] for t in members]
    names = {"logprobs", "entropies"} | needs.columns & {"reference_logprobs", "teacher_logprobs", "score_norms"}
    names |= {"behavior_logprobs"} & (responses[0].keys() | needs.precomputed)
    values: dict[str, Tensor] = {}
    for name in names:
        values[name] = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
        for row, one in enumerate(responses):
            # On-policy, the behavior policy is the current one.
            column = one.get(name, one["logprobs"]) if name == "behavior_logprobs" else one[name]
            values[name][row, : len(column)] = column
    given = _distributions(members, responses, batch.response_mask) if algorithm.supports else None
    return dataclasses.replace(batch, **values, state=algorithm.initial_state(), distributions=given)


def _distributions(members: Sequence[Trajectory], responses: Sequence[Columns], mask: Tensor) -> Distributions:
    """Those of the responses, [B, T, V] each, from their columns `distribution/MODEL`."""
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([token for t in members for token in t.response_ids])
    models: dict[str, Tensor | None] = dict.fromkeys(("policy", "reference", "teacher"))
    for name in models:
        if f"distribution/{name}" in responses[0]:
            every = torch.cat([one[f"distribution/{name}"] for one in responses]).double()
            models[name] = torch.zeros(*mask.shape, every.shape[-1], dtype=every.dtype).index_put((mask,), every)
    return Distributions(tokens, **models)  # pyright: ignore[reportArgumentType]
