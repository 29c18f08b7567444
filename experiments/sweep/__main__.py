"""Run a sweep: `python -m experiments.sweep sweep=gate seeds=0..4`; `--help` lists sweeps and keys."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli, results
from experiments.results import DOCS
from upge.errors import ConfigError

PAGE = DOCS / "results.md"

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
    """Runs the command line; returns the exit code (0 done, 2 bad input, 4 some runs failed, 128 + signal)."""
    return cli.run_command(_stoppable, arguments, help_text)


def _stoppable(arguments: list[str]) -> int:
    try:
        return _sweep(*cli.flags(arguments, "--dry-run", "--report", "--docs"))
    except KeyboardInterrupt:
        # `execute` handles signals while runs are going on; this handles them before and after.
        raise cli.Stopped(signal.SIGINT, "stopped; the same command continues") from None


def _sweep(arguments: Sequence[str], flags: dict[str, bool]) -> int:
    from experiments.sweep.execute import check, execute
    from experiments.sweep.folder import SweepFolder
    from experiments.sweep.settings import load

    sweep = load(arguments)
    if sweep.config.choose:
        sweep, code = _chosen(sweep, flags)
        if code:
            return code
    folder = SweepFolder(sweep)
    check(sweep)
    folder.check()
    print(f"{sweep.config.title or sweep.name}: {len(sweep.runs)} runs → {folder.path}", flush=True)
    if flags["--dry-run"]:
        for planned in sweep.runs:
            state = "done" if folder.is_done(planned) else "trained" if folder.is_trained(planned) else "to do"
            print(f"  {state:8} {planned.slug:40} {shlex.join(planned.arguments(folder.run(planned)))}")
        return 0
    code = 0 if flags["--report"] else execute(folder)
    return _report(folder, arguments, flags) or code


def _chosen(sweep, flags: dict[str, bool]):
    """The sweep with the values chosen by another sweep, which is run first if it is not done."""
    from experiments.sweep.collect import best_values, rows, with_choices
    from experiments.sweep.folder import SweepFolder
    from experiments.sweep.settings import load

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
    undone = [planned for planned in first.runs if not folder.is_done(planned)]
    if undone and (flags["--dry-run"] or flags["--report"]):
        raise ConfigError(f"choose: sweep={name} in {folder.path} has {len(undone)} runs to do; run it first")
    if undone:
        code = _sweep([f"sweep={name}", f"output={folder.path}", *passed], dict.fromkeys(flags, False))
        if code:
            return sweep, code
    values = best_values(first, rows(folder))
    print(f"{sweep.config.choose['key']} as chosen in {folder.path}: "
          + ", ".join(f"{group} {value}" for group, value in values.items()), flush=True)  # fmt: skip
    return with_choices(sweep, values), 0


def _report(folder, arguments: Sequence[str], flags: dict[str, bool]) -> int:
    from rich.console import Console

    from experiments.grid import print_grid
    from experiments.sweep import write

    shown = results.command("experiments.sweep", [a for a in arguments if not a.startswith(("output=", "jobs="))])
    report = write.report(folder, shown, lambda: facts(folder))
    if report is None:
        print("no run is done yet, so there is nothing to report")
        return 0
    for grid in report.grids:
        print_grid(grid, Console())
        print()
    print(f"report: {folder.path / 'report.html'}")
    if flags["--docs"]:
        write.put_into(PAGE, report, shown)
        print(f"written into {PAGE}")
    return 0


def facts(folder) -> list[str]:
    """A sentence on how the runs were made: seeds, machine, versions, date."""
    import json

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


def help_text() -> str:
    """What --help prints."""
    from experiments.sweep.settings import SweepConfig, load, names
    from upge.config import meanings

    lines = [USAGE, "Sweeps (sweep=NAME):"]
    for name in names():
        one = load([f"sweep={name}"])
        lines.append(cli.help_row(name, f"{one.config.title} ({len(one.runs)} runs)", 24))
    lines.append("\nKeys of a sweep, in its file or on the command line:")
    lines += [cli.help_row(name, meaning, 24) for name, _, meaning in meanings(SweepConfig)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
