"""Guided rollouts: some rollouts of a prompt continue the beginning of one of its demonstrations, the prefix.

The seed and the step determine the prefixes, so they are the same in a resumed run and for any number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from upge.checks import check_fields
from upge.components.base import floor_of
from upge.errors import ConfigError
from upge.gates import Schedule


class PrefixLength(ABC):
    """The distribution of a prefix's length. Each subclass is a frozen dataclass."""

    @abstractmethod
    def tokens(self, length: int, step: int, random: Random) -> int:
        """The number of tokens of a prefix.

        Args:
            length: number of tokens of the demonstration.
            step: number of training steps so far.
            random: the source of random numbers.
        """

    @abstractmethod
    def describe(self) -> str:
        """The length as a noun phrase."""


@dataclass(frozen=True)
class UniformPrefix(PrefixLength):
    """⌊u·length⌋ tokens, u uniform in [low, high] (arXiv 2507.01679).

    Attributes:
        low, high: shares of the demonstration: numbers, or functions of the training step. For a fixed share, set both
            to it.
    """

    low: float | Schedule = 0.0
    high: float | Schedule = 0.95

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("low", "high"):
            _check_share(self, name)
        low, high = self.low, self.high
        if not isinstance(low, Schedule) and not isinstance(high, Schedule) and low > high:
            raise ConfigError(f"UniformPrefix: low={low:g}, high={high:g}; need low <= high")

    def tokens(self, length: int, step: int, random: Random) -> int:
        return floor_of(random.uniform(_at(self.low, step), _at(self.high, step)), length)

    def describe(self) -> str:
        return f"a uniform share of it between {_shown(self.low)} and {_shown(self.high)}"


@dataclass(frozen=True)
class BinomialPrefix(PrefixLength):
    """The first k of `chunks` equal parts, k binomial with `probability` (arXiv 2505.16984).

    Attributes:
        chunks: parts of a demonstration, of equal numbers of tokens up to rounding.
        probability: of each part: a number, or a function of the training step.
    """

    chunks: int = 5
    probability: float | Schedule = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        _check_share(self, "probability")
        if self.chunks < 1:
            raise ConfigError(f"BinomialPrefix.chunks: {self.chunks} must be at least 1")

    def tokens(self, length: int, step: int, random: Random) -> int:
        probability = _at(self.probability, step)
        count = sum(random.random() < probability for _ in range(self.chunks))
        return round(count * length / self.chunks)

    def describe(self) -> str:
        return f"k of {self.chunks} equal parts, k binomial with probability {_shown(self.probability)}"


def _at(value: float | Schedule, step: int) -> float:
    return value.coefficient_at(step) if isinstance(value, Schedule) else value


def _shown(value: float | Schedule) -> str:
    if not isinstance(value, Schedule):
        return f"{value:g}"
    ends = value.start if value.warmup else value.peak, value.peak, value.end
    return " → ".join(shown for shown, _ in groupby(f"{end:g}" for end in ends))


def _check_share(part: PrefixLength, name: str) -> None:
    value = getattr(part, name)
    ends = (value.start, value.peak, value.end) if isinstance(value, Schedule) else (value,)
    odd = next((end for end in ends if not 0 <= end <= 1), None)
    if odd is not None:
        raise ConfigError(f"{type(part).__name__}.{name}: {odd:g} must lie between 0 and 1")


@dataclass(frozen=True)
class Guidance:
    """Which rollouts continue a prefix, and where the prefix stands.

    All guided rollouts of a prompt in a step continue the same prefix. It is shorter than the demonstration. It counts
    towards the response limit and leaves at least one token to the policy. Prompts without a demonstration, or with a
    prefix of length 0, are sampled without guidance. Evaluation has no guidance.

    Attributes:
        length: the distribution of the prefix's length.
        rollouts: how many of each group's rollouts continue a prefix; None = all.
        in_prompt: False = the prefix is the beginning of the response, and its tokens belong to the source
            'demonstrations'; True = the prefix is the end of the prompt, so no term learns from it. The verifier reads
            it in both cases.
        steps: number of training steps with guidance; None = all.
    """

    length: PrefixLength
    rollouts: int | None = None
    in_prompt: bool = False
    steps: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rollouts", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Guidance.{name}: {value} must be at least 1; null means all")

    def check(self, group_size: int, demonstrations: int | None, path: str) -> None:
        """Check that a run can guide rollouts; the arguments are those of `Algorithm.check`.

        Raises:
            ConfigError: it cannot; the message names the key, the value and the fix.
        """
        if (self.rollouts or 0) > group_size:
            raise ConfigError(
                f"{self.rollouts} is more than the {group_size} rollouts of a prompt; lower it, or raise group_size",
                f"{path}.guidance.rollouts",
            )
        if demonstrations == 0:
            raise ConfigError(
                "rollouts continue demonstrations, but the data set has none; choose data with worked solutions, or "
                f"set {path}.guidance=null",
                f"{path}.guidance",
            )

    def prefix(self, demonstration: Sequence[int], limit: int, step: int, seed: int) -> tuple[int, ...]:
        """The prefix of a prompt's guided rollouts; may be empty.

        Args:
            demonstration: the tokens of the prompt's demonstration.
            limit: the maximum number of response tokens.
            step: number of training steps so far.
            seed: the seed of this prompt in this step.
        """
        if self.steps is not None and step >= self.steps:
            return ()
        count = self.length.tokens(len(demonstration), step, Random(seed))
        return tuple(demonstration[: max(0, min(count, len(demonstration) - 1, limit - 1))])

    def describe(self) -> str:
        """What is sampled, for a reader."""
        which = {None: "all rollouts of a prompt continue", 1: "one rollout of each prompt continues"}
        who = which.get(self.rollouts, f"{self.rollouts} rollouts of each prompt continue")
        where = "at the end of the prompt" if self.in_prompt else "in the response"
        until = "" if self.steps is None else f", in the first {self.steps} steps"
        return f"{who} the beginning of a demonstration, {where}{until}; its length: {self.length.describe()}"
