"""Random rollouts of a step with realistic, log-normal lengths, in groups of which some have no signal."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from upge.train.sample import Trajectory

SPREAD, PROMPT_SPREAD = 0.5, 0.2
"""Standard deviations of the logarithms of response and prompt lengths. With a mean of 235 tokens, the longest of 80
responses then has about 690 tokens."""


@dataclass(frozen=True)
class Shape:
    """The shape of a batch.

    Attributes:
        groups, size: number of prompts, and of responses to each.
        silent: share of the groups whose rewards are all equal, rounded to whole groups.
        prompt, response, longest: mean tokens of a prompt and of a response, and the maximum of a response.
    """

    groups: int
    size: int
    silent: float = 0.0
    prompt: int = 96
    response: int = 235
    longest: int = 694

    def scaled(self, by: float) -> Shape:
        """The same shape with all lengths multiplied."""
        lengths = (max(2, round(by * tokens)) for tokens in (self.prompt, self.response, self.longest))
        return Shape(self.groups, self.size, self.silent, *lengths)

    @property
    def silent_groups(self) -> int:
        """The number of groups without a signal."""
        return round(self.silent * self.groups)


def made(shape: Shape, vocabulary: int, seed: int = 0) -> list[Trajectory]:
    """Rollouts of random tokens.

    Groups without a signal are spread over the batch, alternately all right and all wrong. Lengths, tokens and the
    rewards of the other groups do not depend on their number.
    """
    chance = random.Random(seed)
    every = shape.groups / shape.silent_groups if shape.silent_groups else 0.0
    silent = {int(every * (number + 0.5)): number for number in range(shape.silent_groups)}
    rollouts = []
    for group in range(shape.groups):
        prompt = _tokens(chance, _length(chance, shape.prompt, PROMPT_SPREAD, 2 * shape.prompt), vocabulary)
        right = chance.randint(1, shape.size - 1)
        for number in range(shape.size):
            response = _tokens(chance, _length(chance, shape.response, SPREAD, shape.longest), vocabulary)
            reward = float(silent[group] % 2 if group in silent else number < right)
            rollouts.append(Trajectory(group, group, prompt, response, reward, is_demonstration=False))
    return rollouts


def length_summary(rollouts: Sequence[Trajectory]) -> str:
    """The mean and maximum lengths of prompts and responses, as text."""
    responses = [len(t.response_ids) for t in rollouts]
    prompts = [len(t.prompt_ids) for t in rollouts]
    return (
        f"prompts of {sum(prompts) / len(prompts):.0f} tokens on average (longest {max(prompts)}), "
        f"responses of {sum(responses) / len(responses):.0f} (longest {max(responses)})"
    )


def _length(chance: random.Random, mean: int, spread: float, longest: int) -> int:
    drawn = chance.lognormvariate(math.log(mean) - spread**2 / 2, spread)
    return min(max(round(drawn), 2), longest)


def _tokens(chance: random.Random, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(chance.randrange(2, vocabulary) for _ in range(length))
