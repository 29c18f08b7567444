"""How a function's time grows with its input: a ratio of two times of one run, which a busy machine changes little."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def growth(function: Callable[[T], object], small: T, large: T, least: float = 0.02) -> float:
    """The CPU time that `function` takes for `large` over the time that it takes for `small`.

    Args:
        function: what is timed; each time is the shortest of three.
        small, large: its inputs.
        least: seconds. A shorter time of `small` counts as this much, so that noise is not measured.
    """
    return _seconds(function, large) / max(least, _seconds(function, small))


def _seconds(function: Callable[[T], object], argument: T) -> float:
    times = []
    for _ in range(3):
        begin = time.process_time()
        function(argument)
        times.append(time.process_time() - begin)
    return min(times)
