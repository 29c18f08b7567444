"""The tables of a diagnosis."""

from __future__ import annotations

import math

from experiments.diagnose.measuring import Result
from experiments.grid import Grid, Row
from upge.measure import Estimated, Measured

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
    title = "Bias and variance of one batch's gradient against ∇E[R], with 95 % intervals"
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
            figures = (one.overall.cosine, one.overall.snr, one.overall.alignment, one.imitation)
            rows.append(Row((one.name, one.source, *(ranged(figure) for figure in figures)), rule=rule))
    header = ("part", "learns from", "cosine", "snr", "alignment", "imitation")
    return Grid("parts", "The parts of algorithms with several parts", header, tuple(rows), 2) if rows else None


def rate_grid(result: Result, figure: str, title: str) -> Grid | None:
    """A measure of one prompt's contribution by the prompt's pass rate, with a row per different estimator."""
    if not result.bins:
        return None
    rows = []
    for one in different(result):
        at = {in_bin.bin: in_bin for in_bin in one.by_rate}
        cells = [_of(at.get(rate_bin.label), figure) for rate_bin in result.bins]
        rows.append(Row((one.name, one.source, *cells)))
    header = [f"{one.label} ({len(one.prompts)})" for one in result.bins]
    return Grid(f"rate-{figure}", title, ("estimator", "learns from", *header), tuple(rows), 2)


def count_grid(result: Result) -> Grid | None:
    """The alignment of one prompt's contribution by the number of successes in its group."""
    counts = sorted({at.successes for one in result.measured for at in one.by_count})
    if not counts:
        return None
    rows = []
    for one in different(result):
        at = {in_count.successes: in_count for in_count in one.by_count}
        cells = [ranged(at[c].pooled.alignment) if c in at else MISSING for c in counts]
        rows.append(Row((one.name, one.source, *cells)))
    size = int(result.facts["group_size"])
    title = "Alignment of one prompt's gradient with ∇E[R] of the pool, by successes in its group"
    return Grid("counts", title, ("estimator", "learns from", *(f"{c}/{size}" for c in counts)), tuple(rows), 2)


def threshold_grid(result: Result) -> Grid | None:
    """A row per threshold of each algorithm that has one; the best alignment is bold."""
    rows: list[Row] = []
    for name, points in result.thresholds.items():
        best = max(range(len(points)), key=lambda i: _sortable(points[i].overall.alignment.value))
        for place, one in enumerate(points):
            figures = (one.overall.alignment, one.overall.cosine, one.overall.snr)
            cells = (name, f"{one.threshold:.3g}", *(ranged(figure) for figure in figures))
            rows.append(Row(cells, frozenset({1, 2}) if place == best else frozenset(), bool(rows) and place == 0))
    title = "Effect of the threshold: demonstrations up to this pass rate of a group, rollouts above"
    header = ("algorithm", "threshold", "alignment", "cosine", "snr")
    return Grid("thresholds", title, header, tuple(rows), 2) if rows else None


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
    candidates = [
        bias_variance_grid(result),
        same_grid(result),
        part_grid(result),
        rate_grid(result, "snr", "Signal to noise of one prompt's gradient, by the prompt's pass rate (prompts)"),
        rate_grid(result, "own", "Cosine of the mean with ∇E[R] of the same prompts, by pass rate (prompts)"),
        count_grid(result),
        threshold_grid(result),
        conflict_grid(result),
    ]
    return [grid for grid in candidates if grid is not None]


def same_as(result: Result, name: str) -> tuple[str, ...]:
    """The estimators that are equal to this one up to scale, including itself."""
    return next((group for group in result.same if name in group), (name,))


def different(result: Result) -> list[Measured]:
    """Algorithms with one part and the parts of the others; of equal ones only the first."""
    several = {one.algorithm for one in result.measured if one.part}
    candidates = [one for one in result.measured if one.part or one.name not in several]
    # A whole algorithm comes before equal parts of others.
    candidates.sort(key=lambda one: bool(one.part))
    seen: set[str] = set()
    estimators = []
    for one in candidates:
        if one.name not in seen:
            estimators.append(one)
            seen.update(same_as(result, one.name))
    return estimators


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


def _of(at, figure: str) -> str:
    if at is None:
        return MISSING
    return ranged(getattr(at, figure))


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value
