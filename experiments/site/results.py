"""What docs/results.md says of one algorithm: rows of the tables that the sweeps have written into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from experiments.config import CONFIGS
from experiments.files import DOCS


class Section(NamedTuple):
    """A section of docs/results.md.

    Attributes:
        title, anchor: of its heading.
        what: the caption of its first table.
        table: the rows of the algorithm, in Markdown.
    """

    title: str
    anchor: str
    what: str
    table: str


def sweeps() -> dict[str, dict[str, Any]]:
    """Name → settings of every sweep that ships."""
    files = sorted((CONFIGS / "sweep").glob("*.yaml"))
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in files}


def labels(sweep: dict[str, Any], name: str) -> list[str]:
    """The labels of a sweep's variants that train with an algorithm; a variant without steps trains with none."""
    common, variants = sweep.get("common") or {}, sweep.get("variants") or {}
    return [
        label for label, keys in variants.items() if {**common, **keys}.get("algo") == name and keys.get("steps") != 0
    ]


def sweeps_of(name: str) -> list[str]:
    """The sweeps that have an algorithm in a variant."""
    return [sweep for sweep, settings in sweeps().items() if labels(settings, name)]


def results_of(name: str) -> Iterator[Section]:
    """The sections whose first table has rows of an algorithm."""
    text, shipped = (DOCS / "results.md").read_text("utf-8"), sweeps()
    for found in re.finditer(r"<!-- sweep (\S+): begin -->\n(.*?)<!-- sweep \1: end -->", text, re.DOTALL):
        own = set(labels(shipped.get(found[1], {}), name))
        title = re.findall(r"^## (.*)$", text[: found.start()], re.MULTILINE)[-1]
        table = re.search(r"^\*\*(.*?)\*\*\n\n((?:\|.*\n)+)", found[2], re.MULTILINE)
        head, rule, *rows = table[2].splitlines() if table else ("", "")
        kept = [row for row in rows if _label(row) in own]
        if kept and table:
            yield Section(title, _anchor(title), table[1], "\n".join([head, rule, *kept]))


def _label(row: str) -> str:
    return row.split(" | ")[0].removeprefix("| ").replace("\\", "").strip()


def _anchor(title: str) -> str:
    """The anchor of a heading, as mkdocs makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
