"""The history of the gate as a heat map: a row for each prompt, a column for each step, a colour for what it gave.

Drawn as plain SVG, where the cells of a colour are one path, so that thousands of them cost some ten kilobytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from experiments.reporting.gate import by_ease, level_of

MOST_ROWS, MOST_COLUMNS = 64, 160
WIDTH, LABELS, ROW, TOP, FOOT = 1100, 130, 9, 6, 34  # in units of the picture, about pixels
#: What a prompt's step gave: name → (colour, what the legend says).
STATES = {
    "rollouts": ("c0", "rollouts"),
    "demonstrations": ("c1", "demonstration"),
    "both": ("c3", "both"),
    "solved": ("c2", "nothing: all rollouts correct"),
    "nothing": ("c6", "nothing: no signal"),
}


@dataclass(frozen=True)
class HeatMap:
    """A picture, the states that occur in it, and how many of the prompts it shows."""

    svg: Markup
    states: tuple[str, ...]
    shown: int
    prompts: int
    binned: int

    @property
    def legend(self) -> list[dict]:
        """As the legends of plots."""
        return [{"label": STATES[state][1], "color": STATES[state][0], "sign": "■"} for state in self.states]


@dataclass(frozen=True)
class _Row:
    """A prompt with what its steps gave, {column: state}, and what rows are sorted by."""

    prompt: int
    level: str
    cells: dict[int, str]
    solved: float
    ease: float
    draws: int


def heat_map(prompts: Sequence[dict]) -> HeatMap | None:
    """The heat map of lines of prompts.jsonl; None without lines.

    Levels come in the order of ease, within one the prompts solved first; of more than MOST_ROWS prompts as many of
    each level, those drawn most often (of equal ones the first of the training set). In a long run a column is several
    steps and shows the last of them in which the prompt was drawn.
    """
    if not prompts:
        return None
    first, last = prompts[0]["step"], prompts[-1]["step"]
    width = math.ceil((last - first + 1) / MOST_COLUMNS)
    rows = _rows(prompts, first, width)
    levels = by_ease(prompts)
    chosen = sorted(_chosen(rows, levels), key=lambda row: (levels.index(row.level), row.solved, -row.ease, row.prompt))
    found = {state for row in chosen for state in row.cells.values()}
    states = tuple(state for state in STATES if state in found)
    svg = _svg(chosen, states, first, last, width)
    return HeatMap(svg, states, len(chosen), len(rows), width)


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
    """At most MOST_ROWS, taken from the levels by turns."""
    queues = {level: [] for level in levels}
    for row in sorted(rows, key=lambda row: (-row.draws, row.prompt)):
        queues[row.level].append(row)
    turns = [(place, number) for number, queue in enumerate(queues.values()) for place in range(len(queue))]
    lists = list(queues.values())
    return [lists[number][place] for place, number in sorted(turns)[:MOST_ROWS]]


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
    parts += _level_marks(rows) + _step_marks(first, last, width, cell, height)
    label = f"What each of {len(rows)} prompts learned from, steps {first} to {last}: " + ", ".join(
        f"{STATES[state][1]} {sum(s == state for row in rows for s in row.cells.values())} times" for state in states
    )
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}" font-size="12" fill="var(--soft)">{"".join(parts)}</svg>'
    )


def _box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as part of a path, with a hair between neighbours where there is room for one."""
    gap = 0.6 if width > 4 else 0.0
    return f"M{x:.1f} {y:g}h{width - gap:.1f}v{height:g}h-{width - gap:.1f}z"


def _level_marks(rows: list[_Row]) -> list[str]:
    """The name of each level beside its rows, and a line above it."""
    parts, start = [], 0
    while start < len(rows):
        many = sum(row.level == rows[start].level for row in rows)
        top = TOP + ROW * start
        if start:
            parts.append(f'<path d="M0 {top}H{WIDTH}" stroke="var(--soft)" stroke-width="0.7"/>')
        if ROW * many >= 12:
            name = rows[start].level
            name = name if len(name) <= 20 else f"{name[:19]}…"
            place = f'x="{LABELS - 8}" y="{top + ROW * many / 2 + 4:g}"'
            parts.append(f'<text {place} text-anchor="end">{escape(name)}</text>')
        start += many
    return parts


def _step_marks(first: int, last: int, width: int, cell: float, height: int) -> list[str]:
    """About eight round numbers below the columns."""
    rough = max(1, (last - first + 1) / 8)
    unit = 10 ** math.floor(math.log10(rough))
    apart = max(1, next(many * unit for many in (1, 2, 5, 10) if many * unit >= rough))
    steps = [step for step in range(first, last + 1) if step == first or step % apart == 0]
    if len(steps) > 1 and steps[1] - first < apart / 2:
        del steps[1]
    middle = LABELS + (WIDTH - LABELS) / 2
    return [
        f'<text x="{LABELS + cell * ((step - first) // width + 0.5):.1f}" y="{height - FOOT + 15}" '
        f'text-anchor="middle">{step}</text>'
        for step in steps
    ] + [f'<text x="{middle:g}" y="{height - 3}" text-anchor="middle">step</text>']
