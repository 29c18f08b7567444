"""Run a sweep: `python -m experiments.sweep sweep=gate seeds=0..4`; `--help` lists sweeps and keys."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from rich.console import Console

from experiments import cli, files
from experiments.compare.load import load as load_evaluations
from experiments.drawing import inline, render
from experiments.grid import Grid, markdown, markdown_text, print_grid
from experiments.run.workload import pluralize
from experiments.sweep import collect, crossed, execute, matched, tables
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import Sweep, SweepConfig, load, names
from upge.config import meanings
from upge.errors import ConfigError, UserError
from upge.evaluation.intervals import LEAST_SEEDS

PAGE = files.DOCS / "results.md"

#: The most runs that the report names as not done.
MOST_NAMED = 8

USAGE = """\
Usage: python -m experiments.sweep [sweep=NAME|FILE] [seeds=0..4] [grid.KEY=[A,B]] [key=value ...]
       [--dry-run] [--report] [--docs]

Runs experiments.run for every variant, combination of the grid and seed, several at once, evaluates every model, and
writes report.html, report.md, runs.csv and the figures into the sweep's folder. The same command continues an
interrupted sweep; failed runs are started again. A key that is not listed below is passed to every run. --dry-run lists
the runs and their states; --report only rewrites the report; --docs also writes it into docs/results.md. Exit code 4:
some runs failed, and the report has the others.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 2 bad input, 4 some runs failed, 128 + signal)."""
    return cli.run_command(_stoppable, arguments, help_text)


def _stoppable(arguments: list[str]) -> int:
    try:
        return _sweep(*cli.flags(arguments, "--dry-run", "--report", "--docs"))
    except KeyboardInterrupt:
        # `execute` handles signals while runs are going on; this handles them before and after.
        raise cli.Stopped(signal.SIGINT, "stopped; the same command continues") from None


def _sweep(arguments: Sequence[str], flags: dict[str, bool]) -> int:
    sweep = load(arguments)
    if sweep.config.choose:
        sweep, code = _chosen(sweep, flags)
        if code:
            return code
    folder = SweepFolder(sweep)
    execute.check(sweep)
    folder.check()
    print(f"{sweep.config.title or sweep.name}: {pluralize(len(sweep.runs), 'run')} → {folder.path}", flush=True)
    if flags["--dry-run"]:
        for planned in sweep.runs:
            state = "done" if folder.is_done(planned) else "trained" if folder.is_trained(planned) else "to do"
            print(f"  {state:8} {planned.slug:40} {shlex.join(planned.arguments(folder.run(planned)))}")
        return 0
    code = 0 if flags["--report"] else execute.execute(folder)
    return _report(folder, arguments, flags) or code


def _chosen(sweep: Sweep, flags: dict[str, bool]) -> tuple[Sweep, int]:
    """The sweep with the values chosen by another sweep, which is run first if it is not done."""
    name = sweep.config.choose["sweep"]
    passed = [f"{key}={getattr(sweep.config, key)}" for key in ("jobs", "gpus_per_run")]
    first = load([f"sweep={name}", f"output={sweep.folder.parent / Path(name).stem}", *passed])
    if first.config.select.get("key") != sweep.config.choose["key"]:
        raise ConfigError(f"choose.key: sweep={name} does not select {sweep.config.choose['key']}; see its select.key")
    folder = SweepFolder(first)
    if folder.path.resolve() == sweep.folder.resolve():
        raise ConfigError(f"output: {sweep.folder} is also that of sweep={name}, which is run first; give another")
    # The runs in the folder must have the settings that this sweep has now.
    folder.check()
    unfinished = [planned for planned in first.runs if not folder.is_done(planned)]
    if unfinished and (flags["--dry-run"] or flags["--report"]):
        raise ConfigError(
            f"choose: sweep={name} in {folder.path} has {pluralize(len(unfinished), 'run')} to do; run it first"
        )
    if unfinished:
        code = _sweep([f"sweep={name}", f"output={folder.path}", *passed], dict.fromkeys(flags, False))
        if code:
            return sweep, code
    values = collect.best_values(first, collect.rows(folder))
    print(f"{sweep.config.choose['key']} as chosen in {folder.path}: "
          + ", ".join(f"{group} {value}" for group, value in values.items()), flush=True)  # fmt: skip
    return collect.with_choices(sweep, values), 0


def _report(folder: SweepFolder, arguments: Sequence[str], flags: dict[str, bool]) -> int:
    shown = files.command("experiments.sweep", [a for a in arguments if not a.startswith(("output=", "jobs="))])
    made = report(folder, shown, lambda: provenance(folder))
    if made is None:
        print("no run is done yet, so there is nothing to report")
        return 0
    for grid in made.grids:
        print_grid(grid, Console())
        print()
    print(f"report: {folder.path / 'report.html'}")
    if flags["--docs"]:
        put_into(PAGE, made, shown)
        print(f"written into {PAGE}")
    return 0


def provenance(folder: SweepFolder) -> list[str]:
    """A sentence on how the runs were made: seeds, machine, versions, date."""
    runs = [p for p in folder.sweep.runs if folder.is_trained(p)]
    notes = [json.loads((folder.run(p) / "run.json").read_text()) for p in runs]
    seeds = sorted({p.seed for p in runs})
    versions, machines = notes[0]["versions"], sorted({note.get("machine") or note["device"] for note in notes})
    commits = sorted({(note.get("git_commit") or "unknown")[:9] for note in notes})
    ranks = sorted({note["world_size"] for note in notes})
    return [
        f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}; {' / '.join(machines)}, "
        f"{'/'.join(map(str, ranks))} process per run; torch {versions.get('torch')}, commit {', '.join(commits)}; "
        f"started {min(note['started'] for note in notes)[:10]}."
    ]


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    lines = [USAGE, "Sweeps (sweep=NAME):"]
    for name in names():
        one = load([f"sweep={name}"])
        lines.append(cli.help_row(name, f"{one.config.title} ({len(one.runs)} runs)", 24))
    lines.append("\nKeys of a sweep, in its file or on the command line:")
    lines += [cli.help_row(name, meaning, 24) for name, _, meaning in meanings(SweepConfig)]
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The results of a sweep so far.

    `drawn` are the files of the figures, PNG and SVG of each; `notes` say how the runs were made and what is missing.
    """

    sweep: Sweep
    grids: tuple[Grid, ...]
    drawn: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """(caption, PNG file) of each figure."""
        captions = {"dynamics.png": "Training, mean over seeds and 95 % band", "passk.png": "pass@k, mean over seeds"}
        return [(captions[path.name], path) for path in self.drawn if path.name in captions]


def report(folder: SweepFolder, command: str, provenance: Callable[[], Sequence[str]]) -> Report | None:
    """Read the runs and write everything into the sweep's folder; None if no run is trained yet.

    `command` reproduces the sweep, and `provenance` returns sentences on how the runs were made.
    """
    sweep, rows = folder.sweep, collect.rows(folder)
    if not rows:
        return None
    folder.path.mkdir(parents=True, exist_ok=True)
    collect.write_csv(folder.path / "runs.csv", rows)
    curves = crossed.reward_curves if crossed.crossed_key(sweep) else tables.metric_curves
    drawn = (*curves(folder, folder.path), *tables.pass_curves(folder, rows, folder.path))
    missing = [p.slug for p in sweep.runs if not folder.is_done(p)]
    notes = [f"Made with `{command}`.", *provenance()]
    columns = {column for row in rows for column in row}
    wanted = [*sweep.config.measures, *filter(None, [sweep.config.select.get("measure")])]
    unknown = [name for name in wanted if name not in columns]
    if unknown:
        notes.append(f"No run has the requested {', '.join(unknown)}; runs.csv has all columns.")
    notes += matched.missing(folder)
    if missing:
        more = f" and {len(missing) - MOST_NAMED} more; --dry-run lists them" if len(missing) > MOST_NAMED else ""
        named = ", ".join(missing[:MOST_NAMED])
        notes.append(f"{len(missing)} of {len(sweep.runs)} runs are not done: {named}{more}.")
    faulty = sorted({row["label"] for row in rows if "fault" in row})
    notes += [markdown_text(f"Trained with a fault on purpose: {'; '.join(faulty)}.")] if faulty else []
    notes += [markdown_text(note) for note in collect.answer_notes(folder)]
    if len(sweep.labels) > 1 and not sweep.config.select and len({run.seed for run in sweep.runs}) < LEAST_SEEDS:
        notes.append(f"There are no tests: a paired test takes at least {LEAST_SEEDS} seeds.")
    made = Report(sweep, tuple(_grids(folder, rows)), drawn, tuple(notes))
    (folder.path / "report.md").write_text(page(made), "utf-8")
    (folder.path / "report.html").write_text(_html(made, folder, rows), "utf-8")
    return made


def page(made: Report) -> str:
    """The text of report.md."""
    sweep = made.sweep
    parts = [f"# {markdown_text(title(sweep))}", "\n".join(f"{note}  " for note in made.notes)]
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
    if crossed.crossed_key(sweep):
        each = (crossed.value_grid, crossed.change_grid, crossed.variant_grid)
        compared = [one(sweep, rows, measure) for measure in measures for one in each]
        return [*compared, crossed.collapse_grid(folder), tables.cost_grid(sweep, rows)]
    grids: list[Grid | None] = []
    if sweep.config.select:
        done = {row["run"] for row in rows if collect.finite(row.get(sweep.config.select["measure"]))}
        grids += [tables.choice_grid(sweep, rows)] if all(p.slug in done for p in sweep.runs) else []
    grids += matched.matched_grids(folder) if sweep.config.match else []
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


def title(sweep: Sweep) -> str:
    """The title of the file, or else the sweep's name with its variants and the keys of its grid."""
    variants = ", ".join(sweep.config.variants)
    return sweep.config.title or f"Sweep {sweep.name}: " + " × ".join(filter(None, [variants, *sweep.config.grid]))


def run_lines(folder: SweepFolder, rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[dict[str, Any]]:
    """Label, seed, link and results of each trained run; the link goes to its report, or to its folder without one."""
    by_slug, lines = {row["run"]: row for row in rows}, []
    for planned in folder.sweep.runs:
        if planned.slug in by_slug:
            path, row = folder.run(planned), by_slug[planned.slug]
            address = path / "report.html" if (path / "report.html").is_file() else path
            values = [f"{100 * row[one]:.1f}" if collect.finite(row.get(one)) else "–" for one in measures]
            link = quote(address.relative_to(folder.path).as_posix())
            lines.append({"label": planned.label, "seed": planned.seed, "link": link, "values": values})
    return lines


def _html(made: Report, folder: SweepFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    pictures = [(caption, Markup(inline(path.with_suffix(".svg"), path.stem))) for caption, path in made.pictures]
    measures = collect.measures(rows, folder.sweep.config.measures)
    runs, names = run_lines(folder, rows, measures), collect.measure_names(measures)
    notes = [note.replace("`", "") for note in made.notes]
    page = {"title": title(made.sweep), "notes": notes, "pictures": pictures, "grids": made.grids}
    return render(Path(__file__).with_name("sweep.html.j2"), **page, runs=runs, measures=[*names.values()])


def put_into(page_path: Path, made: Report, command: str) -> None:
    """Write the tables between the markers of this sweep in a page, and the figures into a folder next to it.

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


if __name__ == "__main__":
    sys.exit(main())
