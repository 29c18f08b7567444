"""The tables of results: one per version, the known faults, and DeepSpeed's updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.referee.factors import TOLERANCE
from experiments.referee.run import Result

#: A table: its header and its rows.
Table = tuple[list[str], list[list[str]]]


def cell(verdict: Mapping[str, Any] | None) -> str:
    """Cosine and scale: '=' for equal gradients, '×0.5' for parallel ones, else 'cos 0.99, ×1.1'."""
    if verdict is None:
        return ""
    cosine, scale = verdict["cosine"], verdict["scale"]
    if math.isnan(cosine):
        return "not finite"
    if cosine > 1 - TOLERANCE:
        return "=" if abs(scale - 1) < 1e-6 else f"×{scale:.4g}"
    return f"cos {cosine:.4f}, ×{scale:.4g}"


def version_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per loss: its cells by layout, then what differs."""
    layouts = list(dict.fromkeys(name for row in rows for name in row["layouts"]))
    lines = []
    for row in rows:
        if row["error"]:
            continue
        cells = [cell(row["layouts"].get(name)) for name in layouts]
        lines.append([row["case"], row["algorithm"], *cells, differences(row["layouts"])])
    return ["loss", "this project's", *layouts, "what differs"], lines


def differences(layouts: Mapping[str, Mapping[str, Any]]) -> str:
    """Each factor that differs, with the layouts in which it does."""
    where: dict[str, list[str]] = {}
    for name, verdict in layouts.items():
        if verdict["factor"]:
            where.setdefault(verdict["factor"], []).append(name)
    if not where:
        return "nothing"
    everywhere = len(layouts)
    return "; ".join(f if len(names) == everywhere else f"{f} ({', '.join(names)})" for f, names in where.items())


def refusals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a version does not have, or what failed, one text per loss."""
    return [f"{row['case']}: {row['error']}" for row in rows if row["error"]]


def offload_table(found: Sequence[Result]) -> Table:
    """A row per run: the shares of the micro-batches' gradients, a column per version."""
    found = [result for result in found if result.data]
    names = list(dict.fromkeys(name for result in found for name in result.data["runs"]))

    def shares(run: Mapping[str, Any] | None) -> str:
        if run is None or "error" in run:
            return (run or {}).get("error", "")
        return ", ".join(f"{share:g}" for share in run["shares"])

    rows = [[name, *(shares(result.data["runs"].get(name)) for result in found)] for name in names]
    return ["updates", *(result.version for result in found)], rows


@dataclass(frozen=True)
class Claim:
    """A fault that was reported, or that these tables show, and where it is looked for.

    Attributes:
        title: where it was reported.
        said: what was said.
        framework: name of the adapter.
        case: the loss.
        layouts: in which it should show.
    """

    title: str
    said: str
    framework: str
    case: str
    layouts: tuple[str, ...]


_SAMPLED = ("2 micro-batches, sampled for 4", "8 micro-batches, sampled for 2")
CLAIMS = (
    Claim("TRL #6024", "×0.5 and ×4 where steps_per_generation is not the number of micro-batches", "trl", "dapo",
          _SAMPLED),
    Claim("TRL #5619", "not divided by the number of micro-batches", "trl", "dapo",
          ("2 micro-batches", "4 micro-batches")),
    Claim("ms-swift #10117", "divided by the number of micro-batches once more", "ms_swift", "dapo",
          ("2 micro-batches", "4 micro-batches")),
    Claim("OpenRLHF, arXiv 2604.23747", "the mean of micro-batches' means in SFT", "openrlhf", "sft",
          ("2 micro-batches", "4 micro-batches", "2 ranks")),
    Claim("ms-swift, found here", "as TRL #6024", "ms_swift", "dapo", _SAMPLED),
    Claim("verl, found here", "geo_mean is not divided by the number of micro-batches", "verl", "geo_mean",
          ("2 micro-batches", "4 micro-batches")),
    Claim("verl, found here", "seq-mean-token-sum-norm depends on the padding", "verl",
          "vanilla, seq-mean-token-sum-norm", ("whole", "5 columns of padding")),
    Claim("verl, found here", "token-mean is a mean of micro-batches' means", "verl", "vanilla, token-mean",
          ("4 micro-batches", "2 ranks")),
)  # fmt: skip


def claims_table(found: Sequence[Result]) -> Table:
    """A row per claim and version that was judged: what was measured."""
    rows = []
    for claim in CLAIMS:
        for result in found:
            if result.framework != claim.framework or "rows" not in result.data:
                continue
            row = next((r for r in result.data["rows"] if r["case"] == claim.case and not r["error"]), None)
            if row is not None:
                measured = "; ".join(f"{name}: {cell(row['layouts'].get(name))}" for name in claim.layouts)
                rows.append([claim.title, claim.said, claim.case, result.version, measured])
    return ["reported as", "said", "loss", "version", "measured"], rows
