"""What prompts.jsonl shows: how many prompts are solved how often, and where imitation takes place, level by level."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from experiments.reporting.plots import Plot, Series

MOST_BINS = 60  # of steps, in the histogram
LEVEL_BINS = 15  # of steps, in the shares by level: each needs some prompts
MOST_LEVELS = 14

_HISTOGRAM = Plot(
    "plot-solved",
    "Prompts by rollouts solved",
    "prompts per step",
    "The ends are silent under a group-relative advantage: a growing top means data that are too easy, a bottom that "
    "stays means prompts that rollouts alone will not open.",
    kind="stack",
    limits=(0, None),
    section="gradient",
)
_LEVELS = Plot(
    "plot-imitation",
    "Demonstrations by level",
    "share of a level's prompts that learned from one",
    "Should fall level by level, the easy ones first; a level that stays at 1 is being imitated and not yet solved.",
    limits=(-0.02, 1.02),
    section="gradient",
)


def gate_plots(prompts: Sequence[dict]) -> list[tuple[Plot, list[Series]]]:
    """The plots that lines of prompts.jsonl can fill."""
    return [plot for plot in (_histogram(prompts), _by_level(prompts)) if plot is not None]


def _histogram(prompts: Sequence[dict]) -> tuple[Plot, list[Series]] | None:
    """Prompts per step by successes: none, quarter by quarter, all; means over bins of a long run."""
    lines = [line for line in prompts if line["rollouts"] > 0]
    if not lines:
        return None
    first, last = lines[0]["step"], lines[-1]["step"]
    width = math.ceil((last - first + 1) / MOST_BINS)
    counts: dict[int, Counter] = defaultdict(Counter)
    for line in lines:
        counts[(line["step"] - first) // width][_quarter(line["successes"], line["rollouts"])] += 1
    bins = sorted(counts)
    steps = tuple(first + width * one + (min(width, last - first - width * one + 1) - 1) / 2 for one in bins)
    seen = [min(width, last - first - width * one + 1) for one in bins]
    labels = _labels({line["rollouts"] for line in lines})
    series = [
        Series(label, steps, tuple(counts[one][kind] / many for one, many in zip(bins, seen, strict=True)))
        for kind, label in labels.items()
    ]
    colors = ("c1", "s1", "s2", "s3", "s4", "c2")
    return replace(_HISTOGRAM, palette=tuple(colors[kind] for kind in labels)), series


def _quarter(successes: int, rollouts: int) -> int:
    """0 for none, 1 to 4 for up to a quarter, a half, three quarters and more of them, 5 for all."""
    if successes == 0:
        return 0
    return 5 if successes == rollouts else math.ceil(4 * successes / rollouts)


def _labels(sizes: set[int]) -> dict[int, str]:
    """The words for each kind: successes in numbers where all groups have the same size."""
    if len(sizes) > 1:
        return {0: "none", 1: "up to 1/4", 2: "up to 1/2", 3: "up to 3/4", 4: "more", 5: "all"}
    (size,) = sizes
    found: dict[int, list[int]] = defaultdict(list)
    for successes in range(size + 1):
        found[_quarter(successes, size)].append(successes)
    ranges = {kind: f"{many[0]}–{many[-1]}" if len(many) > 1 else f"{many[0]}" for kind, many in sorted(found.items())}
    return {kind: f"{text} of {size}" for kind, text in ranges.items()}


def _by_level(prompts: Sequence[dict]) -> tuple[Plot, list[Series]] | None:
    """Of each level's prompts the share that learned from a demonstration, in bins of steps."""
    if len({_imitates(line) for line in prompts}) < 2:
        return None  # all or none: there is no gate to be seen
    first, last = prompts[0]["step"], prompts[-1]["step"]
    width = math.ceil((last - first + 1) / LEVEL_BINS)
    drawn: dict[str, Counter] = defaultdict(Counter)
    imitated: dict[str, Counter] = defaultdict(Counter)
    for line in prompts:
        place, level = (line["step"] - first) // width, level_of(line)
        drawn[level][place] += 1
        imitated[level][place] += _imitates(line)
    most = sorted(drawn, key=lambda level: (-drawn[level].total(), level))[:MOST_LEVELS]
    series = []
    for level in [level for level in by_ease(prompts) if level in most]:
        bins = sorted(drawn[level])
        steps = tuple(min(first + width * one + (width - 1) / 2, float(last)) for one in bins)
        series.append(Series(level, steps, tuple(imitated[level][one] / drawn[level][one] for one in bins)))
    return _LEVELS, series


def _imitates(line: dict) -> bool:
    return line["learned"] in ("demonstrations", "both")


def level_of(line: dict) -> str:
    """The level of a prompt, in words."""
    return str(line.get("level") or "all prompts")


def by_ease(prompts: Sequence[dict]) -> list[str]:
    """The levels, the one whose rollouts succeed most often first; of equal ones by name."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for line in prompts:
        total = totals[level_of(line)]
        total[0] += line["successes"]
        total[1] += line["rollouts"]
    return sorted(totals, key=lambda level: (-totals[level][0] / max(1, totals[level][1]), level))
