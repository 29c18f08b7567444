"""The files of a diagnosis: all numbers as JSON, the tables in Markdown, the figures, and an HTML page with both."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.diagnose import figures, lines
from experiments.diagnose.measuring import Result
from experiments.diagnose.policies import folder_name
from experiments.diagnose.tables import grids
from experiments.drawing import inline
from experiments.grid import Grid, markdown, markdown_text
from upge.errors import DataError

FIGURES = {
    "bias_variance": "Further left means less bias, further down less noise. Along a dashed line, a step of a given "
    "length improves E[R] equally.",
    "signal_by_pass_rate": "Left and middle: the contribution of one prompt. Where the demonstrations' line is above "
    "the rollouts', a demonstration is better aligned with ∇E[R] than the group. Right: the effect of the threshold.",
    "conflict": "Below 0 the gradients of the two sources counteract each other.",
    "cosines": "Cosines of the mean gradients, corrected for noise.",
    "over_training": "The same measurement for each policy.",
}


def files(results: Sequence[Result], facts: Mapping[str, Any], notes: Sequence[str], folder: Path) -> list[Path]:
    """Writes all files into `folder`, with a subfolder per policy if there are several; returns their paths.

    Raises:
        DataError: the files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn: list[Path] = []
        for result in results:
            own = folder if len(results) == 1 else folder / folder_name(result.label)
            own.mkdir(exist_ok=True)
            for draw in (figures.bias_variance, lines.signal, lines.conflict, figures.cosines):
                drawn += draw(result, own)
        drawn += lines.over_training(results, folder)
        whole = {**facts, "notes": list(notes), "policies": [plain(result) for result in results]}
        (folder / "diagnosis.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "table.md").write_text(page(results, notes), "utf-8")
        (folder / "diagnosis.html").write_text(report(results, facts, notes, drawn, folder), "utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another output=") from error
    return [folder / "diagnosis.html", folder / "table.md", folder / "diagnosis.json", *drawn]


def plain(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null, pairs of names become 'first, second'."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {", ".join(k) if isinstance(k, tuple) else str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(results: Sequence[Result], notes: Sequence[str]) -> str:
    """The text of table.md."""
    parts = ["# Bias and variance"]
    if notes:
        parts.append("\n".join(f"> {markdown_text(note)}  " for note in notes))
    for result in results:
        parts += [f"## {markdown_text(result.label)}", markdown_text(summary(result))]
        for grid in grids(result):
            parts += [f"### {markdown_text(grid.title)}", markdown(grid)]
    return "\n\n".join(parts) + "\n"


def summary(result: Result) -> str:
    """A sentence about the sample."""
    facts = result.facts
    if not result.bins:
        return f"Seven responses, groups of {facts['group_size']:.0f}; exact sums over all batches, nothing sampled."
    error = "whole gradients" if not facts["sketch"] else (
        f"gradients in sketches of {facts['sketch']:.0f} numbers (relative error of a squared length "
        f"{100 * facts['sketch_error']:.1f} %)"
    )  # fmt: skip
    return (
        f"{facts['prompts']:.0f} prompts with a pass rate of {100 * facts['pass_rate']:.0f} % on average, "
        f"{facts['batches']:.0f} batches of {facts['prompts_per_batch']:.0f} prompts × {facts['group_size']:.0f} "
        f"rollouts in {facts['rounds']:.0f} rounds; {facts['gradients']:.0f} gradients of "
        f"{facts['parameters']:,.0f} parameters, "
        f"{error}; {facts['seconds']:.0f} s, {facts['memory_gib']:.1f} GiB."
    )


def report(
    results: Sequence[Result], facts: Mapping[str, Any], notes: Sequence[str], drawn: Sequence[Path], folder: Path
) -> str:
    """The text of diagnosis.html, with the figures inside."""
    parts = [f"<p class=command>{html.escape(str(facts.get('command', '')))}</p>"]
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in notes]
    top = [path for path in drawn if path.parent == folder and path.suffix == ".svg"]
    parts += [_figure(path) for path in top if path.stem == "over_training"]
    for result in results:
        own = folder if len(results) == 1 else folder / folder_name(result.label)
        parts.append(f"<h2>{html.escape(result.label)}</h2><p>{html.escape(summary(result))}</p>")
        parts += [_figure(p) for p in drawn if p.parent == own and p.suffix == ".svg" and p.stem != "over_training"]
        parts += [_table(grid) for grid in grids(result)]
    return _PAGE.replace("{body}", "\n".join(parts))


def _figure(path: Path) -> str:
    unique = re.sub(r"\W", "_", path.parent.name + path.stem)
    drawing = inline(path, unique)
    return f"<figure>{drawing}<figcaption>{html.escape(FIGURES[path.stem])}</figcaption></figure>"


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in grid.header)
    rows = []
    for row in grid.rows:
        cells = "".join(
            f"<td>{f'<b>{html.escape(cell)}</b>' if i in row.bold else html.escape(cell)}</td>"
            for i, cell in enumerate(row.cells)
        )
        rows.append(f"<tr>{cells}</tr>")
    return f"<h3>{html.escape(grid.title)}</h3><div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Bias and variance</title>
<style>
body {font: 15px/1.5 system-ui, sans-serif; color: #1d2126; max-width: 70rem; margin: 2rem auto; padding: 0 1rem}
figure {margin: 1.5rem 0} figure svg {max-width: 100%; height: auto} figcaption, .note {color: #565d66}
.wide {overflow-x: auto} table {border-collapse: collapse; font-size: 12.5px; white-space: nowrap}
th, td {text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #dcdeda} .command {font-family: monospace}
</style>
<h1>Bias and variance</h1>
{body}
</html>
"""
