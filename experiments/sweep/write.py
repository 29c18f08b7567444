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

from experiments.compare.load import load as load_evaluations
from experiments.compare.write import COLORS, Panel
from experiments.compare.write import draw as draw_pass
from experiments.drawing import dress, in_figure, inline, save
from experiments.grid import Grid, markdown, markdown_text
from experiments.sweep import collect, tables
from experiments.sweep.collect import CURVES, by_seed, evaluation_curve, measure_names, metric_curve
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Sweep
from upge.errors import UserError
from upge.evaluation.intervals import Interval, t_interval
from upge.evaluation.passk import powers_of_two

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """The results of a sweep so far.

    Attributes:
        sweep: the sweep.
        rows: the rows of runs.csv.
        grids: the tables.
        drawn: the files of the figures, PNG and SVG of each.
        notes: sentences on how the runs were made and what is missing.
    """

    sweep: Sweep
    rows: tuple[Mapping[str, Any], ...]
    grids: tuple[Grid, ...]
    drawn: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """(caption, PNG file) of each figure."""
        captions = {"dynamics.png": "Training, mean over seeds and 95 % band", "passk.png": "pass@k, mean over seeds"}
        return [(captions[path.name], path) for path in self.drawn if path.name in captions]


def report(folder: SweepFolder, command: str, facts: Callable[[], Sequence[str]]) -> Report | None:
    """Reads the runs and writes everything into the sweep's folder; None if no run is trained yet.

    Args:
        folder: the sweep's folder.
        command: the command that reproduces the sweep.
        facts: returns sentences on how the runs were made.
    """
    sweep, rows = folder.sweep, collect.rows(folder)
    if not rows:
        return None
    folder.path.mkdir(parents=True, exist_ok=True)
    collect.write_csv(folder.path / "runs.csv", rows)
    drawn = (*metric_curves(folder, folder.path), *pass_curves(folder, rows, folder.path))
    missing = [p.slug for p in sweep.runs if not folder.is_done(p)]
    notes = [f"Made with `{command}`.", *facts()]
    columns = {column for row in rows for column in row}
    wanted = [*sweep.config.measures, *filter(None, [sweep.config.select.get("measure")])]
    unknown = [name for name in wanted if name not in columns]
    if unknown:
        notes.append(f"No run has the requested {', '.join(unknown)}; runs.csv has all columns.")
    if missing:
        notes.append(f"{len(missing)} of {len(sweep.runs)} runs are not done: {', '.join(missing)}.")
    notes += [markdown_text(note) for note in collect.answer_notes(folder)]
    made = Report(sweep, tuple(rows), tuple(_grids(folder, rows)), drawn, tuple(notes))
    (folder.path / "report.md").write_text(page(made), "utf-8")
    (folder.path / "report.html").write_text(_html(made), "utf-8")
    return made


def page(made: Report) -> str:
    """The text of report.md."""
    sweep = made.sweep
    parts = [f"# {markdown_text(sweep.config.title or sweep.name)}", "\n".join(f"{note}  " for note in made.notes)]
    return "\n\n".join([*parts, *sections(made)]) + "\n"


def sections(made: Report, pictures: str = "") -> list[str]:
    """Tables and figures in Markdown; the figures' file names get the prefix `pictures`."""
    parts = []
    for grid in made.grids:
        parts += [f"**{markdown_text(grid.title)}**", markdown(grid)]
    return parts + [f"![{caption}]({pictures}{path.name})" for caption, path in made.pictures]


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
    """(label, seed) → the evaluation, for the finished ones."""
    done = [p for p in folder.sweep.runs if folder.is_trained(p) and name not in folder.missing(p)]
    if not done:
        return {}
    runs = load_evaluations([str(folder.evaluation(p, name)) for p in done], [p.slug for p in done])
    return {(p.label, p.seed): run for p, run in zip(done, runs, strict=True)}


def _html(made: Report) -> str:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    pictures = [(caption, Markup(inline(path.with_suffix(".svg"), path.stem))) for caption, path in made.pictures]
    return environment.get_template("sweep.html.j2").render(
        title=made.sweep.config.title or made.sweep.name, notes=[note.replace("`", "") for note in made.notes],
        grids=made.grids, pictures=pictures)  # fmt: skip


def put_into(page_path: Path, made: Report, command: str) -> None:
    """Writes the tables between the markers of this sweep in a page, and the figures into a folder next to it.

    Raises:
        UserError: the page does not have the markers once each.
    """
    name, text = made.sweep.name, page_path.read_text("utf-8")
    begin, end = f"<!-- sweep {name}: begin -->", f"<!-- sweep {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page_path}: expected the lines '{begin}' and '{end}' once each, where the tables go")
    target = page_path.parent / page_path.stem
    target.mkdir(exist_ok=True)
    for _, path in made.pictures:
        (target / f"{name}-{path.name}").write_bytes(path.read_bytes())
    parts = [f"```\n{command}\n```", " ".join(made.notes[1:]), *sections(made, f"{page_path.stem}/{name}-")]
    before, after = text.split(begin)[0], text.split(end)[1]
    page_path.write_text(before + begin + "\n" + "\n\n".join(filter(None, parts)) + "\n" + end + after, "utf-8")


#: Number of blocks of steps over which a curve is averaged, because single steps are noisy.
BLOCKS = 20


def pass_curves(folder: SweepFolder, rows: Sequence[Mapping], target: Path) -> list[Path]:
    """Draws passk.png and .svg, a panel for every benchmark with several samples; no files if there is none."""
    labels, panels = folder.sweep.labels, []
    columns = dict.fromkeys(column for row in rows for column in row)
    names = measure_names(list(columns))
    for place in [c.removesuffix("/pass@1") for c in columns if c.endswith("/pass@1") and c.count("/") == 2]:
        largest = max(int(c.rsplit("@", 1)[1]) for c in columns if c.startswith(f"{place}/pass@"))
        curves = {}
        for label in labels:
            by_k = {k: list(by_seed(rows, label, f"{place}/pass@{k}").values()) for k in powers_of_two(largest)}
            curves[label] = {k: _visible(t_interval(values), values) for k, values in by_k.items() if values}
        panels.append(Panel(names[f"{place}/avg"], {label: curve for label, curve in curves.items() if curve}))
    return draw_pass(panels, labels, target) if panels else []


def metric_curves(folder: SweepFolder, target: Path) -> list[Path]:
    """Draws dynamics.png and .svg, a panel for every metric of `CURVES` and for evaluations during training."""
    panels = []
    for metric, (title, unit) in CURVES.items():
        panels.append((title, unit, _of(folder, lambda path, m=metric: blocks(metric_curve(path, m)))))
    for measure in ("greedy", *_sampled_measures(folder)):
        curves = _of(folder, lambda path, m=measure: evaluation_curve(path, m))
        if any(len(line) > 2 for line in curves.values()):
            panels.append((f"Evaluation, {measure}", "share", curves))
    panels = [panel for panel in panels if any(panel[2].values())]
    if not panels:
        return []
    columns = min(3, len(panels))
    size = (3.1 * columns + 0.4, 2.3 * math.ceil(len(panels) / columns) + 0.5)
    return save(target, "dynamics", size, lambda figure: _draw(figure, columns, panels, folder.sweep.labels))


def blocks(values: Mapping[int, float], count: int = BLOCKS) -> dict[int, float]:
    """Middle step → mean, over at most `count` blocks of steps of equal length."""
    if len(values) <= count:
        return dict(values)
    last = max(values)
    length = math.ceil(last / count)
    by_block: dict[int, list[float]] = {}
    for step, value in values.items():
        by_block.setdefault((step - 1) // length, []).append(value)
    return {b * length + (length + 1) // 2: sum(all) / len(all) for b, all in sorted(by_block.items())}


def _of(folder: SweepFolder, read) -> dict[str, dict[int, Interval]]:
    """Label → step → interval over its seeds, at the steps that all of them have."""
    curves: dict[str, dict[int, Interval]] = {}
    for label in folder.sweep.labels:
        lines = [read(folder.run(p)) for p in folder.sweep.runs if p.label == label and folder.is_trained(p)]
        steps = set.intersection(*map(set, lines)) if lines else set()
        curves[label] = {step: _visible(t_interval([line[step] for line in lines]), lines) for step in sorted(steps)}
    return curves


def _sampled_measures(folder: SweepFolder) -> list[str]:
    """The names of mean@k and pass@k in the runs' own evaluations."""
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
        # Limits come from the lines, because a band over three seeds can be many times as high.
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
    """The interval, without its band for fewer than three runs, where the band is undefined or covers the page."""
    value = interval.value
    return Interval(value, value, value) if len(runs) < 3 else interval
