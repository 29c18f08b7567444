"""Where objective and parts have their bounds, and points on either side of each.

Two bounds that should be one, such as 1.2 and 1.21, differ only for ratios between them, where hardly any point lies by
chance. So the bounds are read off the questions that were asked, and every gap between two of them is visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from sympy import Expr, Float, Symbol, log

from upge.theory.symbolic.algebra import value_at
from upge.theory.symbolic.world import World

_RANGE = math.log(1e6)
_SAME = 1e-8


def bound_of(question: Expr, world: World) -> float | None:
    """The logarithm of the one ratio at which the question changes its answer, were all ratios of the batch (π_θ/π_old,
    π_θ/π_frozen, π_old/π_sampler) that ratio; None if it does not change."""
    kinds = {symbol.name[0] for symbol in question.free_symbols}
    # An advantage that is itself made of log-probabilities has no bound that another question shares.
    if not kinds & set("qfs") or ("R" in kinds and question.has(log)):
        return None
    known = {x: Float(world.point[x]) for x in question.free_symbols if x.name[0] in "Rvh"}
    short = question.xreplace(known)

    def below(log_ratio: float) -> bool:
        return value_at(short, _at(world, short.free_symbols, log_ratio)) < 0

    low, high = -_RANGE, _RANGE
    start = below(low)
    if start == below(high):
        return None
    while high - low > _SAME / 10:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) == start else (low, middle)
    return (low + high) / 2


def _at(world: World, symbols: Iterable[Symbol], log_ratio: float) -> dict[Symbol, float]:
    """The symbols' values with every ratio that one: π_θ as in the world, the others by their distance from it."""
    steps = {"q": 1, "f": 1, "s": 2}
    point = {}
    for symbol in symbols:
        kind, place = symbol.name[0], symbol.name[1:]
        if kind in steps:
            p = world.point[Symbol(f"p{place}", positive=True)]
            point[symbol] = float(p) * math.exp(-steps[kind] * log_ratio)
        else:
            point[symbol] = float(world.point[symbol])
    return point


def levels_between(bounds: Iterable[float]) -> list[Fraction]:
    """A ratio in each gap between the given log-bounds, below the lowest and above the highest of them.

    A bound counts only if two questions have it: those of a clip recur for every token, while an advantage that is
    itself made of probabilities changes its sign at a ratio of its own.
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
