"""The value of a key that did best: of one sweep's own grid, or taken over from another sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.sweeping.collect import finite
from experiments.sweeping.settings import Planned, Sweep
from upge.errors import ConfigError


def best_values(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Group → the value of `select.key` with the highest mean of `select.measure` over the seeds.

    A group is what the runs have besides that key: variant and the grid's other values. Of equal means the first value
    of the list wins, so put the more careful one first.

    Args:
        rows: of runs.csv, see `collect.rows`.

    Raises:
        ConfigError: the measure is no column of numbers, or a run has none.
    """
    name, measure = sweep.config.select["key"], sweep.config.select["measure"]
    found: dict[str, dict[Any, list[float]]] = {}
    by_slug = {row["run"]: row for row in rows}
    for run in sweep.runs:
        value = by_slug.get(run.slug, {}).get(measure)
        if not finite(value):
            columns = sorted({column for row in rows for column, value in row.items() if finite(value)})
            raise ConfigError(f"select.measure: {run.slug} has no '{measure}'; there are {', '.join(columns)}")
        found.setdefault(group_of(run, name), {}).setdefault(run.point[name], []).append(float(value))
    # Summed exactly: equal means must be equal for the first of them to win.
    means = {group: {v: math.fsum(all) / len(all) for v, all in values.items()} for group, values in found.items()}
    return {group: max(values, key=values.__getitem__) for group, values in means.items()}


def group_of(run: Planned, name: str) -> str:
    """What a run is apart from the value of `name`: its variant, or its algorithm where there are no variants."""
    others = [str(value) for key, value in run.point.items() if key != name]
    return ", ".join(filter(None, [run.variant, *others]))


def with_choices(sweep: Sweep, values: Mapping[str, Any]) -> Sweep:
    """The sweep with the chosen value in every run; which is its own is said by `choose.group`, else by its
    variant or algorithm.

    Raises:
        ConfigError: a run for which nothing was chosen.
    """
    name = sweep.config.choose["key"]
    runs = []
    for run in sweep.runs:
        group = sweep.config.choose.get("group")
        candidates = [str(group)] if group else [run.variant, str(run.keys.get("algo", ""))]
        own = next((candidate for candidate in candidates if candidate in values), None)
        if name in run.keys:
            runs.append(run)
        elif own is None:
            raise ConfigError(
                f"choose: sweep={sweep.config.choose['sweep']} has chosen {name} for {', '.join(values)}, none of "
                f"which is the variant or the algorithm of '{run.label}'; give it {name} itself, or choose.group"
            )
        else:
            runs.append(replace(run, keys={**run.keys, name: values[own]}))
    return replace(sweep, runs=tuple(runs))
