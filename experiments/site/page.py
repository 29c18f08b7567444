"""A generated page, and the pieces of Markdown that such pages are made of."""

from __future__ import annotations

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
