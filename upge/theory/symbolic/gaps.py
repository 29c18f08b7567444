"""The bounds of the objective and of the parts, and points on either side of each.

Two bounds that should be equal, such as 1.2 and 1.21, matter only for ratios between them, and a random point rarely
lies there. So the bounds are computed from the questions that were asked, and every gap between two bounds is visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from sympy import Expr, Float, Symbol, log

from upge.theory.symbolic.algebra import substituted, symbols, value_at
from upge.theory.symbolic.world import World

_RANGE = math.log(1e6)
_SAME = 1e-8


def bound_of(question: Expr, world: World) -> float | None:
    """The log-ratio at which the sign of a question changes, if all ratios of the batch have the same value; else None.

    Args:
        world: the batch. Its ratios are π_θ/π_old, π_θ/π_frozen and π_old/π_sampler.
    """
    kinds = {symbol.name[0] for symbol in symbols(question)}
    # An advantage that depends on log-probs has no bound in common with another question.
    if not kinds & set("qfs") or ("R" in kinds and question.has(log)):
        return None
    known = {x: Float(world.point[x]) for x in symbols(question) if x.name[0] in "Rvh"}
    short = substituted(question, known)

    def below(log_ratio: float) -> bool:
        return value_at(short, _at(world, symbols(short), log_ratio)) < 0

    low, high = -_RANGE, _RANGE
    start = below(low)
    if start == below(high):
        return None
    while high - low > _SAME / 10:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) == start else (low, middle)
    return (low + high) / 2


def _at(world: World, chosen: Iterable[Symbol], log_ratio: float) -> dict[Symbol, float]:
    """The values of symbols if all ratios have one value: π_θ is that of the world, the other policies follow."""
    steps = {"q": 1, "f": 1, "s": 2}
    point: dict[Symbol, float] = {}
    for symbol in chosen:
        kind, place = symbol.name[0], symbol.name[1:]
        if kind in steps:
            p = world.point[Symbol(f"p{place}", positive=True)]
            point[symbol] = float(p) * math.exp(-steps[kind] * log_ratio)
        else:
            point[symbol] = float(world.point[symbol])
    return point


def levels_between(bounds: Iterable[float]) -> list[Fraction]:
    """A ratio in each gap between the given log-bounds, one below the lowest, and one above the highest.

    A bound counts only if two questions share it: the bounds of a clip recur for every token, whereas an advantage that
    depends on probabilities changes its sign at a ratio that no other question shares.
    """
    ordered, several = sorted(bounds), []
    for left, right in zip(ordered, ordered[1:], strict=False):
        if right - left < _SAME and (not several or right - several[-1] >= _SAME):
            several.append(right)
    if not several:
        return []
    edges = [several[0] - 0.2, *several, several[-1] + 0.2]
    middles = [(left + right) / 2 for left, right in zip(edges, edges[1:], strict=False)]
    return [Fraction(math.exp(middle)).limit_denominator(10**9) for middle in middles]
