"""What the measurements of one policy say: gains by pass rate, the oracle's choices, and the regret of every gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.regret.measuring import OBJECTIVES, Result
from experiments.regret.settings import mixture_name
from upge.evaluation.intervals import Interval, holm, intervals
from upge.measure.regret import Mean, Signals, best, by_prompt, gains, learned, taken, two_way

#: Rule of a step → (metric, whether all steps have one length instead of one learning rate).
RULES = {"sgd": ("sgd", True), "adam": ("adam", True), "rate": ("sgd", False)}
#: Objective → the unit of its gains, and how many such units make 1 of the measured quantity.
UNITS = {"accuracy": ("points", 100.0), "log-likelihood": ("0.01 nats", 100.0)}
#: What the oracle chooses from, with the coefficients of rollouts and demonstration; among equal gains the first one.
ACTIONS = {"nothing": (0.0, 0.0), "rollouts": (1.0, 0.0), "demonstration": (0.0, 1.0), "both": (1.0, 1.0)}
ORACLE, BEST_CONSTANT = "oracle", "best constant"


@dataclass(frozen=True)
class Score:
    """A gate on all prompts.

    Attributes:
        gain: of a step, in the objective's unit.
        regret: the oracle's gain minus this one.
        ahead: this gain minus that of the best constant mixture.
        p_holm: of `ahead`, adjusted for all gates; NaN for constants and the oracle, which are not tested.
    """

    name: str
    gain: Mean
    regret: Mean
    ahead: Mean
    p_holm: float


@dataclass(frozen=True)
class AtCount:
    """The groups with a number of successes.

    Attributes:
        gains: action → gain; empty if there are too few prompts for an interval.
        difference: the demonstration's gain minus that of the rollouts; None as above.
        choices: action → the share of groups in which it is the best, with all held-out data.
    """

    successes: int
    groups: int
    prompts: int
    gains: Mapping[str, Mean]
    difference: Mean | None
    choices: Mapping[str, Interval]


@dataclass(frozen=True)
class Analysis:
    """One rule of a step and one objective.

    Attributes:
        scores: the oracle first, then references, then gates.
        optimistic: the oracle's gain if the held-out data that its choice is based on also measure the gain.
    """

    rule: str
    objective: str
    scores: tuple[Score, ...]
    optimistic: Mean
    by_count: tuple[AtCount, ...]


def analyses(result: Result, lengths: Mapping[str, float], mixtures: Sequence[float]) -> list[Analysis]:
    """Every rule with every objective.

    Args:
        lengths: metric → the length of a step.
        mixtures: the shares of the constant mixtures.
    """
    return [analysis(result, rule, objective, lengths, mixtures) for rule in RULES for objective in OBJECTIVES]


def analysis(
    result: Result, rule: str, objective: str, lengths: Mapping[str, float], mixtures: Sequence[float]
) -> Analysis:
    """One rule with one objective, see `analyses`."""
    metric, fixed = RULES[rule]
    signals, names = result.signals[metric, objective], [mixture_name(share) for share in mixtures]
    factor = _factor(signals, fixed, lengths[metric]) * UNITS[objective][1]

    def valued(coefficients: Tensor) -> Tensor:
        return factor * gains(signals, coefficients, fixed)

    count = len(result.prompts)
    actions = torch.stack([valued(torch.tensor([pair]).double().expand(count, 2)) for pair in ACTIONS.values()])
    constants = torch.stack([valued(result.coefficients[name]) for name in names])
    optimistic = by_prompt(taken(actions, best(actions, crossed=False)), result.prompts)
    rows = {ORACLE: taken(actions, best(actions))}
    rows[BEST_CONSTANT] = taken(constants, learned(constants, torch.ones(count, 1), result.prompts))
    rows |= {"nothing": actions[0]} | dict(zip(names, constants, strict=True))
    tested = {name: valued(own) for name, own in merged(result.coefficients, exclude=names).items()}
    at_count = torch.nn.functional.one_hot(result.successes, result.group_size + 1).double()
    tested["learned from the pass rate"] = taken(actions, learned(actions, at_count, result.prompts))
    features = torch.cat([at_count, result.features], dim=1)
    tested["learned from all features"] = taken(actions, learned(actions, features, result.prompts))
    scores = _scores({name: by_prompt(own, result.prompts) for name, own in (rows | tested).items()}, [*tested])
    by_count = [_at_count(result, actions, number) for number in range(result.group_size + 1)]
    counts = tuple(one for one in by_count if one is not None)
    return Analysis(rule, objective, scores, two_way(optimistic[None])[0], counts)


def merged(coefficients: Mapping[str, Float[Tensor, "N 2"]], exclude: Sequence[str]) -> dict[str, Tensor]:
    """The gates without `exclude`; those with equal coefficients on all groups have one entry with all names."""
    groups: list[tuple[list[str], Tensor]] = []
    for name, own in coefficients.items():
        if name in exclude:
            continue
        known = next((names for names, other in groups if torch.equal(own, other)), None)
        if known is None:
            groups.append(([name], own))
        else:
            known.append(name)
    return {", ".join(names): own for names, own in groups}


def _factor(signals: Signals, fixed: bool, length: float) -> float:
    """The length of every step, or the learning rate at which a step on both signals has this length on average."""
    if fixed:
        return length
    both = signals.lengths(torch.ones(len(signals.squares), 2, dtype=torch.float64))
    return length / float(both.mean().clamp(min=1e-300))


def _scores(rows: Mapping[str, Float[Tensor, "M H"]], tested: Sequence[str]) -> tuple[Score, ...]:
    values = torch.stack([*rows.values()])
    names = [*rows]
    means = two_way(values)
    regrets = two_way(rows[ORACLE] - values)
    ahead = two_way(values - rows[BEST_CONSTANT])
    places = [names.index(name) for name in tested]
    adjusted = dict(zip(places, holm([ahead[i].p_value for i in places]), strict=True))
    each = zip(names, means, regrets, ahead, strict=True)
    return tuple(
        Score(name, gain, regret, difference, adjusted.get(place, float("nan")))
        for place, (name, gain, regret, difference) in enumerate(each)
    )


def _at_count(result: Result, actions: Float[Tensor, "A N H"], successes: int) -> AtCount | None:
    """The groups with a number of successes; None if there are none."""
    members = (result.successes == successes).nonzero()[:, 0]
    if not len(members):
        return None
    prompts = result.prompts[members].unique(return_inverse=True)[1]
    own = actions[:, members]
    named: dict[str, Mean] = {}
    difference = None
    if int(prompts.max()) > 0:
        values = [by_prompt(one, prompts) for one in own]
        named = dict(zip(ACTIONS, two_way(torch.stack(values)), strict=True))
        difference = two_way((values[2] - values[1])[None])[0]
    chosen = best(own, crossed=False)[:, 0]
    shares = by_prompt(torch.nn.functional.one_hot(chosen, len(ACTIONS)).double(), prompts)
    choices = dict(zip(ACTIONS, intervals({"groups": shares}), strict=True))
    return AtCount(successes, len(members), int(prompts.max()) + 1, named, difference, choices)
