"""The pages of the site that are generated from the code and from files of the root, as Markdown."""

from __future__ import annotations

import re

import algorithms
from experiments import cli
from experiments.describe import __main__ as describe
from experiments.describe import base_of, correction_description, key_lines, members, needs, words
from experiments.grid import markdown_table
from experiments.site import examples, reference
from experiments.site.page import Page, cell, fence, part_link, prose
from experiments.site.results import results_of, sweeps_of
from upge import Algorithm, Pipeline
from upge.train.metric_names import ALWAYS, OF_ROLLOUTS, metric_names

#: The factors of a term in the order of the product: path of the part → what it is called.
FACTORS = {
    "gate": "gate",
    "reduction": "w, the reduction",
    "estimator.mask": "1_stable, the mask",
    "estimator.denominator": "π_ref, the denominator",
    "estimator.advantage": "Â, the advantage",
    "estimator.likelihood": "f′ ∇π_θ, the likelihood",
    "support": "the support",
}
_OVERVIEW = """\
# Algorithms

Each algorithm is a sum of terms, and each term is one product:

```
∇J = Σ_terms Σ_trajectories  gate · w · Σ_t 1_stable · (1/π_ref) · Â · ∇π_θ      (+ regularizers)
```

An algorithm has a page with its formula, its parts, its paper, the choices in which implementations differ, its metrics
and keys, and the results of this repository. [Corrections](corrections.md) change an algorithm, for example for the
difference between sampler and trainer. [From a paper to its command](paper_index.md) lists the same by paper.

"""
_SYMBOLS = """
## Symbols

| symbol | meaning |
|---|---|
| r = π_θ/π_old | importance ratio: current policy over behavior policy |
| s | the same for a response: the geometric mean of its ratios |
| π_ref | the denominator (the paper's name) |
| π_0 | reference policy of KL terms, preference pairs and importance weights |
| ν | the teacher |
| R, P | reward; pass rate of the prompt's rollouts |
| H | entropy of the policy at a token |
| τ~π_old, τ*, τ⁺ and τ⁻ | rollouts, demonstrations, the responses of a preference pair |
| N, Q, n, \\|τ\\| | trajectories, prompts, trajectories of a prompt, tokens of a trajectory |
| subscript `all` | counts the trajectories of all terms (`over: batch`); without it those of the term itself |
| n_kind | only rollouts or only demonstrations of a prompt |
| Σ_v | the product is summed over tokens v of the vocabulary; without it the term moves the sampled token alone |
| 1024 | stands for the response limit of the run, `rollout.max_response_tokens` |
"""


def pages() -> dict[str, Page]:
    """Path on the site → page, of every generated page."""
    made = {"algorithms.md": Page("Overview", _overview()), "corrections.md": Page("Corrections", _corrections())}
    made |= {f"algorithms/{name}.md": Page(name, algorithm_page(name)) for name in algorithms.names()}
    made |= reference.pages() | examples.pages()
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (cli.ROOT / f"{name}.md").read_text("utf-8")
        made[f"{name.lower()}.md"] = Page(name.capitalize(), _from_root(text))
    return made


def _from_root(text: str) -> str:
    """A file of the repository's root as a page: its links into docs/ become links between pages, others text."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = text.replace("](examples/README.md", "](examples/index.md")
    text = re.sub(r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda found: f"]({found[1].lower()}.md", text)
    return re.sub(
        r"\[([^\]]+)\]\((?!https?:|[\w/]+\.md|#)[^)]*\)", r"\1", text.replace("[README](README.md)", "README")
    )


def _overview() -> str:
    rows = []
    for name in algorithms.names():
        terms = [term for _, one in members(algorithms.load(name)) for term in one.terms.values()]
        sources = ", ".join(dict.fromkeys(term.source.replace("_", " ") for term in terms))
        rows.append([f"[`{name}`](algorithms/{name}.md)", algorithms.load(name).description, sources])
    table = markdown_table(["algorithm", "what it is", "learns from"], rows)
    factors = describe.table(link=True)
    factors = re.sub(r"\(#(\w+)\)", r"(algorithms/\1.md)", factors)
    return f"{_OVERVIEW}{table}\n{_SYMBOLS}\n## All factors\n\n{factors}\n"


def algorithm_page(name: str) -> str:
    """The page of an algorithm."""
    algorithm, header = algorithms.load(name), words(name)
    papers = " ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in header.papers)
    lines = [
        f"# {name}",
        "",
        f"{algorithm.description[0].upper()}{algorithm.description[1:].rstrip('.')}. {papers}",
        "",
    ]
    lines += [fence(f"python -m experiments.run algo={name}"), "", "## Formula", ""]
    lines += [fence(algorithm.formula("latex"), "math"), "", "The same as text:", "", fence(algorithm.formula()), ""]
    lines += ["[What the symbols mean](../algorithms.md#symbols).", "", "## What it is", ""]
    lines += [prose("\n\n".join(filter(None, (header.what, header.textbook)))), "", "## Factors", ""]
    for path, one in members(algorithm):
        lines += _factors(path, one)
    if header.choices:
        lines += ["## Choices, and how others differ", "", prose(header.choices), ""]
    lines += ["## What it needs", "", *(f"- **{need}**: {how}" for need, how in needs(algorithm).items()), ""]
    lines += [*_metrics(algorithm), "## Keys", "", "To append to the command:", ""]
    lines += [fence("\n".join(key_lines(name))), ""]
    lines += [*_results(name), "## File", "", f"`algorithms/{name}.yaml`:", ""]
    source = algorithms.find(name).read_text("utf-8")
    # The comment at the top is the text above.
    return "\n".join([*lines, fence(source[source.index("\ndescription:") + 1 :].rstrip(), "yaml"), ""])


def _factors(path: str, one: Algorithm) -> list[str]:
    """A table for each term: its parts, what each computes, and its class with its settings."""
    lines = []
    for name, term in one.terms.items():
        times = "" if term.coefficient == 1 else f", times {term.coefficient:g}"
        lines += [f"Term `{path}terms.{name}`, learns from {term.source.replace('_', ' ')}{times}:", ""]
        rows = [[FACTORS.get(place, place), cell(p.formula().text), part_link(p)] for place, p in term.parts.items()]
        lines += [markdown_table(["factor", "formula", "part"], rows), ""]
    extra = [[f"regularizer `{n}`", cell(r.formula().text), part_link(r)] for n, r in one.regularizers.items()]
    if one.critic is not None:
        extra.append(["critic, minimized separately", cell(one.critic.formula().text), part_link(one.critic)])
    return [*lines, markdown_table(["also", "formula", "part"], extra), ""] if extra else lines


def _metrics(algorithm: Algorithm | Pipeline) -> list[str]:
    """The metrics that other algorithms do not have."""
    own = {}
    for _, one in members(algorithm):
        own |= dict.fromkeys(name for name in metric_names(one) if name not in {*ALWAYS, *OF_ROLLOUTS})
    groups: dict[str, list[str]] = {}
    for name in own:
        first, _, rest = name.rpartition("/")
        groups.setdefault(f"`{first}/`" if first else "", []).append(f"`{rest}`")
    prefixes: dict[str, list[str]] = {}
    for prefix, names in groups.items():
        prefixes.setdefault(", ".join(names), []).append(prefix)
    rows = [[", ".join(same), names] for names, same in prefixes.items()]
    table = markdown_table(["prefix", "metrics"], rows)
    return [
        "## Metrics",
        "",
        "Besides [those of every run](../metrics.md), its lines of metrics.jsonl may have:",
        "",
        table,
        "",
    ]


def _results(name: str) -> list[str]:
    """What docs/results.md measured of it, and the sweeps that have it."""
    lines = ["## Results here", ""]
    for section in results_of(name):
        lines += [f"From [{section.title}](../results.md#{section.anchor}), {section.what}:", "", section.table, ""]
    if len(lines) == 2:
        lines += ["It is in no comparison of [Results](../results.md).", ""]
    if others := sweeps_of(name):
        lines += [f"Sweeps with it: {', '.join(f'`sweep={one}`' for one in others)} ([sweeps](../sweep.md)).", ""]
    return lines


def _corrections() -> str:
    """All corrections, each with an algorithm that it applies to."""
    text = describe.CORRECTIONS.replace("## Corrections", "# Corrections", 1)
    text = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", text)
    names = algorithms.corrections()
    rows = [[f"[`{name}`](#{name})", correction_description(name)] for name in names]
    return "\n".join([text, markdown_table(["correction", "what it does"], rows), "", *map(_correction, names)])


def _correction(name: str) -> str:
    header, base = words(name, algorithms.CORRECTIONS), base_of(name)
    papers = " ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in header.papers)
    text = "\n\n".join(filter(None, (header.what, header.textbook, header.choices)))
    algorithm = algorithms.load(base, corrections=[name])
    own = [line for line in key_lines(base, name) if line.startswith(f"{algorithms.CORRECTION}.")]
    lines = [f"## {name}", "", f"{correction_description(name)}. {papers}", "", prose(text), ""]
    lines += [
        f"On [`{base}`](algorithms/{base}.md):",
        "",
        fence(f"python -m experiments.run algo={base} correction={name}"),
        "",
    ]
    lines += [fence(algorithm.formula("latex"), "math"), "", fence(algorithm.formula()), ""]
    return "\n".join([*lines, *(["Its settings:", "", fence("\n".join(own)), ""] if own else [])])
