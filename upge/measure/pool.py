"""The sample that all algorithms are measured on: prompts, and for each of them rollouts in independent rounds.

The pool is the data set of the measurement: M prompts, each with R groups of n rollouts, its demonstrations and, where
there are, a preference pair. In each round the prompts are dealt anew into batches of Q, as an epoch of training does;
a prompt's group of the round goes with it. So a batch is a random set of Q prompts with rollouts of their own, and what
is computed in different rounds is independent given the prompts.

Two more sets of rollouts belong to no batch: those of the reference, in H independent parts, for the gradient of E[R],
and those that the prompts' pass rates are taken from.

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
from upge.train.prompt_order import permutation, stream_seed
from upge.train.sample import Trajectory, assemble
from upge.trajectories import Trajectories
from upge.views import SUCCESS_REWARD

#: Columns that are computed for each response, [t].
Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """What there is of a prompt in a round; all with the prompt's number in the pool as `group`."""

    rollouts: tuple[Trajectory, ...]
    demonstrations: tuple[Trajectory, ...] = ()
    pair: tuple[Trajectory, ...] = ()

    @property
    def successes(self) -> int:
        """How many of the rollouts count as a success."""
        return sum(rollout.reward > SUCCESS_REWARD for rollout in self.rollouts)

    def members(self, algorithm: Algorithm) -> list[Trajectory]:
        """Those that the algorithm learns from or compares with, in the order of training."""
        needs = algorithm.step_needs
        found = list(self.rollouts) if needs.rollouts else []
        if needs.preference_pairs and self.pair:
            return found + list(self.pair)
        return found + (list(self.demonstrations) if needs.demonstrations else [])


@dataclass(frozen=True)
class Pool:
    """The sample.

    Attributes:
        groups: [M][R].
        batches: [R][M/Q], the prompts of each batch of a round.
        reference: [M][H] rollouts, of the policy itself.
        pass_rates: [M] each from rollouts of its own.
    """

    groups: Sequence[Sequence[Group]]
    batches: Sequence[Sequence[Sequence[int]]]
    reference: Sequence[Sequence[Sequence[Trajectory]]]
    pass_rates: Float[Tensor, "M"]

    @property
    def prompts(self) -> int:
        """M."""
        return len(self.groups)

    @property
    def rounds(self) -> int:
        """R."""
        return len(self.batches)

    @property
    def group_size(self) -> int:
        """n."""
        return len(self.groups[0][0].rollouts)

    @property
    def prompts_per_batch(self) -> int:
        """Q."""
        return len(self.batches[0][0])

    @property
    def successes(self) -> Float[Tensor, "M R"]:
        """[M, R] successes of each group."""
        return torch.tensor([[group.successes for group in groups] for groups in self.groups])

    def pairs(self) -> list[Pair]:
        """Every response of a group with its prompt, each once."""
        everything = (t for groups in self.groups for g in groups for t in (*g.rollouts, *g.demonstrations, *g.pair))
        return list(dict.fromkeys(map(pair_of, everything)))


def pair_of(trajectory: Trajectory) -> Pair:
    """Prompt and response: two trajectories that are alike in them have the same gradient of log π."""
    return tuple(trajectory.prompt_ids), tuple(trajectory.response_ids)


def deal(prompts: int, per_batch: int, rounds: int, seed: int) -> list[list[list[int]]]:
    """[R][M/Q] the prompts of each batch: in every round all of them, in an order of the seed.

    Raises:
        ConfigError: `per_batch` does not divide the prompts.
    """
    if per_batch < 1 or prompts % per_batch:
        raise ConfigError(
            f"prompts_per_step: {per_batch} does not divide prompts={prompts}; choose a divisor, so that every batch "
            "has as many prompts"
        )
    orders = [permutation(prompts, stream_seed(seed, "deal", number)) for number in range(rounds)]
    return [[order[i : i + per_batch] for i in range(0, prompts, per_batch)] for order in orders]


def batches(
    pool: Pool, algorithm: Algorithm, columns: Mapping[Pair, Columns], step: int = 0
) -> Iterator[tuple[int, list[Trajectory], Trajectories]]:
    """(round, trajectories, the batch with all columns that the algorithm reads) of every batch with any trajectory.

    Args:
        columns: pair → 'logprobs', 'entropies' and whichever of 'reference_logprobs' and 'behavior_logprobs' there is.
        step: training steps behind the batch, for schedules; stateful gates stand at their beginning.
    """
    for number, dealt in enumerate(pool.batches):
        for prompts in dealt:
            members = [t for q in prompts for t in pool.groups[q][number].members(algorithm)]
            if members:
                yield number, members, _filled(members, algorithm, columns, step)


def _filled(
    members: Sequence[Trajectory], algorithm: Algorithm, columns: Mapping[Pair, Columns], step: int
) -> Trajectories:
    """The batch as the trainer completes it for one update, and the log-probs of the current policy."""
    batch, needs = assemble(members, step), algorithm.step_needs
    found = [columns[pair_of(t)] for t in members]
    names = {"logprobs", "entropies"} | needs.columns & {"reference_logprobs"}
    names |= {"behavior_logprobs"} & (found[0].keys() | needs.before)
    values = {}
    for name in names:
        values[name] = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
        for row, one in enumerate(found):
            # Strictly on-policy the policy that sampled is the current one.
            column = one.get(name, one["logprobs"]) if name == "behavior_logprobs" else one[name]
            values[name][row, : len(column)] = column
    return dataclasses.replace(batch, **values, state=algorithm.initial_state())
