"""Watch a run: `python -m experiments.watch runs/my-run`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments import cli, hints
from experiments.grid import number
from experiments.watch.server import serving
from experiments.watch.tail import COLUMNS, Run, cells
from upge.config import Settings, from_tree, key, meanings, parse, split
from upge.errors import ConfigError
from upge.train.files import read_tree

USAGE = """\
Usage: python -m experiments.watch RUN [port=N] [every=SECONDS] [--no-serve]

Prints the metrics of a run as it writes them, and serves its report at an address of this machine that no other
machine can reach. The page follows the run's files, and a browser reloads it automatically.
RUN is the folder of a run, which may be running or have ended. Ctrl-C ends the watch and leaves the run alone; with
--no-serve the watch also ends with the run.
"""
#: Steps that a terminal shows.
SHOWN = 12


@dataclass(frozen=True)
class WatchConfig(Settings):
    """How a run is watched."""

    port: int = key(0, "port of the report's address; 0 = a free one", minimum=0, maximum=65535)
    every: float = key(2.0, "seconds between two reads of the run's files", above=0, maximum=3600)


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until Ctrl-C, or with --no-serve until the run ends; return the exit code."""
    return cli.run_command(_watch, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    rows = [cli.help_row(f"{name}={default}", meaning) for name, default, meaning in meanings(WatchConfig)]
    return "\n".join([USAGE, *rows])


def _watch(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--no-serve")
    folders = [one for one in arguments if "=" not in one or Path(one).is_dir()]
    if len(folders) != 1:
        raise ConfigError(f"found {len(folders)} folders; give that of one run, as in upge watch runs/my-run")
    config = _settings([one for one in arguments if one not in folders])
    run = _run(Path(folders[0]).expanduser())
    with cli.stopped_by_signals(), contextlib.ExitStack() as held:
        address = "" if given["--no-serve"] else held.enter_context(serving(run.folder, config.port))
        console = Console(highlight=False)
        show = _live if console.is_terminal else _printed
        show(run, config.every, console, address)
    return cli.DONE


def _settings(arguments: Sequence[str]) -> WatchConfig:
    names = [row[0] for row in meanings(WatchConfig)]
    tree = {}
    for name, text in map(split, arguments):
        if name not in names:
            raise ConfigError(f"{name}: unknown key; {hints.unknown(name, names)}")
        tree[name] = parse(name, text)
    return from_tree(WatchConfig, tree)


def _run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: there is no such folder, or it is not that of a run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        what = "is not the folder of a run: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} {what}; give the folder that the run names at its start, as output=FOLDER does")
    steps = number(read_tree(path, "restore the file that the run wrote").get("steps"))
    return Run(folder, None if steps is None else int(steps))


def _printed(run: Run, every: float, console: Console, address: str) -> None:
    """Print a line for each step, where the output is not a terminal."""
    if address:
        console.print(f"report: {address}", soft_wrap=True)
    widths = [6, *(max(9, len(title)) for title in COLUMNS)]

    def row(words: Sequence[str]) -> str:
        return "  ".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))

    console.print(row(["step", *COLUMNS]), soft_wrap=True)
    while True:
        ending = run.ending
        for line in run.look():
            console.print(row(cells(line)), soft_wrap=True)
        if ending:
            console.print(f"{run.summary()}\n{ending}", soft_wrap=True)
            break
        time.sleep(every)
    while address:
        time.sleep(every)


def _live(run: Run, every: float, console: Console, address: str) -> None:
    """Show the last steps in a table that is redrawn."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            ending = run.ending
            run.look()
            live.update(_table(run, ending, address), refresh=True)
            if ending and not address:
                return
            time.sleep(every)


def _table(run: Run, ending: str, address: str) -> Group:
    table = Table(box=SIMPLE_HEAD)
    for title in ("step", *COLUMNS):
        table.add_column(title, justify="right")
    for line in run.lines[-SHOWN:]:
        table.add_row(*cells(line))
    below = [run.summary(), ending, f"report: {address}" if address else ""]
    return Group(Text(str(run.folder)), table, *(Text(one) for one in below if one))


if __name__ == "__main__":
    sys.exit(main())
