"""The documentation's site: generated pages are complete, pictures are current, and what the pages show runs."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import algorithms
import upge
from experiments import cli, config
from experiments.describe import words
from experiments.run import __main__ as run
from experiments.site import __main__ as site
from experiments.site import examples, page, pages, pictures, reference, results
from upge.config import Range, meanings
from upge.train.alarms import ALARMS
from upge.train.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: The pages that were written for the site. Other tests execute those of extend.md and library.md.
CONCEPTS = ("index", "slots", "gates", "reductions", "sources")
WRITTEN = [
    *("index.md", "troubleshooting.md", "glossary.md", "site.md"),
    *("howto/index.md", "howto/regularizer.md", "howto/token_reward.md"),
    *(f"concepts/{name}.md" for name in CONCEPTS),
]
#: Added to commands of the pages, so that they take seconds.
SMALL = {"run": ["steps=1", "prompts_per_step=2", "group_size=4", "eval.every=-1", "checkpoint.every=0"],
         "evaluate": ["limit=2"]}  # fmt: skip


def blocks(path: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / path).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [body for kind, body in found if kind == language]


def commands(path: str) -> list[list[str]]:
    """The words of each `python -m experiments.NAME` line in the blocks of a page."""
    lines = [line for block in blocks(path, "") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [one for one in words if one[:2] == ["python", "-m"]]


def modules(path: str) -> dict[str, str]:
    """File name → source of the files that a page shows."""
    found = [(re.match(r"# (\w+\.py)\n", block), block) for block in blocks(path, "python")]
    return {name[1]: block for name, block in found if name}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A folder of a user's own, in which the files of a page are written by calling it with the page."""

    def write(path: str) -> Path:
        for name, source in modules(path).items():
            (tmp_path / name).write_text(source, "utf-8")
        return tmp_path

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield write
    for path in WRITTEN:
        for name in modules(path):
            sys.modules.pop(name.removesuffix(".py"), None)


# What the pages show.


@pytest.mark.parametrize("path", [path for path in WRITTEN if blocks(path, "python")])
def test_python_blocks_run(path, started, capsys):
    started(path)
    for block in blocks(path, "python"):
        if name := re.match(r"# (\w+)\.py\n", block):
            importlib.import_module(name[1])
            continue
        exec(compile(block, path, "exec"), {"__name__": "block"})


@pytest.mark.parametrize("path", [path for path in WRITTEN if commands(path)])
def test_commands_are_accepted(path, started, capsys):
    """Runs compose; other commands are listed."""
    started(path)
    for _, _, module, *arguments in commands(path):
        name = module.removeprefix("experiments.")
        assert name in cli.COMMANDS
        if name == "run" and "--help" not in arguments:
            config.compose(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in WRITTEN if commands(path)])
def test_commands_run(path, started):
    """One after the other, as a reader would type them, with smaller sizes."""
    folder = started(path)
    for number, (_, _, module, *arguments) in enumerate(commands(path)):
        small = [] if "--help" in arguments else SMALL.get(module.removeprefix("experiments."), [])
        if small and not any(a.startswith("output=") for a in arguments) and module == "experiments.run":
            small = [*small, f"output={folder / f'run-{number}'}"]
        environment = {
            "PYTHONPATH": f"{ROOT}:{folder}",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
        }
        command = [sys.executable, "-m", module, *arguments, *small]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t for path in WRITTEN for block in blocks(path, "") for t in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
    }
    assert {"run", "test", "docs-site"} <= named <= targets


#: Arguments → text of a message in docs/troubleshooting.md.
REFUSED = {
    "algo=grp": "algo: no algorithm 'grp'; did you mean 'grpo'?",
    "stepz=3": "stepz: unknown key; did you mean 'steps'?",
    "steps=many": "steps: found 'many' (str), expected int",
    "group_size=1": "group_size: 1 is too small for algo.terms.rl.gate (PassRateAbove), which compares the rollouts of "
    "one prompt",
    "algo=opd": "teacher.path: the algorithm learns from a teacher",
    "algo=grpo algo.terms.rl.estimator.mask.hihg=1": "upge.PPOClip has no setting 'hihg'; did you mean 'high'?",
    "data=table data.path=nothere.jsonl": "data file nothere.jsonl does not exist; check data.path",
    "verify.verifier=nothere": "verify.verifier: found 'nothere': there is no such verifier",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_messages_are_the_real_ones(arguments, started, capsys):
    started("troubleshooting.md")
    assert f"`{REFUSED[arguments]}`" in (DOCS / "troubleshooting.md").read_text("utf-8")
    assert run.main([*arguments.split(), "--dry-run"]) == 2
    assert REFUSED[arguments] in capsys.readouterr().err


def test_other_messages_stand_in_the_sources():
    """The fragments of messages that need another machine or a long run."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    part = text.partition("## The run does not start")[2].partition("## It runs but does not learn")[0]
    quoted = set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)) - set(REFUSED.values())
    files = [path for folder in ("upge", "experiments") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text("utf-8") for path in files)
    missing = [one for one in quoted if re.sub(r"'.*?'", "", one).split("; columns")[0].strip() not in source]
    assert len(quoted) >= 5 and not missing


def test_every_alarm_has_a_fix():
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    assert set(
        re.findall(r"^\| `(\w+)` \|", text.partition("## Alarms")[2].partition("## The doctor")[0], re.MULTILINE)
    ) == set(ALARMS)


# The navigation and the pictures.


def test_every_page_is_in_the_navigation():
    """mkdocs warns about others; here without its packages. Its file has a tag that names a function."""
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = str(yaml.safe_load(text[text.index("\nnav:") :]))
    missing = [p for p in DOCS.rglob("*.md") if f"'{p.relative_to(DOCS).as_posix()}'" not in nav]
    assert not missing


def test_pictures_are_current(tmp_path):
    for path in pictures.draw_all(tmp_path):
        assert path.read_text() == (pictures.FOLDER / path.name).read_text(), "run python -m experiments.site --docs"


# Generated pages.


def test_the_page_of_an_algorithm_is_whole():
    for name in ("hpt", "ppo", "sft_then_grpo"):
        text, algorithm = pages.algorithm_page(name), algorithms.load(name)
        assert algorithm.formula() in text and f"experiments.run algo={name}\n" in text
        assert all(f"https://arxiv.org/abs/{paper}" in text for paper in words(name).papers)
        assert all(f"[`{type(part).__name__}`]" in text for path, part in algorithm.parts.items() if "terms." in path)
        assert "`hpt`" not in text or name == "hpt"
    assert "| HPT | 5 |" in pages.algorithm_page("hpt") and "critic/" in (text := pages.algorithm_page("ppo"))
    assert "critic, minimized separately" in text
    assert "in no comparison" in pages.algorithm_page("real")


@pytest.mark.slow
def test_every_algorithm_and_correction_has_a_page():
    made = pages.pages()
    assert {f"algorithms/{name}.md" for name in algorithms.names()} <= set(made)
    assert all(f"\n## {name}\n" in made["corrections.md"].text for name in algorithms.corrections())
    assert all(f"(algorithms/{name}.md)" in made["algorithms.md"].text for name in algorithms.names())
    for _, found in made.items():
        for line in re.findall(r"^python -m experiments\.run (algo=.*)$", found.text, re.MULTILINE):
            config.compose(shlex.split(line))


def test_every_key_is_listed_with_its_default():
    text = reference.pages()["reference/configuration.md"].text
    for key, default, _ in meanings(RunConfig):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` \| (.*)$", text, re.MULTILINE)
        shown = config.GROUPS.get(key) or page.escaped(reference.shown(default))
        assert row.startswith((f"<code>{shown}</code>", f"`{shown}`")), row
    assert "integer [-1" not in text and "| `group_size` | <code>8</code> | integer [1, 65,536] |" in text


@pytest.mark.parametrize(
    ("bounds", "whole", "text"),
    [
        (Range(), False, ""),
        (Range(minimum=0, maximum=1), False, "[0, 1]"),
        (Range(minimum=0, below=1), False, "[0, 1)"),
        (Range(above=0), False, "(0, ∞)"),
        (Range(above=0, limit=1000), True, "[1, 1,000]"),
        (Range(limit=5), True, "(-∞, 5]"),
    ],
)
def test_a_range_is_an_interval(bounds, whole, text):
    assert reference.interval(bounds, whole) == text


def test_every_public_class_is_on_one_page_of_the_api():
    text = "\n".join(one.text for path, one in reference.pages().items() if path.startswith("reference/api/"))
    for name in upge.__all__:
        if isinstance(cls := getattr(upge, name), type):
            assert text.count(f"::: {cls.__module__}.{cls.__name__}\n") == 1, name


def test_results_are_rows_of_the_results_page():
    text = (DOCS / "results.md").read_text("utf-8")
    sections = list(results.results_of("luffy"))
    assert [one.title for one in sections][:2] == ["The main comparison", "Learning rates"]
    assert all(row in text for one in sections for row in one.table.splitlines())
    assert all("LUFFY" in row for one in sections for row in one.table.splitlines()[2:])


def test_prose_is_shown_literally():
    text = page.prose("a_b *c* `code_d` <e>\n\nNext:\n  key=[x_y]\nend")
    assert text == "a&#95;b &#42;c&#42; `code_d` &lt;e&gt;\n\nNext:\n\n```\nkey=[x_y]\n```\n\nend"


def test_a_page_that_needs_the_network_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://ok.org">x</a><script src="https://bad.org/x.js"></script>')
    (tmp_path / "b.css").write_text("@font-face { src: url(https://fonts.org/f.woff) }")
    assert site.from_network(tmp_path) == ["https://bad.org/x.js", "https://fonts.org/f.woff"]


def test_without_its_packages_one_line_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mkdocs.commands.build", None)
    monkeypatch.setitem(sys.modules, "mkdocs", None)
    assert site.main([]) == 2
    assert "make docs-site" in capsys.readouterr().err


def test_the_set_is_pinned():
    lines = (ROOT / "requirements/docs.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)


def test_examples_are_pages_with_their_output():
    made = examples.pages()
    scripts = {path.stem for path in examples.FOLDER.glob("*.py")} - {"render"}
    assert {*made} == {"examples/index.md", *(f"examples/{name}.md" for name in scripts)}
    text = made["examples/one_estimator.md"].text
    assert text.startswith("# SFT and GRPO are one estimator") and "```python\nimport torch" in text
    assert "textbook" in text.split("```text")[-1], "what the script prints"
    assert made["examples/one_estimator.md"].title == "SFT and GRPO are one estimator"
    index = made["examples/index.md"].text
    assert all(f"]({name}.md)" in index for name in scripts) and ".ipynb)" not in index
