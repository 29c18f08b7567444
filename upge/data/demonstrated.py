"""Which problems keep their demonstrations where an experiment is to have few of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from upge.data.problem import Problem


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
