"""What a cell of a table says: texts, numbers, chat messages, the options of a question; errors name the row."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from upge.data.files import Record
from upge.errors import DataError, nearest

_ABSENT = object()


def has(record: Record, column: str) -> bool:
    """Does the row have this column, with anything in it but null? A dotted name leads into nested values."""
    found = _find(record.values, column)
    return found is not _ABSENT and found is not None


def text(record: Record, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: there is no such column, or something else in it.
    """
    return _as_text(value(record, column), record, column, "text")


def value(record: Record, column: str) -> Any:
    """What a column holds, of any type.

    Raises:
        DataError: there is no such column, or null in it.
    """
    found = _find(record.values, column)
    if found is _ABSENT:
        known = list(_names(record.values))
        raise DataError(
            f"{record.where}: no column '{column}'; columns found: {', '.join(map(repr, known)) or 'none'}; "
            f"{nearest(column, known)}"
        )
    return found


def prompt(record: Record, column: str) -> tuple[str, str | None]:
    """The user's prompt and, where the column holds chat messages, their system message.

    Raises:
        DataError: it holds neither text nor messages, or other turns than one of the user after at most one of the
            system.
    """
    found = value(record, column)
    if not _is_chat(found):
        return _as_text(found, record, column, "text or a list of chat messages"), None
    roles = [message["role"] for message in found]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(map(str, roles))}; expected one of the "
            "user, with or without one of the system before it; write earlier turns into the text of one"
        )
    contents = [_content(message, record, column) for message in found]
    return contents[-1], contents[0] if len(contents) == 2 else None


def responses(record: Record, column: str) -> tuple[str, ...]:
    """The responses in a column: text, a list of texts, chat messages (the assistant's turn), or a list of such.

    Raises:
        DataError: it holds anything else.
    """
    found = value(record, column)
    alone = isinstance(found, str) or _is_chat(found)
    return tuple(_response(one, record, column) for one in ([found] if alone else _listed(found, record, column)))


def answer(record: Record, column: str) -> str:
    """The answer in a column: text, a number as it is written (142.0 stays "142.0"), or a list of one of them.

    Raises:
        DataError: it holds anything else.
    """
    found = value(record, column)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, list):
        raise DataError(
            f"{record.where}: column '{column}' holds {len(found)} answers; expected one; write them into one text, as "
            "the verifier reads them"
        )
    number = _number(found)
    return number if number is not None else _as_text(found, record, column, "text or a number")


def is_blank(record: Record, column: str) -> bool:
    """Does the row have the column, with nothing in it: null, or a text or list of nothing?"""
    found = _find(record.values, column)
    return found is None or found == [] or (isinstance(found, str) and not found.strip())


def level(record: Record, column: str) -> str:
    """The level in a column; a whole number n is "Level n", as MATH calls its own.

    Raises:
        DataError: it holds neither text nor a whole number.
    """
    found = value(record, column)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    whole = isinstance(found, int) and not isinstance(found, bool)
    return f"Level {found}" if whole else _as_text(found, record, column, "text or a whole number")


def label(record: Record, column: str) -> str:
    """A name in a column, of an example for instance: text or a whole number.

    Raises:
        DataError: it holds anything else.
    """
    found = value(record, column)
    whole = isinstance(found, int) and not isinstance(found, bool)
    return str(found) if whole else _as_text(found, record, column, "text or a whole number")


def options(record: Record, column: str, answer_column: str) -> tuple[str, str]:
    """The options of a multiple-choice question as lines "A) ...", and the letter of the right one.

    Args:
        record: the row.
        column: holds a list of texts, or their mapping {text: [...], label: [...]}.
        answer_column: holds the right one's label, or without labels its letter or its index from 0.

    Raises:
        DataError: either holds anything else.
    """
    found = value(record, column)
    labelled = isinstance(found, Mapping) and isinstance(found.get("text"), list)
    listed = _listed(found["text"] if labelled else found, record, column)
    texts = [_as_text(one, record, column, "texts") for one in listed]
    letters = string.ascii_uppercase[: len(texts)]
    labels = [str(one) for one in found.get("label") or letters] if labelled else list(letters)
    if len(labels) != len(texts) or len(letters) != len(texts) or not texts:
        raise DataError(
            f"{record.where}: column '{column}' holds {len(texts)} options with {len(labels)} labels; expected as many "
            f"of both, at most {len(string.ascii_uppercase)}"
        )
    right = value(record, answer_column)
    index = right if _is_index(right) and not labelled else _index(str(right).strip(), labels)
    if index is None or not index < len(texts):
        raise DataError(
            f"{record.where}: column '{answer_column}' holds {right!r}, which is none of the options' labels "
            f"{', '.join(labels)}{'' if labelled else f', nor an index from 0 to {len(texts) - 1}'}"
        )
    lines = "\n".join(f"{letter}) {one}" for letter, one in zip(letters, texts, strict=True))
    return lines, letters[index]


def _is_index(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _index(name: str, labels: list[str]) -> int | None:
    return labels.index(name) if name in labels else None


def _find(values: Mapping[str, Any], column: str) -> Any:
    """What stands under a name, or under a dotted name in nested mappings; a name that is there as it stands wins."""
    found: Any = values
    if column in values:
        return values[column]
    for part in column.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _ABSENT
        found = found[part]
    return found


def _names(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, inner in values.items():
        if isinstance(inner, Mapping) and inner:
            yield from _names(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _is_chat(found: Any) -> bool:
    is_list = isinstance(found, list) and len(found) > 0
    return is_list and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in found)


def _content(message: Mapping[str, Any], record: Record, column: str) -> str:
    return _as_text(message["content"], record, column, "text as a message's content")


def _response(found: Any, record: Record, column: str) -> str:
    if not _is_chat(found):
        return _as_text(found, record, column, "text, chat messages, or a list of them")
    roles = [message["role"] for message in found]
    if roles != ["assistant"]:
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(map(str, roles))}; expected one of the "
            "assistant"
        )
    return _content(found[0], record, column)


def _listed(found: Any, record: Record, column: str) -> list[Any]:
    if isinstance(found, list):
        return found
    raise DataError(f"{record.where}: column '{column}' holds {_short(found)}; expected text or a list")


def _number(found: Any) -> str | None:
    """A number as text; None for anything else."""
    if isinstance(found, bool) or not isinstance(found, (int, float, Decimal)):
        return None
    return str(found) if isinstance(found, int) or math.isfinite(found) else None


def _as_text(found: Any, record: Record, column: str, expected: str) -> str:
    if not isinstance(found, str) or not found.strip():
        inner = next(iter(found), None) if isinstance(found, Mapping) else None
        hint = "" if inner is None else f"; a part of it is named as in '{column}.{inner}'"
        raise DataError(f"{record.where}: column '{column}' holds {_short(found)}; expected {expected}{hint}")
    if any("\ud800" <= letter <= "\udfff" for letter in found):
        raise DataError(f"{record.where}: column '{column}' holds half a surrogate pair, which is no character")
    return found


def _short(found: Any) -> str:
    shown = repr(found)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
