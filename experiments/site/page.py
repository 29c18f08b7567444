"""A generated page, and the pieces of Markdown that such pages are made of."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Page(NamedTuple):
    """A page of the site.

    Attributes:
        title: its name in the navigation.
        text: Markdown.
    """

    title: str
    text: str


def fence(text: str, language: str = "") -> str:
    """A fenced block."""
    return f"```{language}\n{text}\n```"


def prose(text: str) -> str:
    """The head of an algorithm's file as paragraphs. Lines that are indented, such as settings, stay lines of code."""
    lines, indented = [], False
    for line in text.splitlines():
        is_code = line.startswith("  ")
        if is_code != indented:
            lines += ["```", ""] if indented else ["", "```"]
        lines.append(line.strip() if is_code else _spans(line))
        indented = is_code
    return "\n".join([*lines, "```"] if indented else lines)


def _spans(line: str) -> str:
    """A line in which only code between backticks is Markdown."""
    return "".join(part if part.startswith("`") else escaped(part) for part in re.split(r"(`[^`]+`)", line))


def cell(text: str) -> str:
    """Text in a table, shown literally: as code, which no character of a formula can end."""
    return f"<code>{escaped(text)}</code>"


def escaped(text: str) -> str:
    """Text in which nothing is Markdown or HTML, also inside of a table."""
    special = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "*": "&#42;", "_": "&#95;", "`": "&#96;"}
    special |= {"[": "&#91;", "]": "&#93;", "\\": "&#92;"}
    return "".join(special.get(character, character) for character in text)


def part_link(part: Any) -> str:
    """The class of a part, linked to its page of the API, and its settings."""
    cls = type(part)
    settings = repr(part).partition("(")[2].removesuffix(")")
    name = f"[`{cls.__name__}`][{cls.__module__}.{cls.__name__}]"
    return f"{name} <small>{escaped(settings)}</small>" if settings else name
