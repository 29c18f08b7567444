"""Replay of earlier rollouts: a share of a step's prompts comes from a buffer.

The seed, the step and the earlier rollouts determine what is kept and replayed, so it is the same in a resumed run and
for any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upge.checks import check_fields
from upge.errors import ConfigError


@dataclass(frozen=True)
class Replay:
    """Replay of rollouts that earlier steps sampled (arXiv 2510.02245).

    A replayed group is a group like any other: its mean, standard deviation and pass rate are those of its replayed and
    its fresh rollouts together. With `rollouts` null it is a whole earlier group, whose statistics are those of the
    step that sampled it. Every replayed rollout keeps its reward and the log-probs of the policy that sampled it.

    Attributes:
        share: the share of a step's prompts that are replayed, rounded down, as far as the buffer has enough; in
            [0, 1).
        size: the maximum number of rollouts in the buffer. The prompts that have waited longest for a new rollout leave
            first.
        keep: 'successes' = the successes of prompts that some, but not all, rollouts of a step solved; a prompt that
            all rollouts solved leaves the buffer. 'all' = whole groups, the newest of each prompt. 'none' = nothing.
        rollouts: number of replayed rollouts in a group, those with the largest mean log-prob; the others are fresh.
            None = the whole group, for keep='all'.
        prefer: 'half' = draw by k, the successes of the prompt's last group of n, with the weight e^(-(k - n/2)²/2),
            then among the prompts with this k. 'any' = every prompt is equally likely.
        start: nothing is kept or replayed until a step's pass rate has reached this.

    Raises:
        ConfigError: a setting is out of range, or whole groups are to be replayed but only successes kept.
    """

    share: float = 0.5
    size: int = 1024
    keep: Literal["successes", "all", "none"] = "successes"
    rollouts: int | None = 1
    prefer: Literal["half", "any"] = "half"
    start: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.share < 1:
            raise ConfigError(f"{self.share:g} must lie in [0, 1): a step needs fresh rollouts", "replay.share")
        if self.size < 0:
            raise ConfigError(f"{self.size} must not be negative; 0 keeps nothing", "replay.size")
        if not 0 <= self.start <= 1:
            raise ConfigError(f"{self.start:g} must be a pass rate in [0, 1]", "replay.start")
        if self.rollouts is not None and self.rollouts < 1:
            raise ConfigError(f"{self.rollouts} must be at least 1, or null for whole groups", "replay.rollouts")
        if self.rollouts is None and self.keep == "successes":
            raise ConfigError(
                "null replays whole groups, and keep='successes' has none; set keep: all", "replay.rollouts"
            )

    def check_group_size(self, group_size: int, path: str) -> None:
        """Refuse a group that has no place for the replayed rollouts.

        Raises:
            ConfigError: the message names the key below `path`, the value and the fix.
        """
        if self.rollouts is not None and self.rollouts >= group_size:
            raise ConfigError(
                f"{self.rollouts} of the {group_size} rollouts of a prompt leave none to sample; lower it, raise "
                "group_size, or replay whole groups: rollouts null with keep: all",
                f"{path}.replay.rollouts",
            )

    def describe(self) -> str:
        """The replay as a noun phrase."""
        if self.keep == "none" or not self.share or not self.size:
            return "nothing is replayed"
        of_group = "the whole group" if self.rollouts is None else f"{self.rollouts} of its rollouts"
        kept = "successes" if self.keep == "successes" else "groups"
        start = f", once a step's pass rate has reached {self.start:g}" if self.start else ""
        return f"{self.share:g} of the prompts replay {of_group} from the last {self.size} rollouts of {kept}{start}"
