"""Less than a data set has: problems of some levels only, and demonstrations for some problems only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from upge.data.problem import Problem
from upge.errors import ConfigError


def limit_levels(problems: Sequence[Problem], per_level: Mapping[str, int]) -> tuple[Problem, ...]:
    """Of each level in `per_level` the first so many problems, in their order; all problems if it is empty.

    Raises:
        ConfigError: a level has fewer problems, or a number is none.
    """
    if not per_level:
        return tuple(problems)
    kept: list[Problem] = []
    left = dict(per_level)
    for level, count in per_level.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"data_policy.per_level: found {count!r} for '{level}'; give a number of at least 1")
    for problem in problems:
        if left.get(problem.level, 0):
            left[problem.level] -= 1
            kept.append(problem)
    for level, missing in left.items():
        if missing:
            have = sorted({str(problem.level) for problem in problems})
            raise ConfigError(
                f"data_policy.per_level: {per_level[level]} problems of '{level}' are asked for, and there are "
                f"{per_level[level] - missing}; the levels of the data are {', '.join(have)}"
            )
    return tuple(kept)


def limit_demonstrated(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """The same problems, of which `count` keep their demonstrations (0: all do) and the rest have none.

    They are spread over the levels as evenly as these allow. Which they are follows from the prompts alone, so a larger
    count keeps those of a smaller one, and every algorithm learns from the same ones. A rejected response has no chosen
    side without a demonstration and goes with it.
    """
    having = [problem for problem in problems if problem.demonstrations]
    if not count or len(having) <= count:
        return tuple(problems)
    turns: dict[tuple[str, str | None], int] = {}
    ranked = []
    for problem in sorted(having, key=_rank):
        kind = (problem.source, problem.level)
        turns[kind] = turns.get(kind, 0) + 1
        ranked.append((turns[kind], _rank(problem), problem.id))
    kept = {name for *_, name in sorted(ranked)[:count]}
    return tuple(p if p.id in kept else replace(p, demonstrations=(), rejected=None) for p in problems)


def _rank(problem: Problem) -> bytes:
    """A place by chance that depends on nothing but the problem."""
    return hashlib.sha256(f"demonstrated/{problem.source}/{problem.id}/{problem.prompt}".encode()).digest()
