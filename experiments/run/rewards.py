"""Checks of the rewards that verifiers give: the one that decides on success, and those that an algorithm names."""

from __future__ import annotations

from collections.abc import Sequence

from upge.data import Problem
from upge.errors import ConfigError
from upge.needs import Needs
from upge.train.config import VerifyConfig
from upge.verify import Reward
from upge.views import NAMED_REWARDS


def check_success(verifiers: Sequence[str], config: VerifyConfig) -> None:
    """Check that some rewards of each verifier pass and some do not.

    Raises:
        ConfigError: all rewards of a verifier are above the threshold, or none is; or a sum lacks the reward
            `verify.success`.
    """
    threshold = config.pass_threshold
    for text in verifiers:
        reward = Reward.load(text)
        term = reward.deciding(config.success)
        one = reward if term is None else reward.declared[term.name]
        if not one.minimum <= threshold < one.maximum:
            name = text if term is None else term.reward
            raise ConfigError(
                f"verify.pass_threshold: found {threshold:g}, but '{name}' gives rewards from {one.minimum:g} to "
                f"{one.maximum:g}; give the reward above which a response passes"
            )


def named_rewards(problems: Sequence[Problem], needs: Needs, default: str) -> tuple[str, ...]:
    """The names of the training problems' rewards; empty if an algorithm with these needs reads no reward by its name.

    Args:
        default: the verifier of problems that name none.

    Raises:
        ConfigError: the problems do not have the same rewards with the same weights.
    """
    if NAMED_REWARDS not in needs.columns:
        return ()
    verifiers = dict.fromkeys(problem.verifier or default for problem in problems)
    given = {text: {term.reward: term.weight for term in Reward.load(text).terms} for text in verifiers}
    (first, expected), *others = given.items()
    for text, rewards in others:
        if rewards != expected:
            raise ConfigError(
                f"verify.verifier: the algorithm reads each reward by its name, but the training problems have the "
                f"verifiers '{first}' and '{text}', whose rewards differ in name or weight; give them the same ones by "
                "`as`, such as 'math as correct' and 'number as correct'"
            )
    return tuple(expected)
