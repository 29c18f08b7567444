"""The diagnosis of a policy of seven responses, without sampling: every batch is added up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from experiments.diagnosing.measuring import Result
from experiments.theory import setting
from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.measure import Estimated, Measured, exact_figures, same
from upge.measure.contributions import sources
from upge.measure.diagnosis import Conflict
from upge.measure.exact import Exact, exact

#: More rollouts make more multisets than there is patience for.
MOST_ROLLOUTS = 8


def exactly(chosen: Mapping[str, Algorithm], group_size: int) -> Result:
    """All figures on the setting of docs/theory.md, one prompt a batch; the frozen policy there is another one.

    Raises:
        ConfigError: too many rollouts to enumerate.
    """
    if group_size > MOST_ROLLOUTS:
        raise ConfigError(f"group_size: {group_size} with exact=true; give at most {MOST_ROLLOUTS}, 3 is a good choice")
    made = setting()
    true, shown = made.objectives["reward"].flatten(), made.objectives["imitation"].flatten()
    lines, wholes, conflicts, alike = [], {}, [], {}
    for name, algorithm in chosen.items():
        found, known = exact(algorithm, made, group_size=group_size), sources(algorithm)
        wholes[name] = found[""].mean
        noise = math.sqrt(max(0.0, found[""].power - float(found[""].mean.square().sum())))
        # Of equal direction and equal noise in proportion to it.
        alike[name] = torch.cat([found[""].mean, torch.tensor([noise], dtype=torch.float64)])[None]
        several = len(known) > 1
        for part, one in found.items():
            if part and (not several or not bool(one.mean.any())):
                continue
            source = known[part] if part else ", ".join(dict.fromkeys(known.values()))
            lines.append(_line(name, part, source, one, true, shown))
        sides = [
            sum((found[p].mean for p in known if known[p] == source), torch.zeros_like(true))
            for source in ("rollouts", "demonstrations")
        ]
        if all(bool(side.any()) for side in sides):
            conflicts.append(Conflict(name, _cosine(*sides), {}))
    names = list(wholes)
    cosines = {(a, b): _cosine(wholes[a], wholes[b]) for i, a in enumerate(names) for b in names[i + 1 :]}
    facts = {"prompts": 1, "group_size": group_size, "parameters": len(true), "sketch": 0, "sketch_error": 0.0}
    groups = tuple(map(tuple, same(alike)))
    return Result("seven responses", None, facts, (), tuple(lines), tuple(conflicts), {}, cosines, groups)


def _line(name: str, part: str, source: str, one: Exact, true: Tensor, shown: Tensor) -> Measured:
    figures = exact_figures(one.mean, one.power, true)
    full = f"{name}.{part}" if part else name
    return Measured(full, name, part, source, figures, _cosine(one.mean, shown), None, (), ())


def _cosine(a: Tensor, b: Tensor) -> Estimated:
    return Estimated.exactly(float(a @ b / (a.norm() * b.norm())))
