"""The buffer of rollouts that later steps replay. It is the same on every rank and saved in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from upge.replay import Replay
from upge.train.distributed import World
from upge.train.files import disk_errors
from upge.train.prompt_order import permutation, stream_seed
from upge.train.resharding import read, reading
from upge.train.sample import Trajectory
from upge.verify import NamedReward

#: The buffer's file in a checkpoint.
FILE = "replay.pt"


@dataclass(frozen=True)
class KeptPrompt:
    """What the buffer keeps of a prompt.

    Attributes:
        successes: the number of successes in its last group.
        rollouts: its rollouts, with the log-probs of the policy that sampled them.
    """

    successes: int
    rollouts: tuple[Trajectory, ...]


class ReplayBuffer:
    """The rollouts that an algorithm keeps for later steps.

    It needs no random state: what is drawn follows from seed and step, and what is kept follows from the rollouts.

    Args:
        settings: what is kept and drawn.
        group_size: rollouts per prompt.
        prompts: prompts per step.
        seed: the run's seed.
        world: the run's processes.
    """

    def __init__(self, settings: Replay, group_size: int, prompts: int, seed: int, world: World) -> None:
        self.settings, self.group_size, self.seed, self.world = settings, group_size, seed, world
        keeps = settings.keep != "none" and settings.size > 0
        self._wanted = int(settings.share * prompts) if keeps else 0
        self._has_started = settings.start == 0
        #: Index of the example → its prompt. The one that has waited longest for a new rollout comes first.
        self._prompts: dict[int, KeptPrompt] = {}

    @property
    def fresh_rollouts(self) -> int:
        """The number of fresh rollouts in a replayed group."""
        return 0 if self.settings.rollouts is None else self.group_size - self.settings.rollouts

    def draw(self, step: int, others: Collection[int]) -> dict[int, list[Trajectory]]:
        """The replayed rollouts of a step by example, in the order in which they were drawn.

        Args:
            step: the step of the run, from 0.
            others: examples that the step may sample anyway, which are not drawn.
        """
        random = Random(stream_seed(self.seed, "replay", step))
        buckets: dict[int, list[int]] = {}
        for example, kept in sorted(self._prompts.items()):
            if example not in others and len(kept.rollouts) >= (self.settings.rollouts or 1):
                buckets.setdefault(kept.successes, []).append(example)
        drawn: dict[int, list[Trajectory]] = {}
        while buckets and len(drawn) < self._wanted:
            numbers = sorted(buckets)
            number = random.choices(numbers, [self._weight(k, len(buckets[k])) for k in numbers])[0]
            example = buckets[number].pop(random.randrange(len(buckets[number])))
            buckets = {k: members for k, members in buckets.items() if members}
            drawn[example] = self._chosen(self._prompts[example].rollouts)
        return drawn

    def joined(
        self,
        indices: list[int],
        fresh: list[Trajectory],
        replayed: Mapping[int, list[Trajectory]],
        own: list[Trajectory],
        step: int,
    ) -> tuple[list[int], list[Trajectory]]:
        """Add the replayed prompts of a step to those that it has sampled, in a seeded order.

        Args:
            indices, fresh: the examples of the other prompts, and their rollouts.
            replayed: the replayed rollouts by example.
            own: the fresh rollouts of these examples, whose groups are numbered from 0.
            step: the step of the run, from 0.

        Returns:
            The examples of all prompts, and their rollouts by group.
        """
        rollouts = fresh + [replace(one, group=one.group + len(indices)) for one in own]
        for group, kept in enumerate(replayed.values(), len(indices)):
            rollouts += [replace(one, group=group) for one in kept]
        # Shuffled, so that each of the step's updates gets replayed prompts.
        examples = indices + list(replayed)
        order = permutation(len(examples), stream_seed(self.seed, "replayed", step))
        places = {group: place for place, group in enumerate(order)}
        rollouts = sorted((replace(one, group=places[one.group]) for one in rollouts), key=lambda one: one.group)
        return [examples[group] for group in order], rollouts

    def _weight(self, successes: int, prompts: int) -> float:
        """The weight of drawing one of the prompts with this number of successes."""
        half = self.settings.prefer == "half"
        return math.exp(-((successes - self.group_size / 2) ** 2) / 2) if half else float(prompts)

    def _chosen(self, rollouts: Sequence[Trajectory]) -> list[Trajectory]:
        """The rollouts of a prompt to replay: those with the largest mean log-probs, earlier ones first if equal."""
        return sorted(rollouts, key=lambda one: -_mean_logprob(one))[: self.settings.rollouts or len(rollouts)]

    def entering(self, trajectories: Sequence[Trajectory]) -> list[int]:
        """The rows of a step's trajectories that enter the buffer after the step."""
        if not self._wanted or not self._starts(trajectories):
            return []
        groups = _groups(trajectories)
        if self.settings.keep == "all":
            whole = [rows for rows in groups.values() if all(trajectories[row].is_fresh for row in rows)]
            return [row for rows in whole for row in rows]
        partly = [rows for rows in groups.values() if 0 < _successes(trajectories, rows) < len(rows)]
        return [row for rows in partly for row in rows if trajectories[row].passed and trajectories[row].is_fresh]

    def _starts(self, trajectories: Sequence[Trajectory]) -> bool:
        passed = [t.passed for t in trajectories if t.is_fresh]
        return self._has_started or bool(passed) and sum(passed) >= self.settings.start * len(passed)

    def add(self, trajectories: Sequence[Trajectory], entering: Sequence[int], step: int) -> None:
        """Keep the rows `entering` of a step's trajectories.

        Args:
            trajectories: the step's trajectories; those that enter carry the log-probs of the policy that sampled them.
            entering: the result of `entering`.
            step: the step within the stage, from 0.
        """
        self._has_started = self._starts(trajectories)
        for rows in _groups(trajectories).values():
            example, successes = trajectories[rows[0]].example, _successes(trajectories, rows)
            new = [replace(trajectories[row], sampled_step=step) for row in rows if row in set(entering)]
            before = self._prompts.get(example)
            if self.settings.keep == "successes" and successes == len(rows):
                self._prompts.pop(example, None)
            elif new:
                self._prompts.pop(example, None)
                old = before.rollouts if before and self.settings.keep == "successes" else ()
                self._prompts[example] = KeptPrompt(successes, _distinct([*old, *new]))
            elif before is not None and successes and self.settings.keep == "successes":
                self._prompts[example] = replace(before, successes=successes)
        while len(self) > self.settings.size:
            self._prompts.pop(next(iter(self._prompts)))

    def __len__(self) -> int:
        """The number of rollouts."""
        return sum(len(kept.rollouts) for kept in self._prompts.values())

    def metrics(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """The buffer's metrics after a step; docs/metrics.md lists them.

        Args:
            trajectories: the step's trajectories.
            step: the step within the stage, from 0.
        """
        rollouts = [t for t in trajectories if not t.is_demonstration]
        ages = [step - t.sampled_step for t in rollouts if t.sampled_step is not None]
        metrics = {"replay/size": len(self), "replay/prompts": len(self._prompts)}
        metrics |= {"replay/share": len(ages) / max(1, len(rollouts))}
        return metrics | ({"replay/age": sum(ages) / len(ages)} if ages else {})

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the buffer to the checkpoint of `step`, from the main rank; all ranks call it.

        Raises:
            StorageError: the file cannot be written; all ranks raise it.
        """
        prompts = [(k, kept.successes, [_plain(t) for t in kept.rollouts]) for k, kept in self._prompts.items()]
        with self.world.together(), disk_errors(checkpoint):
            if self.world.is_main:
                torch.save({"has_started": self._has_started, "prompts": prompts}, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Restore what `save` wrote; all ranks call it.

        Raises:
            ModelError: the file is missing or damaged; all ranks raise it.
        """
        with self.world.together(), reading(checkpoint):
            state = read(checkpoint / FILE)
        self._has_started = state["has_started"]
        self._prompts = {k: KeptPrompt(n, tuple(map(_from_plain, kept))) for k, n, kept in state["prompts"]}


def _plain(trajectory: Trajectory) -> Mapping[str, Any]:
    """The trajectory's fields as plain values; a checkpoint may hold no others."""
    fields = {item.name: getattr(trajectory, item.name) for item in dataclasses.fields(trajectory)}
    return fields | {"rewards": tuple(map(tuple, trajectory.rewards))}


def _from_plain(fields: Mapping[str, Any]) -> Trajectory:
    return Trajectory(**{**fields, "rewards": tuple(NamedReward(*one) for one in fields["rewards"])})


def _groups(trajectories: Sequence[Trajectory]) -> dict[int, list[int]]:
    """Group → the rows of its rollouts."""
    groups: dict[int, list[int]] = {}
    for row, trajectory in enumerate(trajectories):
        if not trajectory.is_demonstration:
            groups.setdefault(trajectory.group, []).append(row)
    return groups


def _successes(trajectories: Sequence[Trajectory], rows: Sequence[int]) -> int:
    return sum(trajectories[row].passed for row in rows)


def _distinct(rollouts: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
    """The rollouts without those whose response equals that of an earlier one."""
    distinct: dict[tuple[int, ...], Trajectory] = {}
    for rollout in rollouts:
        distinct.setdefault(rollout.response_ids, rollout)
    return tuple(distinct.values())


def _mean_logprob(rollout: Trajectory) -> float:
    """The mean log-prob of a rollout's tokens. Its negative estimates the entropy of the policy that sampled them."""
    values = rollout.sampler_logprobs or (0.0,)
    return math.fsum(values) / len(values)
