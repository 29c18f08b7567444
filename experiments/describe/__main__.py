"""Describe the algorithms: `python -m experiments.describe` lists them and the corrections.

`algo=NAME` shows one, also with `correction=NAME`, correction.NAME.KEY=VALUE and algo.KEY=VALUE.

Everything is read from the files and the parts themselves, so it cannot differ from what runs. `--readme` updates the
table in README.md, `--docs` updates docs/algorithms.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli
from experiments.config import correction_names
from experiments.describe import page
from experiments.describe.listing import README, corrections_table, describe, table, updated
from upge.errors import ConfigError


def _parse(arguments: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """(algorithm, overrides, corrections) of a command line."""
    name, overrides, corrections = None, [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "algo" and equals:
            name = value
        elif key == "correction" and equals:
            corrections = correction_names(value)
        elif key.startswith(("algo.", "correction.")) and equals:
            overrides.append(argument.removeprefix("algo."))
        else:
            raise ConfigError(f"'{argument}': give algo=NAME, correction=NAME and algo.KEY=VALUE, or nothing at all")
    if name is None and arguments:
        raise ConfigError(f"'{arguments[0]}': also give algo=NAME")
    return name, overrides, corrections


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the description, or updates the docs; returns the exit code, 2 on bad input."""
    return cli.run_command(_describe, arguments, lambda: str(__doc__))


def _describe(arguments: list[str]) -> int:
    try:
        if arguments == ["--readme"]:
            README.write_text(updated(README.read_text("utf-8")), "utf-8")
        elif arguments == ["--docs"]:
            page.write()
        else:
            name, overrides, corrections = _parse(arguments)
            shown = f"{table()}\n\n{corrections_table()}" if name is None else describe(name, overrides, corrections)
            print(shown, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as in `| head`
        sys.stdout = None
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
