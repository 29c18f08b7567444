"""The results as text, as blocks of docs/referee.md and as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from experiments.files import DOCS, now, replace_block, versions
from experiments.grid import markdown_table
from experiments.referee import tables
from experiments.referee.run import Result, distribution
from experiments.referee.settings import OFFLOAD, framework
from experiments.referee.tables import Table

PAGE, WEB_PAGE = DOCS / "referee.md", DOCS / "results" / "referee.html"
_LEGEND = (
    "'=': the gradients are equal; '×0.5': parallel, half as large; 'cos 0.99, ×1.1': cosine and projection on ours. "
    "Columns say how the update of 24 rollouts is cut."
)


def sections(found: Sequence[Result]) -> list[tuple[str, list[str], Table | None]]:
    """(title, sentences, table) of every version, of the reported faults and of DeepSpeed."""
    made: list[tuple[str, list[str], Table | None]] = []
    for result in found:
        if result.framework == OFFLOAD:
            continue
        title = f"{distribution(result.framework)} {result.version}"
        if result.error:
            made.append((title, [f"Not judged: {result.error}."], None))
            continue
        rows = result.data["rows"]
        called = ", ".join(f"`{name}`" for name in dict.fromkeys(row["called"] for row in rows if not row["error"]))
        notes = [f"Called: {called}." if called else "", f"Supplied: {framework(result.framework).SUPPLIED}."]
        if result.data["stubs"]:
            notes.append(
                f"Imports that are missing here and that the losses do not use: {', '.join(result.data['stubs'])}."
            )
        refused = tables.refusals(rows)
        notes.append(f"Not compared: {'; '.join(refused)}." if refused else "")
        made.append((title, [note for note in notes if note], tables.version_table(rows)))
    if claims := tables.claims_table(found)[1]:
        made.insert(0, ("Faults", [], (tables.claims_table(found)[0], claims)))
    return [*made, *_offload(found)]


def _offload(found: Sequence[Result]) -> list[tuple[str, list[str], Table | None]]:
    updates = [result for result in found if result.framework == OFFLOAD]
    if not updates:
        return []
    failed = [f"Not judged: {r.version}: {r.error}." for r in updates if r.error]
    said = (
        "The share of each micro-batch's gradient in one real update with ZeRO-2, the optimizer on the CPU and one "
        "gloo process; a sum over micro-batches has 1 for each."
    )
    return [("DeepSpeed: optimizer on the CPU", [said, *failed], tables.offload_table(updates))]


def text(found: Sequence[Result]) -> str:
    """What the command prints."""
    parts = [_LEGEND]
    for title, notes, table in sections(found):
        parts.append("\n".join([f"### {title}", "", *notes]))
        if table is not None and table[1]:
            parts.append(_markdown(table))
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    header, rows = table
    return markdown_table(header, [[cell.replace("|", r"\|") for cell in row] for row in rows])


def updated(page: str, found: Sequence[Result]) -> str:
    """The text of the page with its block of results replaced.

    Raises:
        ConfigError: the markers are missing.
    """
    begin, end = "<!-- results: begin (python -m experiments.referee --docs) -->", "<!-- results: end -->"
    return replace_block(page, PAGE.name, begin, end, f"\n\n{text(found)}\n\n", "where the results go")


def web_page(found: Sequence[Result]) -> str:
    """A self-contained HTML page."""
    style = (
        "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:110em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;"
        "vertical-align:top}th{background:#f3f3f3}td.equal{color:#777}td.differs{background:#fff3d6}"
    )
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    body = [f"<h1>Referee</h1><p>{html.escape(_LEGEND)}</p><p>Made {now()} with {html.escape(installed)}.</p>"]
    for title, notes, table in sections(found):
        body.append(f"<h2>{html.escape(title)}</h2>")
        body += [f"<p>{html.escape(note).replace('`', '')}</p>" for note in notes]
        if table is not None and table[1]:
            body.append(_html(table))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Referee</title><style>{style}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _html(table: Table) -> str:
    header, rows = table
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    for row in rows:
        cells = []
        for value in row:
            kind = "equal" if value == "=" else "differs" if value.startswith(("×", "cos ")) else ""
            cells.append(f"<td class='{kind}'>{html.escape(value)}</td>")
        lines.append("".join(cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def write_page(path: Path, found: Sequence[Result]) -> None:
    """Write the HTML page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(web_page(found), "utf-8")
