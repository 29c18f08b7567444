"""Judges one version of one framework in a process of its own: `python -m experiments.referee.worker NAME FOLDER ...`.

The folders hold unpacked wheels; none takes the installed version. The last line that it prints is the result in JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

#: What the line of the result begins with; frameworks print lines of their own.
MARK = "REFEREE "


@dataclass(frozen=True)
class Row:
    """The result of a case.

    Attributes:
        case: the framework's name of the loss.
        algorithm: this project's.
        called: the function that was called.
        layouts: layout → verdict, as dictionaries.
        error: why there is none.
    """

    case: str
    algorithm: str
    called: str
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    error: str = ""


def judge(update: Any, case: Any, called: str) -> Row:
    """The verdicts of an update in all layouts of a case."""
    from experiments.referee.factors import compare
    from experiments.referee.protocol import make_batch, weights

    algorithm = case.load()
    verdicts = {}
    for layout in case.layouts:
        batch = make_batch(algorithm, layout.padding)
        verdicts[str(layout)] = asdict(compare(weights(update, batch, layout), algorithm, batch, layout))
    text = " ".join([case.algorithm, *case.overrides])
    return Row(case.name, text, called, verdicts)


def judge_all(framework: ModuleType) -> list[Row]:
    """The rows of a framework whose package can be imported. A case that fails becomes a row with its error."""
    from experiments.referee.protocol import MissingLossError

    rows = []
    for case in framework.cases():
        try:
            rows.append(judge(framework.update(case), case, framework.called(case)))
        except MissingLossError as error:
            rows.append(Row(case.name, case.algorithm, framework.called(case), error=str(error)))
        except Exception as error:  # a version may differ in what the adapter expects
            last = traceback.format_exception(error)[-1].strip().splitlines()[0]
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
            rows.append(Row(case.name, case.algorithm, framework.called(case), error=f"{last} ({place})"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows as JSON."""
    name, *folders = sys.argv[1:] if arguments is None else arguments
    import torch

    torch.set_num_threads(1)
    framework = importlib.import_module(f"experiments.referee.frameworks.{name}")
    replaced: list[str] = []
    if folders:
        from experiments.referee.stubs import install

        sys.path[:0] = folders
        replaced = install(framework.PACKAGES)
    rows = [asdict(row) for row in judge_all(framework)]
    print(MARK + json.dumps({"rows": rows, "stubs": sorted({*replaced})}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
