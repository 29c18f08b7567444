"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import html
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# mkdocs imports this file by its path, and its own program does not put the folder of the repository on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.site.pages import Page, pages

#: Section of mkdocs.yml's `nav` → the folder of generated pages that is listed at its end.
SECTIONS = {"Algorithms": "algorithms/", "API": "reference/api/", "Examples": "examples/"}
#: Links from a page of docs/ to what is elsewhere on the site: pattern of the target → its replacement.
MOVED = (
    (r"(?:\.\./)?algorithms\.md#correction-(\w+)", r"corrections.md#\1"),
    (r"algorithms\.md#corrections", r"corrections.md"),
    (r"algorithms\.md#(\w+)", r"algorithms/\1.md"),
    (r"\.\./algorithms/corrections/?", r"corrections.md"),
    (r"\.\./algorithms/(\w+)\.yaml", r"algorithms/\1.md#file"),
    (r"\.\./algorithms/?", r"algorithms.md"),
    (r"\.\./upge/corrections/?", r"reference/api/corrections.md"),
    (r"\.\./examples/(\w+)\.py", r"examples/\1.md"),
    (r"\.\./examples/(?:README\.md)?", r"examples/index.md"),
    (r"\.\./(CHANGELOG|CONTRIBUTING)\.md", lambda match: f"{match[1].lower()}.md"),
)
#: What the theme's search loads where browsers refuse workers, for pages opened from a disk → this site's own script.
SHIM, WORKER = "https://unpkg.com/iframe-worker/shim", "assets/worker.js"
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_made: dict[str, Page] = {}


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation, and hide a notice of the theme that is not about the build."""
    logging.getLogger("mkdocs.plugins.material").setLevel(logging.ERROR)
    _made.clear()
    _made.update(pages())
    for entries in _sections(config.nav):
        for name, children in entries.items():
            if name in SECTIONS:
                own = {path: page for path, page in _made.items() if path.startswith(SECTIONS[name])}
                children += [{page.title: path} for path, page in own.items() if path not in children]
    return config


def _sections(entries: list) -> Iterator[dict[str, list]]:
    """Every section of a navigation that has pages below it."""
    for entry in entries:
        if isinstance(entry, dict) and any(isinstance(below, list) for below in entry.values()):
            yield entry
            for below in entry.values():
                yield from _sections(below)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; one of them replaces a page of docs/ with the same path."""
    from mkdocs.structure.files import File

    for path, page in _made.items():
        if (old := files.get_file_from_path(path)) is not None:
            files.remove(old)
        files.append(File.generated(config, path, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of the pages of docs/ that lead to pages generated for the site."""
    if page.file.src_uri in _made:
        return markdown
    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(lambda link: _moved(link[0], up), markdown)


def _moved(target: str, up: str) -> str:
    own = target.removeprefix(up) if up and target.startswith(up) else target
    for pattern, replacement in MOVED:
        if re.fullmatch(pattern, own):
            return up + re.sub(pattern, replacement, own)
    return target


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The page with the site's own script in place of one from a network."""
    return output.replace(SHIM, "../" * page.file.src_uri.count("/") + WORKER)


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """The same for pages without Markdown, such as 404.html."""
    return output.replace(SHIM, WORKER)


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """The block of a fence `math`: MathML, which browsers show without a script, one line for each term."""
    from latex2mathml.converter import convert

    body = source.replace(r"\begin{gathered}", "").replace(r"\end{gathered}", "").replace(r"\mathbb{1}", "𝟙")
    lines = [term for line in body.split(r"\\") for term in re.split(r" (?=[+-] (?:\d\S* )?\\sum_\{\\tau)", line)]
    shown = "\n".join(f"<div>{convert(line.strip(), display='block')}</div>" for line in lines if line.strip())
    return f'<div class="formula" title="{html.escape(source, quote=True)}">{shown}</div>'
