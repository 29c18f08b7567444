"""The files of a diagnosis: its tables, all numbers as JSON, and an HTML page with tables and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from experiments.diagnose import figures, lines
from experiments.diagnose.conclusion import best_of, conclusion
from experiments.diagnose.measuring import Result
from experiments.diagnose.sampling import folder_name
from experiments.drawing import inline, render
from experiments.grid import Grid, Row, markdown, markdown_text, ruled
from upge.errors import DataError
from upge.measure import Estimated

MISSING = "–"


def bias_variance_grid(result: Result) -> Grid:
    """A row per algorithm: cosine, bias, noise, signal to noise, alignment and imitation."""
    wholes = [one for one in result.measured if not one.part]
    held_out = any(one.held_out is not None for one in wholes)
    rows = []
    for one in wholes:
        overall = one.overall
        cells = [one.name, ranged(overall.cosine), ranged(overall.bias), ranged(overall.noise), ranged(overall.snr, 3)]
        cells += [ranged(overall.alignment), ranged(one.imitation)] + [ranged(one.held_out)] * held_out
        rows.append(Row(tuple(cells)))
    header = ["algorithm", "cosine", "bias", "noise", "snr", "alignment", "imitation"]
    # Exact sums have no intervals, and no bins.
    title = "Bias and variance of one batch's gradient against ∇E[R]"
    if result.bins:
        title += ", with 95 % intervals"
    return Grid("plane", title, (*header, *["held out"] * held_out), tuple(rows))


def same_grid(result: Result) -> Grid | None:
    """The algorithms that are equal up to scale on this sample."""
    wholes = {one.name for one in result.measured if not one.part}
    groups = [[name for name in group if name in wholes] for group in result.same]
    rows = tuple(Row((" = ".join(group),)) for group in groups if len(group) > 1)
    title = "Equal estimators on this sample, up to a factor"
    return Grid("same", title, ("algorithms",), rows) if rows else None


def part_grid(result: Result) -> Grid | None:
    """The results for the parts of algorithms that have several parts."""
    rows = []
    for one in result.measured:
        if one.part:
            rule = bool(rows) and not rows[-1].cells[0].startswith(f"{one.algorithm}.")
            estimates = (one.overall.cosine, one.overall.snr, one.overall.alignment, one.imitation)
            rows.append(Row((one.name, one.source, *(ranged(value) for value in estimates)), rule=rule))
    header = ("part", "learns from", "cosine", "snr", "alignment", "imitation")
    return Grid("parts", "The parts of algorithms with several parts", header, tuple(rows), 2) if rows else None


def rate_grid(result: Result, figure: str, title: str) -> Grid | None:
    """A measure of one prompt's contribution by the prompt's pass rate, with a row per different estimator."""
    if not result.bins:
        return None
    rows = []
    for one in result.different(parts=True):
        at = {in_bin.bin: in_bin for in_bin in one.by_rate}
        cells = [ranged(getattr(at.get(rate_bin.label), figure, None)) for rate_bin in result.bins]
        rows.append(Row((one.name, one.source, *cells)))
    header = [f"{one.label} ({len(one.prompts)})" for one in result.bins]
    return Grid(f"rate-{figure}", title, ("estimator", "learns from", *header), tuple(rows), 2)


def count_grid(result: Result) -> Grid | None:
    """The alignment of one prompt's contribution by the number of successes in its group."""
    counts = sorted({at.successes for one in result.measured for at in one.by_count})
    if not counts:
        return None
    rows = []
    for one in result.different(parts=True):
        at = {in_count.successes: in_count for in_count in one.by_count}
        cells = [ranged(at[c].pooled.alignment) if c in at else MISSING for c in counts]
        rows.append(Row((one.name, one.source, *cells)))
    size = int(result.details["group_size"])
    title = "Alignment of one prompt's gradient with ∇E[R] of the pool, by successes in its group"
    return Grid("counts", title, ("estimator", "learns from", *(f"{c}/{size}" for c in counts)), tuple(rows), 2)


def threshold_grid(result: Result) -> Grid | None:
    """A row per threshold of each algorithm that has one; bold if its interval of alignment is above all others."""
    rows: list[Row] = []
    for name, points in result.thresholds.items():
        best = best_of([one.overall.alignment for one in points])
        for place, one in enumerate(points):
            estimates = (one.overall.alignment, one.overall.cosine, one.overall.snr)
            cells = (name, f"{one.threshold:.3g}", *(ranged(value) for value in estimates))
            rows.append(Row(cells, frozenset({1, 2}) if place == best.place and not best.open else frozenset()))
    title = "Effect of the threshold: demonstrations up to this pass rate of a group, rollouts above"
    header = ("algorithm", "threshold", "alignment", "cosine", "snr")
    return Grid("thresholds", title, header, ruled(rows), 2) if rows else None


def conflict_grid(result: Result) -> Grid | None:
    """The cosine between rollouts' and demonstrations' mean gradients, overall and by pass rate."""
    rows = []
    for one in result.conflicts:
        by_rate = (ranged(one.by_rate.get(rate_bin.label)) for rate_bin in result.bins)
        rows.append(Row((one.algorithm, ranged(one.overall), *by_rate)))
    header = ("algorithm", "overall", *(f"{one.label} ({len(one.prompts)})" for one in result.bins))
    title = "Conflict: cosine of the mean gradients of rollouts and of demonstrations"
    return Grid("conflict", title, header, tuple(rows)) if rows else None


def grids(result: Result) -> list[Grid]:
    """All tables that have rows."""
    candidates = (
        bias_variance_grid(result),
        same_grid(result),
        part_grid(result),
        rate_grid(result, "snr", "Signal to noise of one prompt's gradient, by the prompt's pass rate (prompts)"),
        rate_grid(result, "own", "Cosine of the mean with ∇E[R] of the same prompts, by pass rate (prompts)"),
        count_grid(result),
        threshold_grid(result),
        conflict_grid(result),
    )
    return [grid for grid in candidates if grid is not None]


def ranged(figure: Estimated | None, digits: int = 2) -> str:
    """An estimate as in "0.42 (0.31..0.53)"; without the interval if it has no width."""
    if figure is None or math.isnan(figure.value):
        return MISSING
    value = _number(figure.value, digits)
    if math.isnan(figure.low) or figure.low == figure.high:
        return value
    return f"{value} ({_number(figure.low, digits)}..{_number(figure.high, digits)})"


def _number(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.0f}"


FIGURES = {
    "bias_variance": "Further left means less bias, further down less noise. Along a dashed line, a step of a given "
    "length improves E[R] equally.",
    "signal_by_pass_rate": "Left and middle: the contribution of one prompt. Where the demonstrations' line is above "
    "the rollouts', a demonstration is better aligned with ∇E[R] than the group. Right: the effect of the threshold.",
    "conflict": "Below 0 the gradients of the two sources counteract each other.",
    "cosines": "Cosines of the mean gradients, corrected for noise.",
    "over_training": "The same measurement for each policy.",
}


def files(results: Sequence[Result], metadata: Mapping[str, Any], notes: Sequence[str], folder: Path) -> list[Path]:
    """Write all files into `folder`, with a subfolder per policy if there are several; return their paths.

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
        whole = {**metadata, "notes": list(notes), "policies": [plain(result) for result in results]}
        (folder / "diagnosis.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "table.md").write_text(page(results, notes), "utf-8")
        (folder / "diagnosis.html").write_text(report(results, metadata, notes, drawn, folder), "utf-8")
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
        parts += ["### What can be concluded", markdown_text(conclusion(result))]
    return "\n\n".join(parts) + "\n"


def summary(result: Result) -> str:
    """A sentence about the sample."""
    details = result.details
    if not result.bins:
        return f"Seven responses, groups of {details['group_size']:.0f}; exact sums over all batches, nothing sampled."
    error = "whole gradients" if not details["sketch"] else (
        f"gradients in sketches of {details['sketch']:.0f} numbers (relative error of a squared length "
        f"{100 * details['sketch_error']:.1f} %)"
    )  # fmt: skip
    return (
        f"{details['prompts']:.0f} prompts with a pass rate of {100 * details['pass_rate']:.0f} % on average, "
        f"{details['batches']:.0f} batches of {details['prompts_per_batch']:.0f} prompts × {details['group_size']:.0f} "
        f"rollouts in {details['rounds']:.0f} rounds; {details['gradients']:.0f} gradients of "
        f"{details['parameters']:,.0f} parameters, "
        f"{error}; {details['seconds']:.0f} s, {details['memory_gib']:.1f} GiB."
    )


def report(
    results: Sequence[Result], metadata: Mapping[str, Any], notes: Sequence[str], drawn: Sequence[Path], folder: Path
) -> str:
    """The text of diagnosis.html, with the figures inside."""
    shown: dict[Path, list[tuple[Markup, str]]] = {}
    for path in drawn:
        if path.suffix == ".svg":
            picture = Markup(inline(path, re.sub(r"\W", "_", path.parent.name + path.stem)))
            place = Path() if path.stem == "over_training" else path.parent
            shown.setdefault(place, []).append((picture, FIGURES[path.stem]))
    parts = []
    for result in results:
        own = shown.get(folder if len(results) == 1 else folder / folder_name(result.label), [])
        about = {"label": result.label, "summary": summary(result), "conclusion": conclusion(result)}
        parts.append({**about, "figures": own, "grids": grids(result)})
    page = {"title": "Bias and variance", "command": metadata.get("command", ""), "notes": notes}
    page |= {"figures": shown.get(Path(), []), "parts": parts}
    return render(Path(__file__).with_name("diagnosis.html.j2"), **page)
