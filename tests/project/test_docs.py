"""What is written for people is true: the generated table, the help, the examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import algorithms
import upge
from experiments import config
from experiments.describe import __main__ as describe
from experiments.describe import keys, papers, words
from experiments.run.__main__ import help_text
from upge.config import meanings
from upge.train.config import RunConfig

ROOT = Path(__file__).parents[2]


def blocks(path: str, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_readme_table_is_the_generated_one():
    text = describe.README.read_text()
    assert describe.updated(text) == text, "run python -m experiments.describe --readme"


def test_readme_names_the_sources_of_each_algorithm():
    sources = {row.split("`")[1]: row.split(" | ")[2] for row in describe.short_table().splitlines()[2:]}
    assert sources["uft"] == "rollouts, demonstrations"
    known = {"rollouts", "demonstrations", "preference pairs", "all"}
    assert set(", ".join(sources.values()).split(", ")) <= known


def test_help_names_everything():
    text = help_text(everything=True)
    for group in config.GROUPS:
        assert all(name in text for name in config.presets(group))
    assert all(f"{key}=" in text and meaning.split()[0] in text for key, _, meaning in meanings(RunConfig))
    assert max(map(len, text.splitlines())) <= 150


def test_algorithms_page_is_the_generated_one():
    text = describe.PAGE.read_text("utf-8")
    assert describe.page() == text, "run python -m experiments.describe --docs"


def test_paper_index_is_the_generated_one():
    text = papers.PAGE.read_text("utf-8")
    assert papers.page() == text, "run python -m experiments.describe --docs"
    named = {paper for name in algorithms.names() for paper in words(name).papers}
    assert all(f"https://arxiv.org/abs/{paper}" in text for paper in named)


def test_algorithms_page_has_a_section_for_everything_with_its_paper():
    text = describe.PAGE.read_text("utf-8")
    for name in algorithms.names():
        (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
        assert f"(#{name})" in text and algorithms.load(name).formula() in section
        papers = words(name).papers
        assert papers and all(f"https://arxiv.org/abs/{paper}" in section for paper in papers)
        assert re.search(r"^- \*\*(rollouts|demonstrations|preference pairs)\*\*: ", section, re.MULTILINE)
    for name in algorithms.corrections():
        assert f"\n### correction {name}\n" in text and f"(#correction-{name})" in text


def test_every_key_of_the_page_is_one():
    """What is listed may be given as it stands; what follows another key follows one that is listed."""
    for name in algorithms.names():
        listed = keys(name)
        plain = algorithms.load(name)
        followed = {key: target for key, _, target in listed if target}
        same = [f"{key.removeprefix('algo.')}={value}" for key, value, _ in listed if key not in followed]
        assert same and algorithms.load(name, same) == plain
        known = {key for key, *_ in listed}
        for key, target in followed.items():
            begins = any(k.startswith(f"{target}.") or k == target for k in known)
            of_the_run = target == "seed" or target.startswith("rollout.")
            assert begins or of_the_run or hasattr(part_at(plain, target), "reads"), (key, target)


def part_at(algorithm, key: str):
    return algorithm.parts.get(key.removeprefix("algo."))


def test_describe_prints_each_algorithm(capsys):
    """Formula, factors, paper, the file's own words, needs."""
    for name in algorithms.names():
        assert describe.main([f"algo={name}"]) == 0
        actual, algorithm = capsys.readouterr().out, algorithms.load(name)
        assert algorithm.formula() in actual and algorithm.formula("latex") in actual
        assert all(f"arXiv {paper}" in actual for paper in words(name).papers)
        assert all(line.strip() in actual for line in algorithms.header(algorithms.find(name)).splitlines())
        line = " ".join(actual.split())
        assert all(f" {type(part).__name__}(" in line for path, part in algorithm.parts.items() if "terms." in path)


def test_describe_says_what_the_trainer_must_provide(capsys):
    def printed(*arguments: str) -> str:
        assert describe.main(list(arguments)) == 0
        return " ".join(capsys.readouterr().out.partition("Needs:")[2].partition("LaTeX:")[0].split())

    assert (
        printed("algo=reinforce")
        == "rollouts one or more per prompt micro-batch any cut: each token's factors are its own"
    )
    actual = printed("algo=ppo")
    assert (
        "critic" in actual
        and "reference policy" in actual
        and "reference_logprobs, values of all trajectories" in actual
    )
    assert "group" not in actual
    assert "state: mu begins at 0.8" in printed("algo=amft")
    assert "whenever 128 prompts with 1[P ≤ 0] have gathered, with optimizer moments" in printed("algo=relift")
    assert "preference pairs" in printed("algo=dpo") and "stay together" in printed("algo=dpo")
    assert "a response stays whole" in printed("algo=gspo") and "at least 2 per prompt" in printed("algo=gspo")
    assert "at most 10 times" in printed("algo=dapo")
    assert "sampler's log-probs" in printed("algo=grpo", "correction=tis")
    stages = printed("algo=sft_then_grpo", "correction=mis")
    assert (
        "stages.demonstrate.algorithm: any cut" in stages and "stages.reinforce.algorithm: a response stays" in stages
    )


def test_describe_takes_corrections_and_overrides_and_refuses_the_rest(capsys):
    assert describe.main(["algo=grpo", "correction=[tis,entropy]", "correction.tis.cap=3"]) == 0
    actual = capsys.readouterr().out
    assert "min(π_old/π_sampler, 3)" in actual and "Paper of tis" in actual and "arXiv 1602.01783" in actual
    assert describe.main([]) == 0
    actual = capsys.readouterr().out
    assert all(f"`{name}`" in actual for name in [*algorithms.names(), *algorithms.corrections()])
    for arguments, error in {
        ("algo=nothing",): "no algorithm 'nothing'",
        ("algo=sft", "correction=tis"): "no term that learns from rollouts",
        ("algo=grpo", "steps=3"): "'steps=3': give algo=NAME",
        ("correction=tis",): "also give algo=NAME",
    }.items():
        assert describe.main(list(arguments)) == 2 and error in capsys.readouterr().err


def test_the_example_of_the_readme_runs_and_conforms(tmp_path):
    """Used by _target_ as it is, from the folder that holds it."""
    (source,) = [b for b in blocks("README.md", "python") if "@dataclass" in b]
    assert len(source.splitlines()) <= 15
    (tmp_path / "my_parts.py").write_text(source, "utf-8")
    (name,) = re.findall(r"class (\w+)\(", source)
    code = (
        "import algorithms, upge, my_parts\n"
        f"upge.testing.check_component(my_parts.{name}())\n"
        f"algo = algorithms.load('grpo', ['terms.rl.estimator.mask={{_target_: my_parts.{name}}}'])\n"
        "upge.testing.check_algorithm(algo)\n"
        f"assert type(algo.terms['rl'].estimator.mask).__name__ == '{name}'\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


#: Words of commands that a reader replaces.
PLACEHOLDERS = re.compile(r"\$|\b(NAME|ARGUMENTS|RUN)\b")
#: Without those that are generated from the algorithms, each of which other tests load.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p not in (describe.PAGE, papers.PAGE)),
]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `experiments.run` and `upge run` of a page, in blocks and in sentences."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, body in found if not kind for line in body.replace("\\\n", " ").splitlines()]
    lines += [" ".join(one.split()) for one in re.findall(r"`((?:python -m experiments\.run|upge run) [^`]*)`", text)]
    after = [line.partition(start)[2] for line in lines for start in ("experiments.run ", "upge run ") if start in line]
    return [shlex.split(one, comments=True) for one in after if not PLACEHOLDERS.search(one)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_docs_compose(path, tmp_path, monkeypatch):
    """Every command to train names keys, parts and values that exist; its files are those that the page shows."""
    text = path.read_text("utf-8")
    files = {
        m[1]: m[0] for m in re.finditer(r"(?<=\n)# (\w+\.(?:py|yaml))\n.*?(?=^```$)", text, re.DOTALL | re.MULTILINE)
    }
    if path.name == "README.md":
        (files["my_parts.py"],) = [block for block in blocks("README.md", "python") if "@dataclass" in block]
    for name, source in files.items():
        (tmp_path / name).write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in commands(text):
        if "--help" not in arguments:
            config.compose([a for a in arguments if not a.startswith(("--", "gpus="))])
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)
    assert commands(text) or path.name not in ("README.md", "running.md", "extend.md", "data.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_command_is_left_open(path):
    """A command with an ellipsis fails when it is typed."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0] for kind, body in found if kind in ("", "bash") for line in body.splitlines()]
    starts = tuple(f"{program} " for program in ("python", "upge", "torchrun", "make", "pip"))
    assert not [line for line in lines if line.startswith(starts) and re.search(r"\.\.\.|…", line)]


def test_readme_counts_algorithms_and_corrections():
    text = (ROOT / "README.md").read_text("utf-8")
    assert f"{len(algorithms.names())} algorithms and {len(algorithms.corrections())} corrections" in text


def test_public_names_are_exported():
    assert all(hasattr(upge, name) for name in upge.__all__)
    for name in ("NoMask", "PPOClip", "SequenceClip", "ImportanceBand", "UnifiedGradient", "PassRateTable", "GAE"):
        assert name in upge.__all__
