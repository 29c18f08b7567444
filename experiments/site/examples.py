"""The pages of the examples: their notebooks, with code, printed output and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from experiments import cli
from experiments.site.page import Page, fence

FOLDER = cli.ROOT / "examples"


def pages() -> dict[str, Page]:
    """Path on the site → page: the list of examples, and one page for each."""
    made = {"examples/index.md": Page("Overview", overview((FOLDER / "README.md").read_text("utf-8")))}
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = page(json.loads(path.read_text("utf-8")))
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        made[f"examples/{path.stem}.md"] = Page(title[1] if title else path.stem, text)
    return made


def overview(readme: str) -> str:
    """The README of the examples, in which a script's link leads to its page; notebooks are files of the repository."""
    text = re.sub(r", \[notebook\]\(\w+\.ipynb\)", "", readme)
    return re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", text).replace("](../docs/", "](../")


def page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as Markdown."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield fence(source, "python")
    for output in cell["outputs"]:
        if text := "".join(output.get("text", output.get("data", {}).get("text/plain", ""))):
            yield fence(text.rstrip(), "text")
        if image := output.get("data", {}).get("image/png"):
            yield f'<img alt="Figure of the cell above" src="data:image/png;base64,{"".join(image).strip()}">'
