"""The algorithms in print: `python -m experiments.describe` lists them, `algo=NAME` shows one.

The table is read off the parts themselves, so it cannot differ from what runs; `--readme` renews the one in README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import algorithms
from upge import Algorithm
from upge.errors import ConfigError, UserError

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- algorithms: begin (python -m experiments.describe --readme) -->", "<!-- algorithms: end -->"
_SLOTS = ("mask", "denominator", "advantage", "likelihood")


def table() -> str:
    """A Markdown table: a row for each term of each algorithm with its gate, its four factors and its average."""
    lines = [
        "| algorithm | learns from | gate | 1_stable | 1/π_ref | Â | likelihood | w |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in algorithms.names():
        algorithm = algorithms.load(name)
        for number, term in enumerate(algorithm.terms.values()):
            factors = [term.estimator.parts[slot].formula().text for slot in _SLOTS]
            cells = [term.source, term.gate.formula().text, *factors, term.reduction.formula().text]
            first = "" if number else f"`{name}`"
            lines.append(f"| {' | '.join([first, *(cell.replace('|', chr(92) + '|') for cell in cells)])} |")
    return "\n".join(lines)


def describe(name: str, overrides: Sequence[str] = ()) -> str:
    """One algorithm: its formula, the parts of each term with their settings, and what it needs."""
    algorithm = algorithms.load(name, overrides)
    parts = [f"{algorithm.name}: {algorithm.description}", "", algorithm.formula(), ""]
    for path, part in algorithm.parts.items():
        parts.append(f"  {path:<34} {part!r}")
    parts += ["", *_needs(algorithm), "", "LaTeX:", algorithm.formula("latex")]
    return "\n".join(parts)


def _needs(algorithm: Algorithm) -> list[str]:
    needs = algorithm.needs
    what = {
        "rollouts": needs.rollouts,
        "demonstrations": needs.demonstrations,
        "preference pairs": needs.preference_pairs,
        "a critic": needs.critic,
        "a frozen reference": needs.reference,
    }
    lines = ["needs: " + ", ".join(name for name, needed in what.items() if needed)]
    if needs.group_size > 1:
        lines.append(f"       group_size of at least {needs.group_size} (for {needs.group_size_because})")
    lines.append(f"keeps together in a micro-batch: the {algorithm.reach}")
    return lines


def renewed(text: str) -> str:
    """README text with the table between its markers made anew.

    Raises:
        ConfigError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{README.name}: the lines '{BEGIN}' and '{END}' are missing; put them where the table goes")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints; exit code 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments == ["--readme"]:
            README.write_text(renewed(README.read_text()))
            return 0
        names = [a.removeprefix("algo=") for a in arguments if a.startswith("algo=")]
        rest = [a for a in arguments if not a.startswith("algo=")]
        unknown = [a for a in rest if not a.startswith("algo.") or "=" not in a]
        if unknown or (rest and not names):
            raise ConfigError(f"'{(unknown or rest)[0]}': give algo=NAME, then algo.KEY=VALUE, or nothing at all")
        overrides = [a.removeprefix("algo.") for a in rest]
        print(describe(names[-1], overrides) if names else table())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
