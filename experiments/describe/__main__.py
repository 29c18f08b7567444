"""Describe the algorithms: `python -m experiments.describe` lists them and the corrections.

`algo=NAME` shows one, also with `correction=NAME`, correction.NAME.KEY=VALUE and algo.KEY=VALUE.

Everything is read from the files and the parts themselves, so it cannot differ from what runs. `--readme` updates the
table in README.md, `--docs` updates docs/algorithms.md.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import algorithms
from experiments import cli
from experiments.config import correction_names
from experiments.describe import base_of, correction_description, key_lines, members, needs, papers, rows, words
from experiments.files import DOCS, replace_block
from experiments.grid import markdown_table
from upge import Algorithm
from upge.components.base import Component
from upge.errors import ConfigError

README, PAGE = cli.ROOT / "README.md", DOCS / "algorithms.md"
BEGIN, END = "<!-- algorithms: begin (python -m experiments.describe --readme) -->", "<!-- algorithms: end -->"


def table(link: bool = False) -> str:
    """A Markdown table with a row for each term of each algorithm: its gate, four factors and average."""
    lines = []
    for name in algorithms.names():
        shown = f"[`{name}`](#{name})" if link else f"`{name}`"
        for number, cells in enumerate(rows(name)):
            lines.append(["" if number else shown, *(cell.replace("|", r"\|") for cell in cells)])
    return markdown_table(["algorithm", "learns from", "gate", "1_stable", "1/π_ref", "Â", "likelihood", "w"], lines)


def short_table() -> str:
    """A Markdown table for README.md with a row per algorithm: what it is, its first paper, and its extra models."""
    lines = []
    for name in algorithms.names():
        one, first = algorithms.load(name), words(name).papers[:1]
        terms = [term for _, inner in members(one) for term in inner.terms.values()]
        sources = dict.fromkeys(term.source.replace("_", " ") for term in terms)
        models = {"critic": one.needs.critic, "reference policy": one.needs.reference, "teacher": one.needs.teacher}
        extra = [model for model, needed in models.items() if needed]
        paper = "".join(f"[{number}](https://arxiv.org/abs/{number})" for number in first)
        link = f"[`{name}`](docs/algorithms.md#{name})"
        lines.append([link, one.description, ", ".join(sources), paper, ", ".join(extra)])
    return markdown_table(["algorithm", "what it is", "learns from", "paper", "extra models"], lines)


def corrections_table(link: bool = False) -> str:
    """A Markdown table of the corrections."""
    shown = {n: f"[`{n}`](#correction-{n})" if link else f"`{n}`" for n in algorithms.corrections()}
    lines = [(cell, correction_description(name)) for name, cell in shown.items()]
    return markdown_table(["correction", "what it does"], lines)


def describe(name: str, overrides: Sequence[str] = (), corrections: Sequence[str] = ()) -> str:
    """One algorithm: its formula, the factors of each term, its paper and choices, and what it needs."""
    algorithm = algorithms.load(name, overrides, corrections)
    parts = [f"{algorithm.name}: {algorithm.description}", "", algorithm.formula()]
    for path, one in members(algorithm):
        parts += ["", *_terms(path, one)]
    parts += ["", *_headers(name, corrections), "", "Needs:", *(_row(*need) for need in needs(algorithm).items())]
    return "\n".join([*parts, "", "LaTeX:", algorithm.formula("latex")])


def _row(left: str, right: str) -> str:
    text, indent = f"{left:<24} {right}", " " * 27
    return textwrap.fill(text, 118, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False)


def _terms(path: str, one: Algorithm) -> list[str]:
    """Each term with its factors: the formula, and the part with its settings."""
    lines = []
    for name, term in one.terms.items():
        times = "" if term.coefficient == 1 else f", times {term.coefficient:g}"
        lines.append(f"{path}terms.{name}, from {term.source.replace('_', ' ')}{times}")
        for place, part in term.parts.items():
            lines.append(_row(place.removeprefix("estimator."), _formula_and_settings(part)))
    for name, regularizer in one.regularizers.items():
        lines.append(f"{path}regularizers.{name}, from {regularizer.source}")
        lines.append(_row("", _formula_and_settings(regularizer)))
    if one.critic is not None:
        lines += [f"{path}critic, minimized separately", _row("", _formula_and_settings(one.critic))]
    return lines


def _formula_and_settings(part: Component) -> str:
    """The formula and the settings; once if a part of the user's own has no other formula."""
    formula = part.formula().text
    return formula if formula == repr(part) else f"{formula}   {part!r}"


def _headers(name: str, corrections: Sequence[str]) -> list[str]:
    """The header of the algorithm's file and of each correction's, with their papers."""
    lines = []
    for file, folder in [(name, algorithms.FOLDER), *((c, algorithms.CORRECTIONS) for c in corrections)]:
        header = words(file, folder)
        numbers = ", ".join(f"arXiv {paper}" for paper in header.papers) or "none on arXiv"
        text = "\n".join(filter(None, (header.what, header.textbook, header.choices)))
        lines += [f"Paper of {algorithms.stem(file)}: {numbers}", *(f"  {line}" for line in text.splitlines())]
    return lines


def updated(text: str) -> str:
    """The text of README.md with the table between its markers updated.

    Raises:
        ConfigError: the markers are missing.
    """
    return replace_block(text, README.name, BEGIN, END, f"\n{short_table()}\n", "where the table goes")


INTRODUCTION = """\
# The algorithms

Generated by `python -m experiments.describe --docs` from the files in [algorithms/](../algorithms); edit those instead.
Each algorithm is

```
∇J = Σ_terms Σ_trajectories  gate · w · Σ_t 1_stable · (1/π_ref) · Â · ∇π_θ      (+ regularizers)
```

r = π_θ/π_old, P = pass rate of the prompt's rollouts, R = reward, H = entropy. π_ref is the paper's name for the
denominator; π_0 is the reference policy of KL terms, preference pairs and importance weights; ν is the teacher. Without
Σ_v a term moves the sampled token alone; with Σ_v the product is summed over tokens v of the vocabulary
([distillation.md](distillation.md)).

τ~π_old are rollouts, τ* demonstrations, τ⁺ and τ⁻ the responses of a pair. Averages count N trajectories, Q prompts, n
trajectories of a prompt and |τ| tokens. Without a subscript they count the trajectories of the term or regularizer
itself (`over: term`), with the subscript `all` those of all terms (`over: batch`), and n_kind only rollouts or only
demonstrations.

A gate or a mask of 1 changes nothing. 1024 stands for the response limit of the run, `rollout.max_response_tokens`.
`python -m experiments.describe algo=NAME correction=NAME algo.KEY=VALUE` shows an algorithm with other settings. Every
key below can be given on the command line of `experiments.run`, or in

```python
algorithms.load("grpo", ["terms.rl.estimator.mask.high=0.28", "correction.tis.cap=3"], corrections=["tis"])
```

A mapping replaces a whole part: `"algo.terms.rl.estimator.mask={_target_: upge.NoMask}"`. It may name a part of your
own ([extend.md](extend.md)).

[table1.md](table1.md) derives the factor in front of ∇π_θ from each written objective, as in Table 1 of the paper.
"""

CORRECTIONS = """\
## Corrections

Corrections apply to algorithms with rollouts, in the given order: `correction=tis` or `correction=[tis,kl_k3]` on the
command line or in a recipe. A correction is a function from algorithm to algorithm
([upge/corrections/](../upge/corrections/)). It wraps parts of the terms that learn from rollouts, because
demonstrations are not sampled by an engine. Its settings are `correction.NAME.KEY=VALUE`, such as
`correction.tis.cap=3`. Overrides of the algorithm apply before it and name the parts as the algorithm's file does.
`correction=path/to/mine.yaml` takes a file of your own in the form of those in
[algorithms/corrections/](../algorithms/corrections); `_target_` names the class, which may be your own.
"""


def page() -> str:
    """The text of docs/algorithms.md."""
    parts = [INTRODUCTION, table(link=True), ""]
    for name in algorithms.names():
        parts += _algorithm(name)
    parts += [CORRECTIONS, corrections_table(link=True), ""]
    for name in algorithms.corrections():
        parts += _correction(name)
    return "\n".join(parts)


def _algorithm(name: str) -> list[str]:
    """The section of an algorithm: what it is, paper, formula, choices, needs, keys."""
    algorithm, header = algorithms.load(name), words(name)
    formula = algorithm.formula("latex")
    if r"\\" in formula:
        formula = f"\\begin{{gathered}}\n{formula}\n\\end{{gathered}}"
    lines = [f"## {name}", "", f"{_sentence(algorithm.description)} {_papers(header.papers)}".rstrip(), ""]
    lines += [_block("text", header.what), "", _block("", algorithm.formula()), "", _block("math", formula), ""]
    rest = "\n".join(text for text in (header.textbook, header.choices) if text)
    lines += [_block("text", rest), ""] if rest else []
    lines += ["Needs:", "", *(f"- **{need}**: {how}" for need, how in needs(algorithm).items()), ""]
    own = "\n".join(key_lines(name))
    return [*lines, f"Keys, to append to `python -m experiments.run algo={name}`:", "", _block("", own), ""]


def _correction(name: str) -> list[str]:
    """The section of a correction: what it does, paper, choices, and an algorithm with it."""
    header = words(name, algorithms.CORRECTIONS)
    lines = [f"### correction {name}", "", f"{_sentence(correction_description(name))} {_papers(header.papers)}", ""]
    lines += [_block("text", header.what), "", _block("text", header.choices), ""]
    base = base_of(name)
    lines += [f"On `{base}`:", "", _block("", algorithms.load(base, corrections=[name]).formula()), ""]
    own = "\n".join(line for line in key_lines(base, name) if line.startswith(f"{algorithms.CORRECTION}."))
    return [*lines, "Its settings:", "", _block("", own), ""]


def _papers(papers: tuple[str, ...]) -> str:
    return " ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


# The command.


def _parse(arguments: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """(algorithm, overrides, corrections) of a command line."""
    name, overrides, corrections = None, [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "algo" and equals:
            name = value
        elif key == "correction" and equals:
            corrections = correction_names(value)
        elif key.startswith(("algo.", "correction.")) and equals:
            overrides.append(argument.removeprefix("algo."))
        else:
            raise ConfigError(f"'{argument}': give algo=NAME, correction=NAME and algo.KEY=VALUE, or nothing at all")
    if name is None and arguments:
        raise ConfigError(f"'{arguments[0]}': also give algo=NAME")
    return name, overrides, corrections


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the description, or update the docs; return the exit code, 2 on bad input."""
    return cli.run_command(_describe, arguments, lambda everything: str(__doc__))


def _describe(arguments: list[str]) -> int:
    try:
        if arguments == ["--readme"]:
            README.write_text(updated(README.read_text("utf-8")), "utf-8")
        elif arguments == ["--docs"]:
            PAGE.write_text(page(), "utf-8")
            papers.PAGE.write_text(papers.page(), "utf-8")
        else:
            name, overrides, corrections = _parse(arguments)
            shown = f"{table()}\n\n{corrections_table()}" if name is None else describe(name, overrides, corrections)
            print(shown, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as in `| head`
        sys.stdout = None
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
