"""Write report.html into the folders of runs, and for several runs a page with their curves in the same charts.

python -m experiments.report runs/my-run [runs/other ...] [--overlay FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.report.overlay import write_overlay
from experiments.report.page import write_report
from upge.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report for each folder; return the exit code, 2 if one of them is not the folder of a run."""
    return cli.run_command(_report, arguments)


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Write report.html into the folders of runs. For several "
        "runs, also write a page with their curves in the same charts, their evaluations and the settings that differ.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the folder of a run, finished or not")
    parser.add_argument(
        "--overlay", metavar="FILE", type=Path, help="the page of several runs; default: overlay.html in the deepest "
        "folder that holds all of them"
    )  # fmt: skip
    given = parser.parse_args(arguments)
    code, readable = cli.DONE, []
    for folder in given.folders:
        try:
            print(write_report(folder))
            readable.append(folder)
        except UserError as error:
            cli.print_error(error)
            code = cli.BAD_INPUT
    if len({Path(folder).resolve() for folder in readable}) > 1:
        print(write_overlay(readable, given.overlay))
    return code


if __name__ == "__main__":
    sys.exit(main())
