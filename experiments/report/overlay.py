"""Several runs on one HTML page: a chart per metric with a line per run, their evaluations, and how they differ."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiments.drawing import render
from experiments.grid import measures, number
from experiments.report.colors import color_names, color_values
from experiments.report.draw import smoothing_window
from experiments.report.folder import RunFolder, read_run
from experiments.report.page import chart, facts, visible, what_ran
from experiments.report.plots import PLOTS, Plot, parts_of
from experiments.report.series import (
    Series,
    evaluation_plot,
    evaluation_series,
    is_constant,
    levels_of,
    matching,
    series_by_key,
)
from upge.errors import DataError
from upge.train.files import write_atomically

#: Settings that differ between any two runs.
_OWN = ("output", "seed")
#: Keys of quarters of the response, of which there would be too many charts.
_DETAIL = re.compile(r"_q\d$")
_LONGEST_VALUE = 200
_TIME = "Sampling, verification, training and the update of the sampler's weights."


def write_overlay(folders: Sequence[str | Path], target: Path | None = None) -> Path:
    """Write a page with several runs and return its path, by default overlay.html in their deepest common folder.

    Raises:
        UserError: a folder does not exist or is not the folder of a run, or the page cannot be written.
    """
    runs = {path: read_run(path) for path in dict.fromkeys(Path(folder).resolve() for folder in folders)}
    named = dict(zip(names([*runs]), runs.values(), strict=True))
    target = (target or Path(os.path.commonpath([path.parent for path in runs])) / "overlay.html").resolve()
    page = render(Path(__file__).with_name("overlay.html.j2"), **content(named, target.parent))
    try:
        write_atomically(target, visible(page))
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --overlay") from error
    return target


def names(folders: Sequence[Path]) -> list[str]:
    """The displayed names of runs: their folders' names, with as many parents as it takes to tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        shown = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len({*shown}) == len(shown):
            break
    return shown


def content(runs: Mapping[str, RunFolder], folder: Path) -> dict[str, Any]:
    """The values of the template for runs by name; links are relative to `folder`."""
    colors = color_names(runs)
    evaluations = _evaluations(runs)
    plots = [(replace(plot, palette=tuple(colors[one.label] for one in series)), series)
             for plot, series in (*evaluations, *metric_plots(runs))]  # fmt: skip
    windows = (smoothing_window(one) for plot, series in plots if plot.kind == "line" for one in series)
    about = [
        {"name": name, "color": colors[name], "what": " · ".join(what_ran(run)), "facts": facts(run)[1:],
         "link": _link(run.path / "report.html", folder)}
        for name, run in runs.items()
    ]  # fmt: skip
    return {
        "title": " · ".join(runs) if len(runs) <= 4 else f"{len(runs)} runs",
        "runs": about,
        "colors": color_values(len(runs)),
        "window": max(windows, default=1),
        "settings": different_settings([run.config for run in runs.values()]),
        "accuracy": accuracy(runs),
        "figures": [chart(plot, series) for plot, series in plots if plot.section == "training"],
        "gradient": [chart(plot, series) for plot, series in plots if plot.section == "gradient"],
    }


def metric_plots(runs: Mapping[str, RunFolder]) -> list[tuple[Plot, list[Series]]]:
    """A plot for each metric that at least two runs have, with a line per run; none that is constant throughout."""
    metrics = {name: series_by_key(run.metrics) for name, run in runs.items()}
    parts = [parts_of(run.config.get("algo")) for run in runs.values()]
    remaining = dict.fromkeys(key for lines in metrics.values() for key in lines)
    plots = []
    for plot in PLOTS:
        if plot.kind == "stack":
            plot = replace(plot, keys=("time/total",), without=(), kind="line", caption=_TIME)
        keys = matching(plot, remaining) if all(map(plot.when, parts)) and plot.kind == "line" else []
        shown = []
        for key in keys:
            del remaining[key]
            series = [replace(lines[key], label=name) for name, lines in metrics.items() if key in lines]
            if len(series) > 1 and not _DETAIL.search(key) and not is_constant(series) and _exceed(series, plot.floor):
                shown.append((key, series))
        for place, (key, series) in enumerate(shown):
            title = plot.title.removesuffix(" of each term") + (f": {key}" if len(shown) > 1 else "")
            plots.append((replace(plot, identifier=f"{plot.identifier}-{place}", title=title), series))
    return plots


def _exceed(series: Sequence[Series], floor: float) -> bool:
    return any(abs(value) > floor for one in series for value in one.finite()) or not floor


def _evaluations(runs: Mapping[str, RunFolder]) -> list[tuple[Plot, list[Series]]]:
    """A plot for each accuracy over all problems that at least two runs have."""
    plots = []
    for measure in measures(*(line for run in runs.values() for line in run.evaluations)):
        lines = {name: evaluation_series(run.evaluations, "all", measure) for name, run in runs.items()}
        series = [replace(one, label=name) for name, one in lines.items() if one.finite()]
        if len(series) > 1 and any(len(one.steps) > 1 for one in series):
            plot = evaluation_plot(measure)
            plots.append((replace(plot, unit="% of all problems correct", identifier=f"{plot.identifier}-all"), series))
    return plots


def accuracy(runs: Mapping[str, RunFolder]) -> dict[str, Any] | None:
    """The last evaluation of each run: a row per level, and for each measure a column per run; None without any."""
    last = {name: run.evaluations[-1] for name, run in runs.items() if run.evaluations}
    if not last:
        return None
    rows = []
    for level in [*levels_of([*last.values()]), "all"]:
        scores = {name: {**line.get("levels", {}), "all": line.get("all", {})}.get(level, {})
                  for name, line in last.items()}  # fmt: skip
        values = [number(scores.get(name, {}).get(one)) for one in measures(*last.values()) for name in runs]
        if any(value is not None for value in values):
            rows.append((level, ["–" if value is None else f"{100 * value:.1f}" for value in values]))
    steps = {name: line["step"] for name, line in last.items()}
    return {"measures": measures(*last.values()), "rows": rows, "steps": steps}


def different_settings(configs: Sequence[Mapping]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the settings that are not the same in all runs; "–" where a run lacks the key."""
    flat = [dict(_leaves(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "–") for one in flat]) for key in keys if key.split(".")[0] not in _OWN]
    return [(key, values) for key, values in rows if len({*values}) > 1]


def _leaves(tree: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    leaves = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", str(value)[:_LONGEST_VALUE]))
    return leaves


def _link(path: Path, folder: Path) -> str:
    """The address of a file from a page in `folder`; empty if the file does not exist."""
    return quote(os.path.relpath(path.resolve(), folder)) if path.is_file() else ""
