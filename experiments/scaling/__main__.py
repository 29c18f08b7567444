"""Memory, time and traffic of a step from 0.5B to 72B parameters: `python -m experiments.scaling` prints the tables.

`--docs` updates docs/scaling.md. No model is loaded; this takes a few seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli, files
from experiments.run.workload import GIB
from experiments.scaling.counts import (
    GPUS,
    MICRO_BATCHES,
    SIZES,
    Point,
    colocated_seconds,
    divided,
    link,
    separate,
    traffic_bytes,
    update_seconds,
)


def table(columns: str, rows: list[list[object]]) -> str:
    """A Markdown table; `columns` are their heads, separated by semicolons."""
    heads = columns.split("; ")
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points() -> list[Point]:
    """Every model on every number of GPUs."""
    return [Point(size, gpus) for size in SIZES for gpus in GPUS]


def memory_table() -> str:
    """GiB of a rank in each part of a step."""
    rows: list[list[object]] = []
    for point in points():
        tokens = point.micro_batch or MICRO_BATCHES[-1]
        memory = point.memory(tokens)
        always = sum(item.bytes for item in memory.states if item.when == "always") / GIB
        update, step, refresh = (memory.total(moment) / GIB for moment in ("training", "step", "refresh"))
        numbers = [f"{always:.1f}", f"{update:.1f} ({tokens:,})", f"{step:.1f}", f"{refresh:.1f}"]
        rows.append([point.size, point.gpus, *numbers, f"{max(point.sequences, 0):,}", verdict(point)])
    return table(
        "model; GPUs; states; update (micro-batch); AdamW's step; refresh; vLLM's cache, sequences; fits", rows
    )


def verdict(point: Point) -> str:
    """Whether a step fits, and what does not."""
    if point.micro_batch is None:
        return "no: training"
    if not point.is_colocated:
        return f"training alone: vLLM's replica takes {point.shape.weights / GIB:.0f} GiB"
    return "yes"


def time_table() -> str:
    """Seconds of a step and GB between ranks, where it fits."""
    rows: list[list[object]] = []
    for point in (point for point in points() if point.micro_batch is not None):
        moved, update = traffic_bytes(point)[0], update_seconds(point.shape, point.gpus)
        sampled = refresh = step = "–"
        if point.is_colocated:
            sampling, updates, refreshing = colocated_seconds(point)
            sampled, refresh, step = f"{sampling:.0f}", f"{refreshing:.1f}", f"{sampling + updates + refreshing:.0f}"
        traffic = [f"{moved / 1e9:,.0f}", f"{moved / link(point.gpus):.0f}"]
        rows.append([point.size, point.gpus, sampled, f"{update:.0f}", refresh, step, *traffic])
    return table("model; GPUs; sampling, s; updates, s; refresh, s; step, s; traffic, GB; traffic alone, s", rows)


def divided_table() -> str:
    """Engines over several GPUs against a replica on each."""
    rows: list[list[object]] = []
    for point in (point for point in points() if point.gpus > 1):
        best = divided(point.size, point.gpus)
        if best is not None:
            replicas = f"{sum(colocated_seconds(point)):.0f}" if point.is_colocated else "does not fit"
            refresh = best.memory(best.micro_batch or MICRO_BATCHES[-1]).total("refresh") / GIB
            seconds = colocated_seconds(best)
            times = [f"{seconds[0]:.0f}", f"{sum(seconds):.0f}"]
            rows.append([point.size, point.gpus, replicas, best.split, f"{refresh:.1f}", f"{best.sequences:,}", *times])
    columns = "GPUs per engine; refresh, GiB; an engine's cache, sequences; sampling, s; step, s"
    return table(f"model; GPUs; step with replicas, s; {columns}", rows)


def separate_table() -> str:
    """Colocated against separate GPUs."""
    rows: list[list[object]] = []
    for point in (point for point in points() if point.gpus > 1):
        best = separate(point.size, point.gpus)
        if best is not None:
            together = f"{sum(colocated_seconds(point)):.0f}" if point.is_colocated else "does not fit"
            split = [f"{best.samplers // best.split} × {best.split}", best.trainers]
            seconds = [f"{best.sampling:.0f}", f"{best.updates:.0f}", f"{best.transfer:.1f}", f"{best.step:.0f}"]
            rows.append([point.size, point.gpus, together, *split, *seconds])
    columns = "engines × GPUs; trainers; sampling, s; updates, s; transfer, s; step, s"
    return table(f"model; GPUs; colocated step, s; {columns}", rows)


TABLES = files.Tables(
    files.DOCS / "scaling.md",
    "##",
    {
        "Memory": memory_table,
        "Time and traffic": time_table,
        "Engines over several GPUs": divided_table,
        "Separate samplers": separate_table,
    },
    "<!-- scaling: begin (python -m experiments.scaling --docs) -->",
    "<!-- scaling: end -->",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or update the docs; return the exit code, 2 on bad input."""
    return cli.run_command(TABLES.command, arguments, lambda everything: str(__doc__))


if __name__ == "__main__":
    sys.exit(main())
