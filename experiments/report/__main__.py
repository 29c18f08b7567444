"""Write report.html into the folders of runs: `python -m experiments.report runs/my-run [runs/other ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments import cli
from experiments.report.page import write_report
from upge.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a report for each folder; returns the exit code, 2 if one of them is not the folder of a run."""
    return cli.run_command(_report, arguments)


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Write report.html into the folders of runs."
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the folder of a run, finished or not")
    code = cli.DONE
    for folder in parser.parse_args(arguments).folders:
        try:
            print(write_report(folder))
        except UserError as error:
            cli.print_error(error)
            code = cli.BAD_INPUT
    return code


if __name__ == "__main__":
    sys.exit(main())
