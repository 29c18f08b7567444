"""Reads the cells of a table: texts, numbers, chat messages and options of a question.

Every function but `has` and `is_blank` raises a DataError that names the row, if there is no such column or if it holds
anything else than the function reads.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from upge.data.files import Record
from upge.errors import DataError, nearest

_ABSENT = object()

Cell = Any  # a value of a JSON or parquet file, of any type


def has(record: Record, column: str) -> bool:
    """Whether the row has this column with a value other than null. A dotted name refers to a nested value."""
    cell = _find(record.values, column)
    return cell is not _ABSENT and cell is not None


def text(record: Record, column: str) -> str:
    """The text in a column."""
    return _as_text(value(record, column), record, column, "text")


def value(record: Record, column: str) -> Cell:
    """The value in a column, of any type."""
    cell = _find(record.values, column)
    if cell is _ABSENT:
        known = list(_names(record.values))
        raise DataError(
            f"{record.where}: no column '{column}'; columns found: {', '.join(map(repr, known)) or 'none'}; "
            f"{nearest(column, known)}"
        )
    return cell


def prompt(record: Record, column: str) -> tuple[str, str | None]:
    """(prompt, system message) in a column of texts or chat messages; None if there is no system message.

    The messages are one of the user, after at most one of the system.
    """
    cell = value(record, column)
    if not _is_chat(cell):
        return _as_text(cell, record, column, "text or a list of chat messages"), None
    roles = [message["role"] for message in cell]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(map(str, roles))}; expected one of the "
            "user, with or without one of the system before it; write earlier turns into the text of one"
        )
    contents = [_content(message, record, column) for message in cell]
    return contents[-1], contents[0] if len(contents) == 2 else None


def responses(record: Record, column: str) -> tuple[str, ...]:
    """The responses in a column: text, chat messages (the assistant's turn), or a list of either."""
    cell = value(record, column)
    is_single = isinstance(cell, str) or _is_chat(cell)
    return tuple(_response(one, record, column) for one in ([cell] if is_single else _listed(cell, record, column)))


def answer(record: Record, column: str) -> str:
    """The answer in a column: text, a number in its own notation (142.0 stays "142.0"), or a list of one of these."""
    cell = value(record, column)
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, list):
        raise DataError(
            f"{record.where}: column '{column}' holds {len(cell)} answers; expected one; write them into one text, as "
            "the verifier reads them"
        )
    number = _number(cell)
    return number if number is not None else _as_text(cell, record, column, "text or a number")


def is_blank(record: Record, column: str) -> bool:
    """Whether the row has the column with an empty value: null, an empty list, or blank text."""
    cell = _find(record.values, column)
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def level(record: Record, column: str) -> str:
    """The level in a column; a whole number n becomes "Level n", as in MATH."""
    cell = value(record, column)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return f"Level {cell}" if _is_whole(cell) else _as_text(cell, record, column, "text or a whole number")


def label(record: Record, column: str) -> str:
    """A name in a column, such as an id: text or a whole number."""
    cell = value(record, column)
    return str(cell) if _is_whole(cell) else _as_text(cell, record, column, "text or a whole number")


def options(record: Record, column: str, answer_column: str) -> tuple[str, str]:
    """The options of a multiple-choice question as lines "A) ...", and the letter of the right option.

    Args:
        record: the row.
        column: holds a list of texts, or a mapping {text: [...], label: [...]}.
        answer_column: holds the label of the right option; without labels, its letter or its index from 0.
    """
    cell = value(record, column)
    labelled = isinstance(cell, Mapping) and isinstance(cell.get("text"), list)
    listed = _listed(cell["text"] if labelled else cell, record, column)
    texts = [_as_text(one, record, column, "texts") for one in listed]
    letters = string.ascii_uppercase[: len(texts)]
    labels = [str(one) for one in cell.get("label") or letters] if labelled else list(letters)
    if len(labels) != len(texts) or len(letters) != len(texts) or not texts:
        raise DataError(
            f"{record.where}: column '{column}' holds {len(texts)} options with {len(labels)} labels; expected as many "
            f"of both, at most {len(string.ascii_uppercase)}"
        )
    right = value(record, answer_column)
    is_index, name = not labelled and _is_whole(right) and right >= 0, str(right).strip()
    index = right if is_index else labels.index(name) if name in labels else len(texts)
    if index >= len(texts):
        raise DataError(
            f"{record.where}: column '{answer_column}' holds {right!r}, which is none of the options' labels "
            f"{', '.join(labels)}{'' if labelled else f', nor an index from 0 to {len(texts) - 1}'}"
        )
    lines = "\n".join(f"{letter}) {one}" for letter, one in zip(letters, texts, strict=True))
    return lines, letters[index]


def _is_whole(cell: Cell) -> bool:
    return isinstance(cell, int) and not isinstance(cell, bool)


def _find(values: Mapping[str, Cell], column: str) -> Cell:
    """The value of a column, or `_ABSENT`.

    If there is no column of that name, a dotted name refers to a value in nested mappings.
    """
    if column in values:
        return values[column]
    inner: Cell = values
    for part in column.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return _ABSENT
        inner = inner[part]
    return inner


def _names(values: Mapping[str, Cell], above: str = "") -> Iterator[str]:
    for name, inner in values.items():
        nested = isinstance(inner, Mapping) and inner
        yield from _names(inner, f"{above}{name}.") if nested else [f"{above}{name}"]


def _is_chat(cell: Cell) -> bool:
    is_list = isinstance(cell, list) and len(cell) > 0
    return is_list and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in cell)


def _content(message: Mapping[str, Cell], record: Record, column: str) -> str:
    return _as_text(message["content"], record, column, "text as a message's content")


def _response(cell: Cell, record: Record, column: str) -> str:
    if not _is_chat(cell):
        return _as_text(cell, record, column, "text, chat messages, or a list of them")
    roles = [message["role"] for message in cell]
    if roles != ["assistant"]:
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(map(str, roles))}; expected one of the "
            "assistant"
        )
    return _content(cell[0], record, column)


def _listed(cell: Cell, record: Record, column: str) -> list[Cell]:
    if isinstance(cell, list):
        return cell
    raise DataError(f"{record.where}: column '{column}' holds {_short(cell)}; expected text or a list")


def _number(cell: Cell) -> str | None:
    """A finite number as text; None for anything else."""
    if isinstance(cell, bool) or not isinstance(cell, (int, float, Decimal)):
        return None
    return str(cell) if isinstance(cell, int) or math.isfinite(cell) else None


def _as_text(cell: Cell, record: Record, column: str, expected: str) -> str:
    """A cell that holds text that is not blank; `expected` is for the message of the DataError that it raises else."""
    if not isinstance(cell, str) or not cell.strip():
        inner = next(iter(cell), None) if isinstance(cell, Mapping) else None
        hint = "" if inner is None else f"; a part of it is named as in '{column}.{inner}'"
        raise DataError(f"{record.where}: column '{column}' holds {_short(cell)}; expected {expected}{hint}")
    if any("\ud800" <= letter <= "\udfff" for letter in cell):
        raise DataError(f"{record.where}: column '{column}' holds half a surrogate pair, which is no character")
    return cell


def _short(cell: Cell) -> str:
    shown = repr(cell)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
