"""Run by tests.forked: a run that meets a limit of the machine.

usage: python -m tests.faults.limited KIND=NUMBER ... -- ARGUMENTS OF experiments.run

fsize=N: files of at most N bytes, as with `ulimit -f`. free=N: the disk of the checkpoints has N free bytes.
"""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from experiments.run.__main__ import main


def limit(kind: str, number: int) -> None:
    if kind == "fsize":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        return
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: SimpleNamespace(free=number) if Path(path).name == "checkpoints" else real(path)


if __name__ == "__main__":
    place = sys.argv.index("--")
    for text in sys.argv[1:place]:
        kind, _, number = text.partition("=")
        limit(kind, int(number))
    arguments = sys.argv[place + 1 :]
    sys.argv[1:] = arguments
    sys.exit(main())
