"""Where commands write: a new folder for results, and the generated blocks of documentation pages."""

from __future__ import annotations

from pathlib import Path

from upge.errors import ConfigError

#: The folder of the documentation in a checkout.
DOCS = Path(__file__).parents[1] / "docs"


def free_folder(parent: str, name: str) -> Path:
    """`parent/name`, or the first of `parent/name-2`, `parent/name-3`, ... that does not exist."""
    number, path = 1, Path(parent) / name
    while path.exists():
        number += 1
        path = Path(parent) / f"{name}-{number}"
    return path


def replace_block(page: str, file: str, begin: str, end: str, made: str, where: str) -> str:
    """The text of a page with `made` between the lines `begin` and `end`.

    Args:
        page: the text.
        file: the page's name, for messages.
        begin, end: the markers around the block; they stay.
        made: the new text between them.
        where: where the markers belong, for messages, as in "where the tables go".

    Raises:
        ConfigError: a marker is missing.
    """
    before, opening, rest = page.partition(begin)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise ConfigError(f"{file}: the lines '{begin}' and '{end}' are missing; put them {where}")
    return f"{before}{begin}{made}{end}{after}"
