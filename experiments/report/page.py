"""The report of a run as one HTML page: settings, accuracy, training curves, gradient metrics and sample responses.

The page is self-contained: its style and its script are inside, and it loads nothing from the network. The tokens with
the largest weights are shown in their text, each colored by its weight in a term.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from experiments.drawing import render
from experiments.grid import accuracy_rows, measures, number
from experiments.report.colors import color_names, color_values
from experiments.report.draw import color_name, draw, smoothing_window
from experiments.report.folder import LAST_STEP, RunFolder, read_run
from experiments.report.gate import gate_plots, heat_map, levels_in
from experiments.report.plots import Plot, parts_of
from experiments.report.series import Series, evaluation_plots, levels_of, select, stages
from upge.train.faults import NONE
from upge.train.files import write_atomically

LONGEST_TEXT = 4000  # characters of a prompt or response on the page
LONGEST_CONFIG = 100_000


#: Characters of recorded texts that a page must not have, shown as escapes: half surrogate pairs, which UTF-8 cannot
#: encode, marks that change the direction of the text around them, and control characters.
_VISIBLE = {
    number: f"\\u{number:04x}"
    for numbers in (
        *(range(0xD800, 0xE000), range(0x202A, 0x202F), range(0x2066, 0x206A), (0x061C, 0x200E, 0x200F)),
        *(range(9), range(11, 13), range(14, 32), range(0x7F, 0xA0)),
    )
    for number in numbers
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the folder of a run, finished or interrupted, and return its path.

    Raises:
        UserError: the folder does not exist or is not the folder of a run.
    """
    target = Path(run_dir) / "report.html"
    write_atomically(target, report_page(run_dir))
    return target


def report_page(run_dir: str | Path) -> str:
    """The report of a run as HTML.

    Raises:
        UserError: the folder does not exist or is not the folder of a run.
    """
    page = render(Path(__file__).with_name("report.html.j2"), **page_content(read_run(run_dir)))
    return visible(page)


def visible(page: str) -> str:
    """The page with escapes in place of characters that it must not have."""
    return page.translate(_VISIBLE)


def page_content(run: RunFolder) -> dict:
    """The values of the page's template, in the order of the page."""
    parts = parts_of(run.config.get("algo"))
    selected = select(run.metrics, parts)
    levels = color_names([*levels_of(run.evaluations), *levels_in(run.prompts)])
    windows = (smoothing_window(one) for plot, series in selected.plots if plot.kind == "line" for one in series)
    marks = [first - 0.5 for _, first, _ in _stages(run)[1:]]
    shown = (
        *evaluation_plots(run.evaluations, levels),
        *selected.plots,
        *gate_plots(run.prompts, levels, parts),
    )
    return {
        "title": " · ".join(what_ran(run)),
        "fault": "" if run.fault == NONE else run.fault,
        "facts": facts(run),
        "notes": run.notes,
        "result": _result(run.evaluations),
        "formula": str(run.run.get("formula_text") or ""),
        "window": max(windows, default=1),
        "figures": [chart(plot, series, marks) for plot, series in shown if plot.section == "training"],
        "gradient": [chart(plot, series, marks) for plot, series in shown if plot.section == "gradient"],
        "constants": {section: _constants(selected.constant, section) for section in ("training", "gradient")},
        "level_colors": levels,
        "colors": color_values(len(levels)),
        "heat": heat_map(run.prompts),
        "tokens": token_texts(run.tokens),
        "tokens_step": run.tokens_step,
        "rollouts": _rollouts(run.rollouts),
        "rollouts_step": run.rollouts_step,
        "others": [_summary(one) for one in selected.others.values()],
        "config": _cut(run.config_text, LONGEST_CONFIG),
        "details": [(key, _plain(value)) for key, value in run.run.items() if key not in ("formula_text", "command")],
        "command": str(run.run.get("command", "")),
    }


def what_ran(run: RunFolder) -> list[str]:
    """The names of algorithm, model and data set in run.json, or else the name of the folder."""
    names = run.run.get("names")
    names = names if isinstance(names, Mapping) else {}
    labels = [str(names[key]).rstrip("/").rsplit("/", 1)[-1] for key in ("algo", "model", "data") if names.get(key)]
    if labels and names.get("correction"):
        labels[0] += f" with {str(names['correction']).replace(',', ', ')}"
    return [*(labels or [run.path.resolve().name]), *([] if run.fault == NONE else [f"fault={run.fault}"])]


def facts(run: RunFolder) -> list[str]:
    """The name of a run's folder, its steps, its time, its seed and its engine."""
    about = [run.path.resolve().name]
    if run.metrics:
        about.append(f"{run.metrics[-1]['step']} steps")
    about += [f"{name}: steps {first} to {last}" for name, first, last in _stages(run)]
    seconds = sum(number(line.get("time/total")) or 0 for line in run.metrics)
    if seconds:
        about.append(f"{_duration(seconds)} of training")
    seed = run.run.get("seed", run.config.get("seed"))
    about += [f"seed {seed}"] if seed is not None else []
    about += [f"{run.run['engine']} rollouts"] if isinstance(run.run.get("engine"), str) else []
    world_size = number(run.run.get("world_size"))
    return about + ([f"{world_size:.0f} processes"] if world_size and world_size > 1 else [])


def _stages(run: RunFolder) -> list[tuple[str, int, int]]:
    algo = run.config.get("algo")
    named = algo.get("stages") if isinstance(algo, Mapping) else None
    return stages(run.metrics, [str(name) for name in named] if isinstance(named, Mapping) else [])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _result(evaluations: Sequence[dict]) -> dict | None:
    """The first and the last evaluation; None if the run has none."""
    if not evaluations:
        return None
    before, after = evaluations[0], evaluations[-1] if len(evaluations) > 1 else {}
    rows = accuracy_rows(before, after)
    problems = [row.problems for row in rows if isinstance(row.problems, int) and 0 < row.problems <= LAST_STEP]
    sampling = [f"{before['samples']} samples for each problem"] if "samples" in before else []
    sampling += [f"temperature {before['temperature']}"] if "temperature" in before else []
    return {
        "measures": measures(before, after),
        "rows": rows,
        "before": before["step"],
        "after": after.get("step"),
        "sampling": " at ".join(sampling),
        "fewest": min(problems, default=None),
        "error": f"{50 / math.sqrt(min(problems)):.1f}" if problems else None,
    }


def _constants(plots: Sequence[tuple[Plot, list[Series]]], section: str) -> list[tuple[str, str]]:
    """(title, value) of the constant plots of a section; with the names of the lines if their values differ."""
    shown = []
    for plot, series in plots:
        values = [f"{one.finite()[-1]:.4g}" for one in series]
        text = ", ".join(f"{one.label} {value}" for one, value in zip(series, values, strict=True))
        shown += [(plot.title, values[0] if len({*values}) == 1 else text)] if plot.section == section else []
    return shown


def chart(plot: Plot, series: Sequence[Series], marks: Sequence[float] = ()) -> dict:
    """A chart as the templates show it: its plot, its drawing, and a legend if it has several lines."""
    signs = "●■◆▲▼✚✖" if plot.kind == "evaluation" else "■"
    legend = [
        {"label": one.label, "color": color_name(plot, index), "sign": signs[index % len(signs)]}
        for index, one in enumerate(series)
    ]
    return {"plot": plot, "svg": Markup(draw(plot, series, marks)), "legend": legend if len(series) > 1 else []}


def _rollouts(records: Iterable[dict]) -> list[dict]:
    """The first, best and worst sampled response and the first demonstration; each record once."""
    records = list(records)
    sampled = [record for record in records if not record.get("is_demonstration")]
    rewarded = [record for record in sampled if number(record.get("reward")) is not None]
    picks = [("first", sampled[:1])]
    if rewarded:  # among equal rewards the last record, so that the first one is not shown again
        picks.append(("best", [max(reversed(rewarded), key=lambda record: record["reward"])]))
        picks.append(("worst", [min(reversed(rewarded), key=lambda record: record["reward"])]))
    picks.append(("demonstration", [record for record in records if record.get("is_demonstration")][:1]))
    shown: dict[int, dict] = {}
    for kind, chosen in picks:
        for record in chosen:
            shown.setdefault(id(record), {"kinds": [], "record": record})["kinds"].append(kind)
    return [_rollout(entry["kinds"], entry["record"]) for entry in shown.values()]


def _rollout(kinds: list[str], record: dict) -> dict:
    reward = number(record.get("reward"))
    status = record.get("status")
    facts = [
        f"reward {reward:g}" if reward is not None else "",
        *_named_rewards(record),
        str(record.get("level") or ""),
        f"verifier: {status}" if status and status != "ok" else "",
    ]
    texts = {key: _cut(str(record.get(key) or ""), LONGEST_TEXT) for key in ("prompt", "response", "answer")}
    return {"kind": " and ".join(kinds).capitalize(), "facts": [fact for fact in facts if fact], **texts}


def _named_rewards(record: dict) -> list[str]:
    """The own rewards of several verifiers, by name."""
    named = record.get("rewards")
    pairs = named.items() if isinstance(named, dict) else ()
    return [f"{name} {value:g}" for name, one in pairs if (value := number(one)) is not None]


def _summary(one: Series) -> tuple[str, ...]:
    values = one.finite()
    return one.label, *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … [{len(text) - longest} more characters]"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key} {inner if isinstance(inner, str) else _json(inner)}" for key, inner in value.items())
    return value if isinstance(value, str) else _json(value)


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "…"


SHADES = 8  # of each color, in base.html.j2
LONGEST_PROMPT = 1200


def token_texts(lines: Iterable[dict]) -> list[dict[str, Any]]:
    """The terms and their trajectories in lines of tokens/step_*.jsonl; unreadable lines are left out.

    The strongest color stands for the largest absolute weight of the term in these lines.
    """
    terms: dict[str, list[dict]] = {}
    for line in lines:
        if _readable(line):
            terms.setdefault(str(line["term"]), []).append(line)
    shown = []
    for term, own in terms.items():
        largest = max((size for line in own for size in _sizes(line)), default=0.0)
        shown.append({"term": term, "trajectories": [_trajectory(line, largest) for line in own]})
    return shown


def _readable(line: dict) -> bool:
    columns = [line.get(name) for name in ("tokens", "weights", "relative")]
    return "term" in line and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1


def _sizes(line: dict) -> list[float]:
    return [abs(number(weight) or 0.0) for weight in line["weights"]]


def _largest(line: dict) -> int:
    """The place of the largest absolute weight; a weight that is not finite counts as infinite."""
    sizes = [math.inf if (size := number(weight)) is None else abs(size) for weight in line["weights"]]
    return sizes.index(max(sizes))


def _trajectory(line: dict, largest: float) -> dict[str, Any]:
    reward, gate, sizes = number(line.get("reward")), number(line.get("gate")), _sizes(line)
    kind = "demonstration" if line.get("is_demonstration") else "rollout"
    facts = [
        kind,
        f"reward {reward:g}" if reward is not None and kind == "rollout" else "",
        str(line.get("level") or ""),
        f"gate {gate:g}" if gate is not None else "",
        f"largest weight {_printed(line['relative'][_largest(line)])}" if sizes else "",
    ]
    first, length = (int(number(line.get(name)) or 0) for name in ("first", "length"))
    prompt = str(line.get("prompt") or "")
    return {
        "prompt": prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[:LONGEST_PROMPT]} …",
        "facts": [fact for fact in facts if fact],
        "before": first,
        "after": max(0, length - first - len(line["tokens"])),
        "runs": _runs(line, largest),
    }


def _runs(line: dict, largest: float) -> list[dict[str, str]]:
    """Join neighboring tokens that have the same color and the same displayed weight."""
    # A visible sign goes before each line break, because a line break has no width to color.
    texts = (str(token).replace("\n", "↵\n") for token in line["tokens"])
    columns = zip(texts, line["weights"], line["relative"], strict=True)
    marked = [(_shade(weight, largest), _printed(relative), text) for text, weight, relative in columns]
    return [
        {"shade": shade, "weight": weight, "text": "".join(text for _, _, text in run)}
        for (shade, weight), run in itertools.groupby(marked, key=lambda one: one[:2])
    ]


def _shade(weight: object, largest: float) -> str:
    """The class of a token: p1 to p8 for a positive weight, n1 to n8 for a negative one, empty for 0."""
    value = number(weight)
    if value is None:
        return "odd"
    if value == 0 or largest == 0:
        return ""
    return f"{'p' if value > 0 else 'n'}{max(1, round(SHADES * (abs(value) / largest)))}"


def _printed(relative: object) -> str:
    value = number(relative)
    return "not finite" if value is None else f"{value:+.3g}"
