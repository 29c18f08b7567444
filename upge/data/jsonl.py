"""Reads JSON-lines files whose rows have text columns; whatever is wrong is said with file and line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upge.errors import DataError, nearest


@dataclass(frozen=True)
class Row:
    """One row: its text columns, optional ones only where it has them, and its place as `file:line` (lines count from
    1)."""

    columns: dict[str, str]
    line: int
    where: str


def read_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The rows of `path` with the named `columns`; blank lines are passed over, other columns ignored.

    A row may also have the columns `optional`, null being as good as none.

    Raises:
        DataError: the file is missing, unreadable or without rows, a line is not a JSON object, or a row lacks a column
            or has something other than text in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; check data.path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read as UTF-8 text: {error}") from error
    # Not str.splitlines: JSON strings may hold U+2028 and its kind, which end no line of a file.
    numbered = enumerate(text.split("\n"), start=1)
    rows = [_parse(line, number, path, columns, optional) for number, line in numbered if line.strip()]
    if not rows:
        raise DataError(f"data file {path} is empty; expected one JSON object a line with {_list(columns)}")
    return rows


def _parse(text: str, line: int, path: Path, columns: Sequence[str], optional: Sequence[str]) -> Row:
    where = f"{path}:{line}"
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); expected one object a line with {_list(columns)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found a JSON {type(row).__name__}, expected an object with {_list(columns)}")
    for column in columns:
        if column not in row:
            found = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where}: no column '{column}'; columns found: {found}; {nearest(column, row)}")
    present = [*columns, *(column for column in optional if row.get(column) is not None)]
    for column in present:
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{where}: column '{column}' holds {row[column]!r}; expected text")
        if any("\ud800" <= letter <= "\udfff" for letter in row[column]):
            raise DataError(f"{where}: column '{column}' holds half a surrogate pair, which is no character")
    return Row({column: row[column] for column in present}, line, where)


def _list(columns: Sequence[str]) -> str:
    return "the columns " + " and ".join(f"'{c}'" for c in columns)
