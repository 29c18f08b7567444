"""Derive Table 1 of arXiv 2509.04419: `python -m experiments.table1` prints it, `--latex` as LaTeX.

`--docs` updates docs/table1.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli
from experiments.table1.page import PAGE, STATEMENTS, notes, proven, table, table1_latex, updated
from upge.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or updates the page; returns the exit code, 2 on bad input, 1 if a proof fails."""
    return cli.run_command(_table1, arguments, lambda: str(__doc__))


def _table1(arguments: list[str]) -> int:
    if arguments == ["--docs"]:
        PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")
        return 0 if all(proven(claim).holds for claim in STATEMENTS) else 1
    if arguments not in ([], ["--latex"]):
        raise ConfigError(f"'{arguments[0]}': give --docs, --latex, or nothing at all")
    print(table1_latex() if arguments else f"{table()}\n\n{notes()}")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
