"""What is written for people is true: the generated table, the help, the examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import algorithms
import upge
from experiments import config, describe
from experiments.help import help_text
from upge.train.config import meanings

ROOT = Path(__file__).parent.parent


def blocks(path: str, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_readme_table_is_the_generated_one():
    text = describe.README.read_text()
    assert describe.renewed(text) == text, "run python -m experiments.describe --readme"


def test_help_names_everything():
    text = help_text()
    for group in config.GROUPS:
        assert all(name in text for name in config.presets(group))
    assert all(f"{key}=" in text and meaning.split()[0] in text for key, _, meaning in meanings())
    assert max(map(len, text.splitlines())) <= 150


def test_describe_prints_each_algorithm(capsys):
    for name in algorithms.names():
        assert describe.main([f"algo={name}"]) == 0
        assert algorithms.load(name).formula() in capsys.readouterr().out
    assert describe.main(["algo=nothing"]) == 2 and "no algorithm" in capsys.readouterr().err


def test_examples_of_own_parts_run_and_conform(tmp_path):
    """The files shown in README.md and docs/components.md, used by _target_ as they are."""
    for path, override in (("README.md", "mask"), ("docs/components.md", "advantage")):
        (source,) = [b for b in blocks(path, "python") if "@dataclass" in b]
        assert len(source.splitlines()) <= 15
        (tmp_path / "my_parts.py").write_text(source)
        (name,) = re.findall(r"class (\w+)\(", source)
        code = (
            "import algorithms, upge, my_parts\n"
            f"upge.testing.check_component(my_parts.{name}())\n"
            f"algo = algorithms.load('grpo', ['terms.rl.estimator.{override}={{_target_: my_parts.{name}}}'])\n"
            "upge.testing.check_algorithm(algo)\n"
            f"assert type(algo.terms['rl'].estimator.{override}).__name__ == '{name}'\n"
        )
        environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_commands_in_the_docs_compose():
    """Every `python -m experiments.run` line names keys that exist."""
    found = 0
    for path in ("README.md", "docs/running.md"):
        for block in blocks(path, ""):
            for line in block.splitlines():
                line = line.split("#")[0].strip()
                if "experiments.run " in line and "--help" not in line and "my_parts" not in line:
                    arguments = shlex.split(line.split("experiments.run ")[1])
                    config.compose([a for a in arguments if a != "--dry-run"])
                    found += 1
    assert found >= 4


def test_public_names_are_exported():
    assert all(hasattr(upge, name) for name in upge.__all__)
    for name in ("NoMask", "PPOClip", "SequenceClip", "ImportanceBand", "UnifiedGradient", "PassRateTable", "GAE"):
        assert name in upge.__all__
