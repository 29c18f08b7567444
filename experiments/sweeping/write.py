"""The report of a sweep: report.md, report.html (one file, readable without a server), runs.csv and the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.comparing.load import load as load_evaluations
from experiments.comparing.render import Grid, markdown, markdown_text
from experiments.drawing import inline
from experiments.sweeping import collect, figures, tables
from experiments.sweeping.folder import SweepFolder
from experiments.sweeping.settings import Sweep
from upge.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "templates"


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
    drawn = (*figures.courses(folder, folder.path), *figures.pass_curves(folder, rows, folder.path))
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
