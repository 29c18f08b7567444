"""Compare evaluations: accuracy, pass@k, exclusive solves, and the uncertainty of their differences.

    python -m experiments.compare evals/first evals/second ... [output=FOLDER] [KEY=VALUE ...]

Each folder is the output of experiments.evaluate. Differences and exclusive solves compare every other run with the
first. Without output= the tables are only printed. With output= the folder gets compare.md (read this first),
compare.csv (one value per line), compare.tex (needs booktabs), passk.png and passk.svg.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments import cli
from experiments.compare import write
from experiments.compare.load import Run, load, notes
from experiments.compare.tables import RULES, Scores, exclusive, exclusive_grid, gap_grid, gaps, pass_grid, score_grid
from experiments.compare.write import Comparison, Pair
from experiments.files import output_path
from experiments.grid import print_grid
from upge.errors import ConfigError, nearest

KEYS = {
    "output": "folder for the files; without it none are written",
    "names": "names of the runs, separated by commas; default: the names of their folders",
    "solved": "when a problem counts as solved among several samples: most (more than half correct), first, any",
}


@dataclass(frozen=True)
class Settings:
    """The settings of a command line: the folders of the runs, and the keys of `KEYS`."""

    runs: tuple[str, ...]
    output: Path | None = None
    names: tuple[str, ...] = ()
    solved: str = "most"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 2 bad input)."""
    return cli.run_command(_compare, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    return "\n".join([str(__doc__), *(f"    {key:<10} {text}" for key, text in KEYS.items())])


def _compare(arguments: list[str]) -> int:
    settings = read(arguments)
    runs = load(settings.runs, settings.names)
    comparison = compare(runs, settings)
    console = Console(highlight=False)
    show(comparison, console)
    if settings.output is not None:
        for path in write.files(comparison, settings.output):
            console.print(f"wrote {path}", soft_wrap=True, markup=False)
    return cli.DONE


def read(arguments: Sequence[str]) -> Settings:
    """Read a command line; a folder may have = in its name, as those of sweeps do.

    Raises:
        ConfigError: an unknown key, or an invalid value.
    """
    runs = tuple(argument for argument in arguments if "=" not in argument or Path(argument).is_dir())
    given: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in runs:
            continue
        if key not in KEYS:
            raise ConfigError(f"{key}: neither a key nor a folder ({argument}); {nearest(key, KEYS)}")
        given[key] = value
    if not given.get("output", "."):
        raise ConfigError("output: empty; give a folder")
    if given.get("solved", "most") not in RULES:
        raise ConfigError(f"solved: found {given['solved']!r}; give one of {', '.join(RULES)}")
    if "output" in given:
        given["output"] = output_path(str(given["output"]))
    if "names" in given:
        given["names"] = tuple(str(given["names"]).split(","))
    return Settings(runs, **given)


def compare(runs: Sequence[Run], settings: Settings) -> Comparison:
    """Compute everything that is shown and written."""
    scores = Scores.of(runs)
    first, *others = runs
    pairs = []
    for other in others:
        differences = gaps(first, other)
        solves = exclusive(first, other, settings.solved)
        pairs.append(Pair(first.name, other.name, tuple(differences), tuple(solves)))
    panels = write.panels(scores)
    remarks = (*notes(runs), *([] if panels else ["There are no pass@k curves: no benchmark has several samples."]))
    return Comparison(scores, tuple(pairs), tuple(panels), remarks, settings.solved)


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables and the notes."""
    grids = [score_grid(comparison.scores), pass_grid(comparison.scores)]
    for pair in comparison.pairs:
        grids += [gap_grid(pair.first, pair.second, pair.gaps)] if pair.gaps else []
        grids += [exclusive_grid(pair.first, pair.second, pair.exclusive, comparison.solved)] if pair.exclusive else []
    for grid in grids:
        if grid is not None:
            print_grid(grid, console)
            console.print()
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
