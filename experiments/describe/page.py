"""docs/algorithms.md, made of what the files and the parts say: `python -m experiments.describe --docs`."""

from __future__ import annotations

import re

import algorithms
from experiments.describe import catalogue, listing
from experiments.files import DOCS

PATH = DOCS / "algorithms.md"
TABLE_BEGIN, TABLE_END = "<!-- table 1: begin -->", "<!-- table 1: end -->"

INTRODUCTION = """\
# The algorithms

Made by `python -m experiments.describe --docs` from the files in [algorithms/](../algorithms); change those. Each is

```
∇J = Σ_terms Σ_trajectories  gate · w · Σ_t 1_stable · (1/π_ref) · Â · ∇π_θ      (+ regularizers)
```

r = π_θ/π_old, P = pass rate of the question's rollouts, R = reward, N trajectories, Q questions, n trajectories of a
question, |τ| tokens, H = entropy. A gate or a mask of 1 leaves everything as it is. 1024 stands for the response limit
of the run, `rollout.max_response_tokens`. An algorithm as it is with other settings is shown by
`python -m experiments.describe algo=NAME correction=NAME algo.KEY=VALUE`. Every key below can be given on the command
line of `experiments.run`, or in

```python
algorithms.load("grpo", ["terms.rl.estimator.mask.high=0.28", "correction.tis.cap=3"], corrections=["tis"])
```

A whole part is replaced by a mapping: `"algo.terms.rl.estimator.mask={_target_: upge.NoMask}"`, also one of your own
([extend.md](extend.md)).
"""

TABLE_1 = """\
## Table 1 of the paper

The table of arXiv 2509.04419 for the algorithms here: sympy derives, from each objective as it is written, the factor
in front of ∇π_θ (`upge.theory.symbolic`).
"""

CORRECTIONS = """\
## Corrections

What any algorithm with rollouts can take, in the order given: `correction=tis` or `correction=[tis,kl_k3]` on the
command line, also in a recipe. A correction is a function from algorithm to algorithm
([upge/corrections.py](../upge/corrections.py)). It wraps parts of the terms that learn from rollouts; a demonstration
was sampled by no engine. Its settings are `correction.NAME.KEY=VALUE`, such as `correction.tis.cap=3`. Overrides of the
algorithm apply before it and name the parts as the algorithm's file does.
`correction=path/to/mine.yaml` takes a file of your own, of the form of those in
[algorithms/corrections/](../algorithms/corrections): `_target_` names the class, which may be one of your own.
"""


def page(previous: str = "") -> str:
    """The whole page; `previous` is the one to take Table 1 from where sympy is not installed."""
    parts = [INTRODUCTION, listing.table(link=True), "", TABLE_1, _table_1(previous), ""]
    for name in algorithms.names():
        parts += _algorithm(name)
    parts += [CORRECTIONS, listing.corrections_table(link=True), ""]
    for name in algorithms.corrections():
        parts += _correction(name)
    return "\n".join(parts)


def write() -> None:
    """Renews the page."""
    PATH.write_text(page(PATH.read_text("utf-8") if PATH.is_file() else ""), "utf-8")


def _table_1(previous: str) -> str:
    """The block of Table 1: derived where sympy is installed, else the one that is there."""
    try:
        from upge.theory.symbolic import table1_latex
    except ImportError:
        before = re.search(f"{re.escape(TABLE_BEGIN)}.*?{re.escape(TABLE_END)}", previous, re.DOTALL)
        return before[0] if before else f"{TABLE_BEGIN}\n{TABLE_END}"
    return "\n".join([TABLE_BEGIN, *_block("latex", table1_latex()), TABLE_END])


def _algorithm(name: str) -> list[str]:
    """A section: what it is, paper, formula, choices, needs, keys."""
    algorithm, said = algorithms.load(name), catalogue.words(name)
    lines = [
        f"## {name}",
        "",
        f"{_sentence(algorithm.description)} {_papers(said.papers)}".rstrip(),
        "",
        *_quote(said.what),
        "",
    ]
    lines += [*_block("", algorithm.formula()), "", *_block("math", _rows_of_latex(algorithm.formula("latex"))), ""]
    rest = "\n".join(text for text in (said.textbook, said.choices) if text)
    lines += [*_quote(rest), ""] if rest else []
    lines += ["Needs:", "", *(f"- **{need}**: {how}" for need, how in catalogue.needs(algorithm).items()), ""]
    return [*lines, f"Keys, to be added to `python -m experiments.run algo={name}`:", "", *_block("", _keys(name)), ""]


def _correction(name: str) -> list[str]:
    """A section: what it does, paper, choices, and what it makes of an algorithm that can take it."""
    said = catalogue.words(name, algorithms.CORRECTIONS)
    lines = [
        f"### correction {name}",
        "",
        f"{_sentence(listing.correction_description(name))} {_papers(said.papers)}",
        "",
    ]
    lines += [*_quote(said.what), "", *_quote(said.choices), ""]
    lines += ["On `grpo`:", "", *_block("", algorithms.load("grpo", corrections=[name]).formula()), ""]
    own = [line for line in _keys("grpo", name).splitlines() if line.startswith(f"{algorithms.CORRECTION}.")]
    return [*lines, "Its settings:", "", *_block("", "\n".join(own)), ""]


def _keys(name: str, *corrections: str) -> str:
    lines = []
    for key, value, followed in catalogue.keys(name, corrections):
        shown = f"{key}={value}" if not value.startswith("${") else key
        lines.append(f"{shown}   # follows {followed}" if followed else shown)
    return "\n".join(lines)


def _papers(papers: tuple[str, ...]) -> str:
    return " ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def _block(language: str, text: str) -> list[str]:
    return [f"```{language}", text, "```"]


def _quote(text: str) -> list[str]:
    """A file's own words, line by line as they stand there."""
    return _block("text", text)


def _rows_of_latex(text: str) -> str:
    return r"\begin{gathered}" + "\n" + text + "\n" + r"\end{gathered}" if r"\\" in text else text
