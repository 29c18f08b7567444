"""Tables of all algorithms, and single ones with formula, factors, papers and needs.

Everything is read from the files and the parts themselves, so it cannot differ from what runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

import algorithms
from experiments.describe import catalogue
from experiments.results import replace_block
from upge import Algorithm

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- algorithms: begin (python -m experiments.describe --readme) -->", "<!-- algorithms: end -->"
HEAD = ["algorithm", "learns from", "gate", "1_stable", "1/π_ref", "Â", "likelihood", "w"]


def table(link: bool = False) -> str:
    """A Markdown table with a row for each term of each algorithm: its gate, four factors and average."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for name in algorithms.names():
        shown = f"[`{name}`](#{name})" if link else f"`{name}`"
        for number, cells in enumerate(catalogue.rows(name)):
            cells = [cell.replace("|", chr(92) + "|") for cell in cells]
            lines.append(f"| {' | '.join(['' if number else shown, *cells])} |")
    return "\n".join(lines)


def short_table() -> str:
    """A Markdown table for README.md with a row per algorithm: what it is, its first paper, and its extra models."""
    lines = ["| algorithm | what it is | learns from | paper | extra models |", "|---|---|---|---|---|"]
    for name in algorithms.names():
        one, papers = algorithms.load(name), catalogue.words(name).papers
        paper = f"[{papers[0]}](https://arxiv.org/abs/{papers[0]})" if papers else ""
        sources = dict.fromkeys(row[0].rpartition(": ")[2] for row in catalogue.rows(name))
        extra = [n for n, needed in (("critic", one.needs.critic), ("reference policy", one.needs.reference)) if needed]
        link = f"[`{name}`](docs/algorithms.md#{name})"
        lines.append(f"| {link} | {one.description} | {', '.join(sources)} | {paper} | {', '.join(extra)} |")
    return "\n".join(lines)


def corrections_table(link: bool = False) -> str:
    """A Markdown table of the corrections."""
    lines = ["| correction | what it does |", "|---|---|"]
    for name in algorithms.corrections():
        shown = f"[`{name}`](#correction-{name})" if link else f"`{name}`"
        lines.append(f"| {shown} | {correction_description(name)} |")
    return "\n".join(lines)


def correction_description(name: str) -> str:
    """The one-line description in a correction's file."""
    return str(OmegaConf.load(algorithms.find(name, algorithms.CORRECTIONS)).description)


def describe(name: str, overrides: Sequence[str] = (), corrections: Sequence[str] = ()) -> str:
    """One algorithm: its formula, the factors of each term, its paper and choices, and what it needs."""
    algorithm = algorithms.load(name, overrides, corrections)
    parts = [f"{algorithm.name}: {algorithm.description}", "", algorithm.formula()]
    for path, one in catalogue.members(algorithm):
        parts += ["", *_terms(path, one)]
    parts += ["", *_papers(name, corrections), "", "Needs:"]
    for need, how in catalogue.needs(algorithm).items():
        parts.append(_row(need, how))
    parts += ["", "LaTeX:", algorithm.formula("latex")]
    return "\n".join(parts)


def _row(left: str, right: str) -> str:
    return textwrap.fill(
        f"{left:<24} {right}", 118, initial_indent="  ", subsequent_indent=" " * 27, break_on_hyphens=False
    )


def _terms(path: str, one: Algorithm) -> list[str]:
    """Each term with its factors: the formula, and the part with its settings."""
    lines = []
    for name, term in one.terms.items():
        times = "" if term.coefficient == 1 else f", times {term.coefficient:g}"
        lines.append(f"{path}terms.{name}, from {term.source.replace('_', ' ')}{times}")
        for place, part in term.parts.items():
            lines.append(_row(place.removeprefix("estimator."), f"{part.formula().text}   {part!r}"))
    for name, regularizer in one.regularizers.items():
        lines.append(f"{path}regularizers.{name}, from {regularizer.source}")
        lines.append(_row("", f"{regularizer.formula().text}   {regularizer!r}"))
    if one.critic is not None:
        lines += [f"{path}critic, minimised separately", _row("", f"{one.critic.formula().text}   {one.critic!r}")]
    return lines


def _papers(name: str, corrections: Sequence[str]) -> list[str]:
    """The header of the algorithm's file and of each correction's, with their papers."""
    lines = []
    for file, folder in [(name, algorithms.FOLDER), *((c, algorithms.CORRECTIONS) for c in corrections)]:
        header = catalogue.words(file, folder)
        numbers = ", ".join(f"arXiv {paper}" for paper in header.papers) or "none on arXiv"
        lines += [f"Paper of {algorithms.stem(file)}: {numbers}"]
        lines += [
            f"  {line}" for text in (header.what, header.textbook, header.choices) if text for line in text.splitlines()
        ]
    return lines


def updated(text: str) -> str:
    """The text of README.md with the table between its markers updated.

    Raises:
        ConfigError: the markers are missing.
    """
    return replace_block(text, README.name, BEGIN, END, f"\n{short_table()}\n", "where the table goes")
