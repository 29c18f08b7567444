"""Recorded and found values: renames, equality up to a tolerance, and the report, for tests/goldens.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

#: Relative tolerance, and the absolute one as a share of 1, of numbers that a computation gives.
TOLERANCE = {"objects": (1e-9, 1e-12), "runs": (1e-5, 1e-6)}
ABSENT = "@absent"
#: (case, path, recorded, found).
Difference = tuple[str, str, Any, Any]


class Renames:
    """renames.json: what was recorded in the words of today."""

    def __init__(self, table: dict[str, dict[str, str]]) -> None:
        self.table = table

    def sub(self, section: str, text: str) -> str:
        """`text` with a section's regular expressions replaced."""
        for pattern, replacement in self.table.get(section, {}).items():
            text = re.sub(pattern, replacement, text)
        return text

    def leaf(self, value: Any) -> Any:
        """A leaf of an object: a class by its name, other strings by `values`."""
        if isinstance(value, list):
            return sorted(map(self.leaf, value)) if value == sorted(value) else [*map(self.leaf, value)]
        if not isinstance(value, str):
            return value
        if value.startswith("@"):
            return f"@{self.table.get('classes', {}).get(value[1:], value[1:])}"
        return self.sub("values", value)

    def flat(self, flat: dict[str, Any]) -> dict[str, Any]:
        """An object with its fields and leaves renamed."""
        return {self._path(path, flat): self.leaf(leaf) for path, leaf in flat.items() if path != "message"} | (
            {"message": self.sub("messages", flat["message"])} if "message" in flat else {}
        )

    def _path(self, path: str, flat: dict[str, Any]) -> str:
        names, above, fields = [], "", self.table.get("fields", {})
        for segment in path.split("."):
            name, bracket, rest = segment.partition("[")
            owner = str(flat.get(above, ""))[1:]
            names.append(fields.get(f"{owner}.{name}", fields.get(name, name)) + bracket + rest)
            above = f"{above}.{segment}" if above else segment
        return ".".join(names)


def same(recorded: Any, results: Any, tolerance: tuple[float, float] | None) -> bool:
    """Equal; floats up to a relative and an absolute tolerance, if one is given. NaN equals NaN."""
    if isinstance(recorded, list) and isinstance(results, list):
        return len(recorded) == len(results) and all(
            same(a, b, tolerance) for a, b in zip(recorded, results, strict=True)
        )
    if isinstance(recorded, bool) or isinstance(results, bool) or isinstance(recorded, str) or isinstance(results, str):
        return type(recorded) is type(results) and recorded == results
    if tolerance is None or not isinstance(recorded, float) and not isinstance(results, float):
        return type(recorded) is type(results) and (recorded == results or recorded != recorded and results != results)
    if recorded is None or results is None:
        return False
    relative, absolute = tolerance
    return (
        recorded == results
        or abs(recorded - results) <= max(relative * abs(recorded), absolute)
        or (recorded != recorded and results != results)
    )


def compare(case: str, recorded: dict[str, Any], results: dict[str, Any], tolerance: Any) -> Iterator[Difference]:
    """(case, path, recorded, found) of everything that differs."""
    for path in dict.fromkeys((*recorded, *results)):
        a, b = recorded.get(path, ABSENT), results.get(path, ABSENT)
        computed = path.startswith("estimate") or tolerance == TOLERANCE["runs"]
        if not same(a, b, tolerance if computed else None):
            yield case, path, a, b


def is_prose(path: str) -> bool:
    """True of what people read: it may be reworded."""
    return path == "message" or path.rpartition(".")[2] == "description"


def report(differences: list[Difference], most: int = 40) -> str:
    """A line for each difference; equal ones of several cases together."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for case, path, recorded, results in differences:
        key = (path, *(json.dumps(value, ensure_ascii=False)[:160] for value in (recorded, results)))
        cases.setdefault(key, []).append(case)
    lines = [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {path}: recorded {a}, found {b}"
        for (path, a, b), names in cases.items()
    ]
    return "\n".join([*lines[:most], *([f"... and {len(lines) - most} lines more (--all)"] if lines[most:] else [])])
