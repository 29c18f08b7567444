"""The report of a sweep: its figures, report.md, report.html, and the section of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from experiments.compare.curves import COLORS, Panel
from experiments.compare.curves import draw as draw_pass
from experiments.compare.load import load as load_evaluations
from experiments.drawing import dress, in_figure, inline, save
from experiments.grid import Grid, markdown, markdown_text
from experiments.sweep import collect, tables
from experiments.sweep.collect import COURSES, by_seed, course, evaluation_course, measure_names
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Sweep
from upge.errors import UserError
from upge.evaluation.intervals import Interval, t_interval
from upge.evaluation.passk import powers_of_two

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """What is known of a sweep so far.

    Attributes:
        sweep: whose.
        rows: of runs.csv.
        grids: the tables.
        drawn: figures, PNG and SVG of each.
        notes: sentences on what is missing and how it was made.
    """

    sweep: Sweep
    rows: tuple[Mapping[str, Any], ...]
    grids: tuple[Grid, ...]
    drawn: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """(what it shows, the PNG)."""
        said = {"dynamics.png": "Training, mean over seeds and 95 % band", "passk.png": "pass@k, mean over seeds"}
        return [(said[path.name], path) for path in self.drawn if path.name in said]


def report(folder: SweepFolder, command: str, facts: Callable[[], Sequence[str]]) -> Report | None:
    """Reads the runs and writes everything into the sweep's folder; None if no run is trained yet.

    Args:
        command: what makes all of it again.
        facts: says how the runs were made, in sentences.
    """
    sweep, rows = folder.sweep, collect.rows(folder)
    if not rows:
        return None
    folder.path.mkdir(parents=True, exist_ok=True)
    collect.write_csv(folder.path / "runs.csv", rows)
    drawn = (*courses(folder, folder.path), *pass_curves(folder, rows, folder.path))
    missing = [p.slug for p in sweep.runs if not folder.is_done(p)]
    notes = [f"Made with `{command}`.", *facts()]
    columns = {column for row in rows for column in row}
    wanted = [*sweep.config.measures, *filter(None, [sweep.config.select.get("measure")])]
    unknown = [name for name in wanted if name not in columns]
    if unknown:
        notes.append(f"No run has {', '.join(unknown)}, which is asked for; runs.csv has the columns that there are.")
    if missing:
        notes.append(f"{len(missing)} of {len(sweep.runs)} runs are not done: {', '.join(missing)}.")
    notes += [markdown_text(note) for note in collect.answer_notes(folder)]
    found = Report(sweep, tuple(rows), tuple(_grids(folder, rows)), drawn, tuple(notes))
    (folder.path / "report.md").write_text(page(found), "utf-8")
    (folder.path / "report.html").write_text(_html(found), "utf-8")
    return found


def page(found: Report) -> str:
    """report.md."""
    sweep = found.sweep
    parts = [f"# {markdown_text(sweep.config.title or sweep.name)}", "\n".join(f"{note}  " for note in found.notes)]
    return "\n\n".join([*parts, *sections(found)]) + "\n"


def sections(found: Report, pictures: str = "") -> list[str]:
    """Tables and figures in Markdown; `pictures` stands before the figures' names."""
    parts = []
    for grid in found.grids:
        parts += [f"**{markdown_text(grid.title)}**", markdown(grid)]
    return parts + [f"![{said}]({pictures}{path.name})" for said, path in found.pictures]


def _grids(folder: SweepFolder, rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    sweep = folder.sweep
    measures = collect.measures(rows, sweep.config.measures)
    grids: list[Grid | None] = []
    if sweep.config.select:
        done = {row["run"] for row in rows if collect.finite(row.get(sweep.config.select["measure"]))}
        grids += [tables.choice_grid(sweep, rows)] if all(p.slug in done for p in sweep.runs) else []
    grids += [tables.mean_grid(sweep, rows, measures)] if measures else []
    grids += [tables.difference_grid(sweep, rows, measures)] if not sweep.config.select else []
    grids += [tables.level_grid(sweep, rows)] if len(sweep.labels) <= 12 else []
    for name in sweep.config.evaluate if not sweep.config.select else ():
        grids.append(tables.exclusive_grid(sweep, name, _evaluations(folder, name)))
    grids.append(tables.cost_grid(sweep, rows))
    return [grid for grid in grids if grid is not None]


def _evaluations(folder: SweepFolder, name: str) -> dict[tuple[str, int], Any]:
    """(label, seed) → its evaluation, of those that are finished."""
    done = [p for p in folder.sweep.runs if folder.is_trained(p) and name not in folder.missing(p)]
    if not done:
        return {}
    runs = load_evaluations([str(folder.evaluation(p, name)) for p in done], [p.slug for p in done])
    return {(p.label, p.seed): run for p, run in zip(done, runs, strict=True)}


def _html(found: Report) -> str:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    pictures = [(said, Markup(inline(path.with_suffix(".svg"), path.stem))) for said, path in found.pictures]
    return environment.get_template("sweep.html.j2").render(
        title=found.sweep.config.title or found.sweep.name, notes=[note.replace("`", "") for note in found.notes],
        grids=found.grids, pictures=pictures)  # fmt: skip


def put_into(page_path: Path, found: Report, command: str) -> None:
    """Writes the tables between the marks of this sweep in a page, and the figures into a folder beside it.

    Raises:
        UserError: the page has no such marks.
    """
    name, text = found.sweep.name, page_path.read_text("utf-8")
    begin, end = f"<!-- sweep {name}: begin -->", f"<!-- sweep {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page_path}: expected the lines '{begin}' and '{end}' once each, where the tables go")
    target = page_path.parent / page_path.stem
    target.mkdir(exist_ok=True)
    for _, path in found.pictures:
        (target / f"{name}-{path.name}").write_bytes(path.read_bytes())
    parts = [f"```\n{command}\n```", " ".join(found.notes[1:]), *sections(found, f"{page_path.stem}/{name}-")]
    before, after = text.split(begin)[0], text.split(end)[1]
    page_path.write_text(before + begin + "\n" + "\n\n".join(filter(None, parts)) + "\n" + end + after, "utf-8")


#: A course is averaged over blocks of steps, so many over the whole run: single steps are noise.
BLOCKS = 20


def pass_curves(folder: SweepFolder, rows: Sequence[Mapping], target: Path) -> list[Path]:
    """passk.png and .svg: a panel for every benchmark that has several samples; nothing where there is none."""
    labels, panels = folder.sweep.labels, []
    columns = dict.fromkeys(column for row in rows for column in row)
    names = measure_names(list(columns))
    for place in [c.removesuffix("/pass@1") for c in columns if c.endswith("/pass@1") and c.count("/") == 2]:
        largest = max(int(c.rsplit("@", 1)[1]) for c in columns if c.startswith(f"{place}/pass@"))
        curves = {}
        for label in labels:
            found = {k: list(by_seed(rows, label, f"{place}/pass@{k}").values()) for k in powers_of_two(largest)}
            curves[label] = {k: _visible(t_interval(values), values) for k, values in found.items() if values}
        panels.append(Panel(names[f"{place}/avg"], {label: curve for label, curve in curves.items() if curve}))
    return draw_pass(panels, labels, target) if panels else []


def courses(folder: SweepFolder, target: Path) -> list[Path]:
    """dynamics.png and .svg: a panel for every metric of `COURSES`, and for the evaluations where there are several."""
    panels = [(title, unit, _of(folder, lambda path, m=metric: blocks(course(path, m)))) for metric, (title, unit) in
              COURSES.items()]  # fmt: skip
    for measure in ("greedy", *_sampled_measures(folder)):
        found = _of(folder, lambda path, m=measure: evaluation_course(path, m))
        if any(len(line) > 2 for line in found.values()):
            panels.append((f"Evaluation, {measure}", "share", found))
    panels = [panel for panel in panels if any(panel[2].values())]
    if not panels:
        return []
    columns = min(3, len(panels))
    size = (3.1 * columns + 0.4, 2.3 * math.ceil(len(panels) / columns) + 0.5)
    return save(target, "dynamics", size, lambda figure: _draw(figure, columns, panels, folder.sweep.labels))


def blocks(values: Mapping[int, float], count: int = BLOCKS) -> dict[int, float]:
    """Means over `count` blocks of steps as long as each other, under the middle step of each."""
    if len(values) <= count:
        return dict(values)
    last = max(values)
    length = math.ceil(last / count)
    found: dict[int, list[float]] = {}
    for step, value in values.items():
        found.setdefault((step - 1) // length, []).append(value)
    return {b * length + (length + 1) // 2: sum(all) / len(all) for b, all in sorted(found.items())}


def _of(folder: SweepFolder, read) -> dict[str, dict[int, Interval]]:
    """Label → step → interval over its seeds, at the steps that all of them have."""
    found: dict[str, dict[int, Interval]] = {}
    for label in folder.sweep.labels:
        lines = [read(folder.run(p)) for p in folder.sweep.runs if p.label == label and folder.is_trained(p)]
        steps = set.intersection(*map(set, lines)) if lines else set()
        found[label] = {step: _visible(t_interval([line[step] for line in lines]), lines) for step in sorted(steps)}
    return found


def _sampled_measures(folder: SweepFolder) -> list[str]:
    """mean@k and pass@k as the runs' evaluations call them."""
    for planned in folder.sweep.runs:
        file = folder.run(planned) / "config.yaml"
        if file.is_file():
            samples = OmegaConf.load(file).eval.samples
            return [f"mean@{samples}", f"pass@{samples}"]
    return []


def _draw(figure: Figure, columns: int, panels: Sequence, labels: Sequence[str]) -> None:
    grid, lines = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False), {}
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        title, unit, curves = panels[place]
        for label, curve in curves.items():
            if curve:
                lines[label] = _line(axes, curve, labels.index(label))
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("step" if place + columns >= len(panels) else "")
        dress(axes)
        drawn = [one.value for curve in curves.values() for one in curve.values()]
        # By the lines: a band of three seeds can be many times as high as all that they show.
        bottom, top = min(0, 1.1 * min(drawn)), max(0, 1.12 * max(drawn))
        axes.set_ylim(bottom, top if top > bottom else 1)
    shown = [label for label in labels if label in lines]
    figure.legend([lines[label] for label in shown], [in_figure(label) for label in shown], loc="outside upper left",
                  ncols=min(4, len(shown)), frameon=False)  # fmt: skip


def _line(axes, curve: Mapping[int, Interval], index: int):
    color, dash = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
    low, high = ([getattr(one, end) for one in curve.values()] for end in ("low", "high"))
    axes.fill_between(list(curve), low, high, color=color, alpha=0.14, linewidth=0)
    (line,) = axes.plot(list(curve), [one.value for one in curve.values()], color=color, linestyle=dash, linewidth=1.7)
    return line


def _visible(interval: Interval, runs: Sequence) -> Interval:
    """With the interval as its band; of one run there is none, and that of two covers the page."""
    value = interval.value
    return Interval(value, value, value) if len(runs) < 3 else interval
