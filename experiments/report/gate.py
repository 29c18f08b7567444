"""Plots of prompts.jsonl: prompts by rollouts solved, imitation by level, and a heat map of prompts and steps."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from experiments.report.plots import Parts, Plot
from experiments.report.series import Series, is_constant

MOST_BINS = 60  # of steps, in the histogram
LEVEL_BINS = 15  # of steps, in the shares by level: each needs some prompts
MOST_LEVELS = 14
#: The level of prompts without one.
NO_LEVEL = "all prompts"

_HISTOGRAM = Plot(
    "plot-solved", "Prompts by rollouts solved", "prompts per step",
    "A growing top means that the data are too easy; a constant bottom means prompts that rollouts alone will not "
    "solve.",
    kind="stack", limits=(0, None), section="gradient",
)  # fmt: skip
_NO_SIGNAL = "Prompts whose rollouts are all correct or all wrong give no signal to a group-relative advantage."
_LEVELS = Plot(
    "plot-imitation", "Demonstrations by level", "share of a level's prompts that learned from one",
    "Should fall level by level, the easy ones first; a level that stays at 1 is imitated but not yet solved.",
    limits=(-0.02, 1.02), section="gradient",
)  # fmt: skip


def gate_plots(prompts: Sequence[dict], colors: Mapping[str, str], parts: Parts) -> list[tuple[Plot, list[Series]]]:
    """The plots with data in lines of prompts.jsonl that do not show constants alone; `colors` are those of levels."""
    plots = [plot for plot in (_histogram(prompts, parts), _by_level(prompts, colors)) if plot is not None]
    return [(plot, series) for plot, series in plots if not is_constant(series)]


def _histogram(prompts: Sequence[dict], parts: Parts) -> tuple[Plot, list[Series]] | None:
    """Prompts per step by successes: none, four quarters, all; in a long run means over bins of steps."""
    lines = [line for line in prompts if line["rollouts"] > 0]
    if not lines:
        return None
    first, last = lines[0]["step"], lines[-1]["step"]
    width = math.ceil((last - first + 1) / MOST_BINS)
    counts: dict[int, Counter] = defaultdict(Counter)
    for line in lines:
        counts[(line["step"] - first) // width][_quarter(line["successes"], line["rollouts"])] += 1
    # Bin → its number of steps.
    seen = {one: min(width, last - first - width * one + 1) for one in sorted(counts)}
    steps = tuple(first + width * one + (many - 1) / 2 for one, many in seen.items())
    labels = _labels({line["rollouts"] for line in lines})
    shares = {kind: tuple(counts[one][kind] / many for one, many in seen.items()) for kind in labels}
    series = [Series(label, steps, shares[kind]) for kind, label in labels.items()]
    colors = ("c1", "s1", "s2", "s3", "s4", "c2")
    caption = f"{_NO_SIGNAL} {_HISTOGRAM.caption}" if parts.compares_groups else _HISTOGRAM.caption
    return replace(_HISTOGRAM, caption=caption, palette=tuple(colors[kind] for kind in labels)), series


def _quarter(successes: int, rollouts: int) -> int:
    """0 for no success, 1 to 4 for the quarter in which the share of successes falls, 5 for all."""
    if successes == 0:
        return 0
    return 5 if successes == rollouts else math.ceil(4 * successes / rollouts)


def _labels(sizes: set[int]) -> dict[int, str]:
    """The label of each kind; if all groups have the same size, the numbers of successes."""
    if len(sizes) > 1:
        return {0: "none", 1: "up to 1/4", 2: "up to 1/2", 3: "up to 3/4", 4: "more", 5: "all"}
    (size,) = sizes
    successes_of: dict[int, list[int]] = defaultdict(list)
    for successes in range(size + 1):
        successes_of[_quarter(successes, size)].append(successes)
    ends = {kind: dict.fromkeys((many[0], many[-1])) for kind, many in sorted(successes_of.items())}
    return {kind: f"{'–'.join(map(str, both))} of {size}" for kind, both in ends.items()}


def _by_level(prompts: Sequence[dict], colors: Mapping[str, str]) -> tuple[Plot, list[Series]] | None:
    """The share of each level's prompts that learned from a demonstration, in bins of steps."""
    if len({_imitates(line) for line in prompts}) < 2:
        return None  # all or none: the gate does not vary
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
    return replace(_LEVELS, palette=tuple(colors[one.label] for one in series)), series


def _imitates(line: dict) -> bool:
    return line["learned"] in ("demonstrations", "both")


def level_of(line: dict) -> str:
    """The level of a prompt, as text."""
    return str(line.get("level") or NO_LEVEL)


def levels_in(prompts: Sequence[dict]) -> list[str]:
    """The levels of the prompts in lines of prompts.jsonl, in the order of their names."""
    return sorted({level_of(line) for line in prompts})


def by_ease(prompts: Sequence[dict]) -> list[str]:
    """The levels by the success rate of their rollouts, the highest first; equal ones by name."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for line in prompts:
        total = totals[level_of(line)]
        total[0] += line["successes"]
        total[1] += line["rollouts"]
    return sorted(totals, key=lambda level: (-totals[level][0] / max(1, totals[level][1]), level))


MOST_ROWS, MOST_COLUMNS = 64, 160
WIDTH, LABELS, ROW, TOP, FOOT = 1100, 130, 9, 6, 34  # in units of the picture, about pixels
#: What a prompt contributed in a step: name → (color, legend).
STATES = {
    "rollouts": ("c0", "rollouts"),
    "demonstrations": ("c1", "demonstration"),
    "both": ("c3", "both"),
    "solved": ("c2", "nothing: all rollouts correct"),
    "nothing": ("c6", "nothing: no signal"),
}


@dataclass(frozen=True)
class HeatMap:
    """A heat map with the `states` that occur in it, `shown` of all `prompts`, and `binned` steps per column."""

    svg: Markup
    states: tuple[str, ...]
    shown: int
    prompts: int
    binned: int

    @property
    def legend(self) -> list[dict]:
        """Its legend, in the form of the plots' legends."""
        return [{"label": STATES[state][1], "color": STATES[state][0], "sign": "■"} for state in self.states]

    @property
    def reading(self) -> str:
        """How to read it, for the states that occur."""
        if "rollouts" not in self.states and "both" not in self.states:
            return "A row that changes back and forth is a prompt that was forgotten in between."
        first = "demonstration" if {"demonstrations", "both"} & {*self.states} else "no signal"
        return f"A row should change from {first} to rollouts to all correct; a row that changes back shows forgetting."


@dataclass(frozen=True)
class _Row:
    """A prompt's states, {column: state}, and the values that rows are sorted by."""

    prompt: int
    level: str
    cells: dict[int, str]
    solved: float
    ease: float
    draws: int


def heat_map(prompts: Sequence[dict]) -> HeatMap | None:
    """The heat map of lines of prompts.jsonl; None without lines and if all of them have the same state.

    Easy levels come first, and within a level the prompts that were solved earliest. If there are more than MOST_ROWS
    prompts, it shows the same number of each level, those drawn most often and then those first in the training set. In
    a long run a column is several steps and shows the last one in which the prompt was drawn.
    """
    if len({state_of(line) for line in prompts}) < 2:
        return None
    first, last = prompts[0]["step"], prompts[-1]["step"]
    width = math.ceil((last - first + 1) / MOST_COLUMNS)
    rows, levels = _rows(prompts, first, width), by_ease(prompts)
    chosen = sorted(_chosen(rows, levels), key=lambda row: (levels.index(row.level), row.solved, -row.ease, row.prompt))
    occurring = {state for row in chosen for state in row.cells.values()}
    states = tuple(state for state in STATES if state in occurring)
    return HeatMap(_svg(chosen, states, first, last, width), states, len(chosen), len(rows), width)


def state_of(line: dict) -> str:
    """The state of a prompt in a step."""
    if line["learned"] == "nothing" and 0 < line["rollouts"] == line["successes"]:
        return "solved"
    return line["learned"] if line["learned"] in STATES else "nothing"


def _rows(prompts: Sequence[dict], first: int, width: int) -> list[_Row]:
    lines: dict[int, list[dict]] = defaultdict(list)
    for line in prompts:
        lines[line["prompt"]].append(line)
    rows = []
    for prompt, own in lines.items():
        cells = {(line["step"] - first) // width: state_of(line) for line in own}
        solved = min((line["step"] for line in own if line["successes"]), default=math.inf)
        ease = sum(line["successes"] for line in own) / max(1, sum(line["rollouts"] for line in own))
        rows.append(_Row(prompt, level_of(own[0]), cells, solved, ease, len(own)))
    return rows


def _chosen(rows: list[_Row], levels: Sequence[str]) -> list[_Row]:
    """At most MOST_ROWS rows, taken from the levels in rotation."""
    queues = {level: [] for level in levels}
    for row in sorted(rows, key=lambda row: (-row.draws, row.prompt)):
        queues[row.level].append(row)
    in_rotation = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
    return [row for row in in_rotation if row is not None][:MOST_ROWS]


def _svg(rows: list[_Row], states: Sequence[str], first: int, last: int, width: int) -> Markup:
    columns = (last - first) // width + 1
    cell = (WIDTH - LABELS) / columns
    drawn: dict[str, list[str]] = defaultdict(list)
    held: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows):
        places = sorted(row.cells)
        for place, following in zip(places, [*places[1:], columns], strict=True):
            state, y = row.cells[place], TOP + ROW * number
            drawn[state].append(_box(LABELS + cell * place, y + 0.5, cell, ROW - 1))
            if following > place + 1:
                held[state].append(_box(LABELS + cell * (place + 1), y + 0.5, cell * (following - place - 1), ROW - 1))
    height = TOP + ROW * len(rows) + FOOT
    parts = [
        f'<path d="{"".join(held[state])}" fill="var(--{STATES[state][0]})" fill-opacity="0.2"/>'
        f'<path d="{"".join(drawn[state])}" fill="var(--{STATES[state][0]})"/>'
        for state in states
    ]
    parts += [_row_title(number, row) for number, row in enumerate(rows)]
    parts += _level_marks(rows) + _step_marks(first, last, width, cell, height)
    label = f"What each of {len(rows)} prompts learned from, steps {first} to {last}: " + ", ".join(
        f"{STATES[state][1]} {sum(s == state for row in rows for s in row.cells.values())} times" for state in states
    )
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}" font-size="12" fill="var(--soft)">{"".join(parts)}</svg>'
    )


def _row_title(number: int, row: _Row) -> str:
    """What appears when the pointer is on a row: an invisible area with a title."""
    solved = f"first solved in step {row.solved:.0f}" if row.solved < math.inf else "never solved"
    name = f"prompt {row.prompt}" + (f", {row.level}" if row.level != NO_LEVEL else "")
    title = f"{name}: {row.ease:.0%} of its rollouts correct, {solved}"
    area = f'x="0" y="{TOP + ROW * number}" width="{WIDTH}" height="{ROW}"'
    return f'<rect {area} fill-opacity="0"><title>{escape(title)}</title></rect>'


def _box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as part of a path, with a small gap between neighbors if there is room."""
    gap = 0.6 if width > 4 else 0.0
    return f"M{x:.1f} {y:g}h{width - gap:.1f}v{height:g}h-{width - gap:.1f}z"


def _level_marks(rows: list[_Row]) -> list[str]:
    """The name of each level next to its rows, and a line above them."""
    parts, start = [], 0
    while start < len(rows):
        many = sum(row.level == rows[start].level for row in rows)
        top = TOP + ROW * start
        if start:
            parts.append(f'<path d="M0 {top}H{WIDTH}" stroke="var(--soft)" stroke-width="0.7"/>')
        if ROW * many >= 12:
            name = rows[start].level if len(rows[start].level) <= 20 else f"{rows[start].level[:19]}…"
            place = f'x="{LABELS - 8}" y="{top + ROW * many / 2 + 4:g}"'
            parts.append(f'<text {place} text-anchor="end">{escape(name)}</text>')
        start += many
    return parts


def _step_marks(first: int, last: int, width: int, cell: float, height: int) -> list[str]:
    """Labels of about eight round steps below the columns."""
    rough = max(1, (last - first + 1) / 8)
    unit = 10 ** math.floor(math.log10(rough))
    spacing = max(1, next(many * unit for many in (1, 2, 5, 10) if many * unit >= rough))
    steps = [first, *range((first // spacing + 1) * spacing, last + 1, spacing)]
    if len(steps) > 1 and steps[1] - first < spacing / 2:
        del steps[1]
    middle = LABELS + (WIDTH - LABELS) / 2
    return [
        f'<text x="{LABELS + cell * ((step - first) // width + 0.5):.1f}" y="{height - FOOT + 15}" '
        f'text-anchor="middle">{step}</text>'
        for step in steps
    ] + [f'<text x="{middle:g}" y="{height - 3}" text-anchor="middle">step</text>']
