"""Writes the examples as notebooks: `python examples/render.py [--run] [NAME ...]`.

An example is a Python script in the percent format: `# %%` begins a cell of code, `# %% [markdown]` one of text. Each
becomes NAME.ipynb (nbformat 4.5) with what the cells print and the figures that they draw. A script whose code has not
changed since keeps this output, unless `--run` asks for a new one.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
NAMES = [
    "one_estimator",
    "own_mask",
    "why_hpt_switched",
    "three_trainers",
    "judge_a_loss",
    "distill_a_teacher",
]


class Cell(NamedTuple):
    """A cell: 'code' or 'markdown', and its text without a trailing newline."""

    kind: str
    source: str


def cells(script: str) -> list[Cell]:
    """The cells of a script in the percent format."""
    found = []
    for mark, text in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", script, re.MULTILINE):
        if "[markdown]" in mark:
            found.append(Cell("markdown", re.sub(r"^# ?", "", text.strip("\n"), flags=re.MULTILINE)))
        else:
            found.append(Cell("code", text.strip("\n")))
    return found


def outputs(source: str, namespace: dict) -> list[dict]:
    """Run a cell of code; return what it printed and the figures that it drew, as outputs of a notebook."""
    import matplotlib.pyplot as plt

    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(source, "cell", "exec"), namespace)
    results = []
    if printed.getvalue():
        results.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        results.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return results


def run(script: str) -> list[list[dict]]:
    """The outputs of each cell of code of a script."""
    namespace = {"__name__": "__main__"}
    return [outputs(cell.source, namespace) for cell in cells(script) if cell.kind == "code"]


def notebook(script: str, outputs: list[list[dict]]) -> dict:
    """The notebook of a script with the outputs of its cells of code."""
    rows, remaining = [], iter(outputs)
    for number, cell in enumerate(cells(script)):
        row = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}, "source": cell.source.splitlines(True)}
        if cell.kind == "code":
            row |= {"execution_count": None, "outputs": next(remaining)}
        rows.append(row)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": rows, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def stored_outputs(path: Path, script: str) -> list[list[dict]] | None:
    """The outputs in a notebook; None if there is no notebook, or if it is of other code."""
    if not path.exists():
        return None
    stored = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    code = [cell.source for cell in cells(script) if cell.kind == "code"]
    return [cell["outputs"] for cell in stored] if ["".join(cell["source"]) for cell in stored] == code else None


def main(arguments: list[str]) -> int:
    """Render the examples with these names, or all of them."""
    names = [argument for argument in arguments if argument != "--run"]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no example {unknown[0]!r}; the examples are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    os.environ["MPLBACKEND"] = "agg"
    for name in names or NAMES:
        script, path = (FOLDER / f"{name}.py").read_text("utf-8"), FOLDER / f"{name}.ipynb"
        kept = None if "--run" in arguments else stored_outputs(path, script)
        page = notebook(script, run(script) if kept is None else kept)
        path.write_text(json.dumps(page, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(f"wrote {path}" + ("" if kept is None else ", with the output that it had"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
