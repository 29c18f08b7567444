"""What is written for people is true: the generated table, the help, the examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

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


def test_commands_in_the_docs_compose():
    """Every `python -m experiments.run` line names keys that exist."""
    actual = 0
    for path in ("README.md", "docs/running.md"):
        for block in blocks(path, ""):
            for line in block.splitlines():
                line = line.split("#")[0].strip()
                if "experiments.run " in line and "--help" not in line and "my_parts" not in line:
                    arguments = shlex.split(line.split("experiments.run ")[1])
                    config.compose([a for a in arguments if a != "--dry-run"])
                    actual += 1
    assert actual >= 4


def test_public_names_are_exported():
    assert all(hasattr(upge, name) for name in upge.__all__)
    for name in ("NoMask", "PPOClip", "SequenceClip", "ImportanceBand", "UnifiedGradient", "PassRateTable", "GAE"):
        assert name in upge.__all__
