"""What can be concluded from a diagnosis: which estimators and thresholds have intervals that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.diagnose.measuring import Result
from upge.measure import Estimated

#: The most names in a list; the rest is counted.
_MOST_NAMES = 8


@dataclass(frozen=True)
class Best:
    """The highest of several estimates: its `place`, None without any.

    `below` are the places whose intervals lie entirely below its interval, `open` the others, whose order is not known.
    Estimates without an interval are open.
    """

    place: int | None
    below: tuple[int, ...] = ()
    open: tuple[int, ...] = ()


def best_of(estimates: Sequence[Estimated]) -> Best:
    """Compare the highest value with every other by their intervals: i is below if high_i < low_best."""
    known = [i for i, one in enumerate(estimates) if not math.isnan(one.value)]
    if not known:
        return Best(None)
    best = max(known, key=lambda i: estimates[i].value)
    others = [i for i in range(len(estimates)) if i != best]
    below = [i for i in others if estimates[i].high < estimates[best].low]  # False for NaN
    return Best(best, tuple(below), tuple(i for i in others if i not in below))


def conclusion(result: Result) -> str:
    """What can and what cannot be concluded about algorithms and thresholds, by their alignment with ∇E[R]."""
    shown = result.different(parts=False)
    names = [" = ".join(_equals(result, one.name)) for one in shown]
    parts = [_algorithms(names, [one.overall.alignment for one in shown])]
    for name, points in result.thresholds.items():
        values = [f"{one.threshold:.3g}" for one in points]
        parts.append(_thresholds(name, values, [one.overall.alignment for one in points]))
    if result.bins:
        parts.append("Overlapping intervals do not show that two are equal: more batches make them narrower.")
    parts.append("All of this is about one step's gradient on these prompts, not about the result of training.")
    return " ".join(part for part in parts if part)


def _equals(result: Result, name: str) -> list[str]:
    wholes = {one.name for one in result.measured if not one.part}
    return [other for other in result.same_as(name) if other in wholes] or [name]


def _algorithms(names: Sequence[str], estimates: Sequence[Estimated]) -> str:
    best = best_of(estimates)
    if best.place is None:
        return "No algorithm's alignment with ∇E[R] can be estimated, so nothing can be concluded about the algorithms."
    if len(names) < 2:
        return ""
    first = names[best.place]
    if not best.below:
        which = "that" if len(best.open) == 1 else "those"
        return (
            f"No algorithm can be called better aligned with ∇E[R] than the others: {first} has the highest value, and "
            f"its interval is not entirely above {which} of {_list(names, best.open)}."
        )
    sentence = f"{first} is better aligned with ∇E[R] than {_list(names, best.below)}: the intervals do not overlap"
    if not best.open:
        return f"{sentence}."
    return f"{sentence}; whether it is better than {_list(names, best.open)} cannot be concluded."


def _thresholds(name: str, values: Sequence[str], estimates: Sequence[Estimated]) -> str:
    best = best_of(estimates)
    if best.place is None:
        return f"Nothing can be concluded about the threshold of {name}."
    if len(values) < 2:
        return ""
    if not best.below:
        return (
            f"No threshold of {name} can be recommended: all intervals overlap with that of {values[best.place]}, "
            "which has the highest alignment."
        )
    sentence = f"For {name}, a threshold of {values[best.place]} is better aligned than {_list(values, best.below)}"
    if not best.open:
        return f"{sentence}: the intervals do not overlap."
    return f"{sentence}; whether it is better than {_list(values, best.open)} cannot be concluded."


def _list(names: Sequence[str], places: Sequence[int]) -> str:
    """The names at these places as in "a, b and c"."""
    chosen = [names[place] for place in places[:_MOST_NAMES]]
    if len(places) > _MOST_NAMES:
        chosen.append(f"{len(places) - _MOST_NAMES} more")
    return " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
