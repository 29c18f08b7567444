"""Reads the cells of a table: texts, numbers, chat messages and options of a question.

Every function but `has` and `is_blank` raises a DataError that names the row, if there is no such column or if it holds
something that the function does not read.

Chat messages are mappings with `role` and `content` (OpenAI) or with `from` and `value` (ShareGPT). A content is text
or a list of parts of type text. Lists of messages or texts may be stored as JSON text, as in CSV files. A conversation
of several turns ends with the user's turn that is to be answered, or with the assistant's answer to it.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from upge.data.files import Record
from upge.errors import DataError, nearest

_ABSENT = object()
#: Other names of the roles of a message.
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
#: Attribute of a problem → names under which published data sets have it, the most specific first.
_USUAL = {
    "prompt": ("prompt", "question", "problem", "query", "instruction", "messages", "conversations", "input"),
    "answer": ("answer", "ground_truth", "reward_model.ground_truth", "final_answer", "gold", "label", "target"),
    "demonstrations": ("solution", "response", "completion", "output", "chosen", "messages", "conversations"),
    "rejected": ("rejected",),
    "system": ("system", "system_prompt"),
}

Cell = Any  # a value of a JSON or parquet file, of any type
Turn = tuple[str, str]
"""Role and content of a message."""


class Asked(NamedTuple):
    """What a response answers.

    Attributes:
        prompt: the text, or the user's last turn.
        system: the system message; None if there is none.
        history: the turns before the last one, without the system message.
    """

    prompt: str
    system: str | None = None
    history: tuple[Turn, ...] = ()


def has(record: Record, column: str) -> bool:
    """Whether the row has this column with a value other than null. A dotted name refers to a nested value."""
    cell = _find(record.values, column)
    return cell is not _ABSENT and cell is not None


def text(record: Record, column: str) -> str:
    """The text in a column."""
    return _as_text(value(record, column), record, column, "text")


def text_if_any(record: Record, column: str) -> str | None:
    """The text in a column; None if it is empty."""
    return None if _is_empty(value(record, column)) else text(record, column)


def value(record: Record, column: str, attribute: str = "") -> Cell:
    """The value in a column, of any type. `attribute` names what the column is read for, for error messages."""
    cell = _find(record.values, column)
    if cell is _ABSENT:
        known = list(_names(record.values))
        usual = next((name for name in _USUAL.get(attribute, ()) if name in known and name != column), None)
        hint = nearest(column, known) if usual is None else f"for example, set data.columns.{attribute}={usual}"
        raise DataError(
            f"{record.where}: no column '{column}'; columns found: {', '.join(map(repr, known)) or 'none'}; {hint}"
        )
    return cell


def prompt(record: Record, column: str, *, has_response: bool = False) -> Asked:
    """The prompt in a column of texts or chat messages.

    Messages are turns of user and assistant that end with the user's, after at most one of the system. If the column
    also holds the response (`has_response`), the assistant's turn at the end is left out.
    """
    cell = value(record, column, "prompt")
    chat = _chat(cell)
    if chat is None:
        return Asked(_as_text(cell, record, column, "text or a list of chat messages"))
    return _asked(chat[:-1] if has_response and chat[-1][0] == "assistant" else chat, chat, record, column)


def _asked(turns: list[tuple[str, Cell]], chat: list[tuple[str, Cell]], record: Record, column: str) -> Asked:
    """Turns as a prompt. `chat` is the conversation that they are from, for error messages."""
    own = turns[1:] if turns and turns[0][0] == "system" else turns
    if not own or own[-1][0] != "user" or any(role not in ("user", "assistant") for role, _ in own):
        is_answered = chat[-1][0] == "assistant" and turns is chat
        fix = f"; if the last one is the demonstration, set data.columns.demonstrations={column}" if is_answered else ""
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(role for role, _ in chat)}; expected those "
            f"of user and assistant, the last the user's, with or without one of the system before them{fix}"
        )
    texts = [(role, _as_text(content, record, column, "text as a message's content")) for role, content in own]
    system = turns[0][1] if len(own) < len(turns) and not _is_empty(turns[0][1]) else None
    return Asked(
        prompt=texts[-1][1],
        system=None if system is None else _as_text(system, record, column, "text as a message's content"),
        history=tuple(texts[:-1]),
    )


def responses(
    record: Record, column: str, attribute: str = "demonstrations", asked: Asked | None = None
) -> tuple[str, ...]:
    """The responses in a column: text, chat messages that end with the assistant's turn, or a list of either.

    Empty ones are left out. Several turns of the assistant are accepted only if those before the last are the turns of
    the prompt `asked`.
    """
    cell = value(record, column, attribute)
    texts = _texts(cell)
    is_single = texts is None and (isinstance(cell, str) or _chat(cell) is not None)
    ones = [cell] if is_single else _listed(cell, record, column) if texts is None else texts
    return tuple(text for one in ones if (text := _response(one, record, column, asked)) is not None)


def answer(record: Record, column: str) -> str:
    """The answer in a column: text, a number in its own notation (142.0 stays "142.0"), or a list of one of these.

    Several accepted answers, and a number with its tolerance ({value, rtol}), become JSON text, as `MathVerifier` reads
    them. A list that is stored as JSON text is such a list.
    """
    cell = value(record, column, "answer")
    cells = _texts(cell) or cell
    if not isinstance(cells, list):
        return _one_answer(cells, record, column)
    if len(cells) == 1:
        return _one_answer(cells[0], record, column)
    return json.dumps([one if _is_measured(one) else _one_answer(one, record, column) for one in cells])


def _one_answer(cell: Cell, record: Record, column: str) -> str:
    if _is_measured(cell):
        return json.dumps(cell)
    number = _number(cell)
    return number if number is not None else _as_text(cell, record, column, "text or a number, or a list of these")


def _is_measured(cell: Cell) -> bool:
    """Whether the cell is a number with its relative tolerance."""
    return isinstance(cell, Mapping) and set(cell) == {"value", "rtol"}


def is_blank(record: Record, column: str) -> bool:
    """Whether the row has the column with an empty value: null, an empty list, or blank text."""
    cell = _find(record.values, column)
    return cell == [] or _is_empty(cell)


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


def _chat(cell: Cell) -> list[tuple[str, Cell]] | None:
    """(role, content) of each message, if the cell holds chat messages."""
    messages = _decoded(cell)
    if not isinstance(messages, list) or not messages:
        return None
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        names = next((n for n in (("role", "content"), ("from", "value")) if n[0] in message and n[1] in message), None)
        if names is None:
            return None
        role, content = (message[name] for name in names)
        chat.append((_ROLES.get(role, role) if isinstance(role, str) else str(role), _joined(content)))
    return chat


def _joined(content: Cell) -> Cell:
    """A message's content; parts of type text are joined to one text."""
    is_parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content


def _texts(cell: Cell) -> list[str] | None:
    """The texts of a list that is stored as JSON text. A list of numbers, such as [1, 2], is an interval."""
    inner = _decoded(cell) if isinstance(cell, str) else None
    is_texts = isinstance(inner, list) and len(inner) > 0 and all(isinstance(one, str) for one in inner)
    return inner if is_texts else None


def _decoded(cell: Cell) -> Cell:
    """A list that is stored as JSON text, decoded; anything else unchanged."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _is_empty(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _response(cell: Cell, record: Record, column: str, asked: Asked | None) -> str | None:
    """A response; None for an empty one."""
    chat = _chat(cell)
    if chat is None:
        return None if _is_empty(cell) else _as_text(cell, record, column, "text, chat messages, or a list of them")
    roles, content = [role for role, _ in chat], chat[-1][1]
    if roles[-1] != "assistant":
        raise DataError(
            f"{record.where}: column '{column}' holds the turns {', '.join(roles)}; expected one of the assistant as "
            "the last"
        )
    if roles.count("assistant") > 1:
        before = _asked(chat[:-1], chat, record, column)
        if asked is None or (before.history, before.prompt) != (asked.history, asked.prompt):
            raise DataError(
                f"{record.where}: column '{column}' holds the turns {', '.join(roles)}, and those before the last are "
                f"not the prompt's; for a conversation set data.columns.prompt={column}"
            )
    return None if _is_empty(content) else _as_text(content, record, column, "text as a message's content")


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
    """The text of a cell. Anything but text that is not blank raises a DataError, whose message names `expected`."""
    if not isinstance(cell, str) or not cell.strip():
        inner = next(iter(cell), None) if isinstance(cell, Mapping) else None
        hint = "" if inner is None else f"; a part of it is named as in '{column}.{inner}'"
        raise DataError(f"{record.where}: column '{column}' holds {_short(cell)}; expected {expected}{hint}")
    if any("\ud800" <= letter <= "\udfff" for letter in cell):
        raise DataError(f"{record.where}: column '{column}' holds half a surrogate pair, which is not a character")
    return cell


def _short(cell: Cell) -> str:
    shown = repr(cell)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
