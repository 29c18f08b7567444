"""requirements/install.sh, with a stand-in for Python that notes what it is asked to do instead of doing it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = ("VENV", "PYTHON", "ENGINE", "TORCH_INDEX")
PYTHON = """#!/usr/bin/env bash
# Answers the probe with its version, makes environments that hold a copy of itself, and notes every pip call.
case "$1 $2" in
    "-c import ensurepip"*) echo "VERSION HERE" ;;
    "-c import sys; print"*) echo "HERE" ;;
    "-c import torch"*) echo "2.13.0+cpu" ;;
    "-m venv") mkdir -p "$4/bin" && cp HERE "$4/bin/python" && touch "$4/pyvenv.cfg" && echo venv >>calls ;;
    "-m pip") echo "pip ${*: -1}" >>calls; [[ ! -e broken ]] || { echo "no such package"; exit 1; } ;;
    *) exit 9 ;;
esac
"""


class Tree:
    """A copy of what the script reads, and the calls it makes there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copy(ROOT / "setup.py", folder)

    def python(self, name: str, version: str) -> Path:
        path = self.folder / name
        path.write_text(PYTHON.replace("HERE", str(path)).replace("VERSION", version))
        path.chmod(0o755)
        return path

    def make(self, **settings: object) -> tuple[int, str, list[str]]:
        """Exit code, what was said and the calls of one run of the script."""
        (self.folder / "calls").unlink(missing_ok=True)
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        done = subprocess.run(
            ["bash", "requirements/install.sh"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=plain | {key: str(value) for key, value in settings.items()},
        )
        calls = self.folder / "calls"
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_made_once_and_again_only_when_the_requirements_change(tree: Tree) -> None:
    python = tree.python("python-a", "3.11.7")
    code, said, calls = tree.make(PYTHON=python)
    assert code == 0 and ".venv is missing" in said and "is ready (cpu set, Python 3.11.7, torch 2.13.0+cpu)" in said
    assert calls == ["venv", "pip setuptools==78.1.1", "pip torch==2.13.0", "pip requirements/cpu.txt", "pip ."]

    (tree.folder / "upge").mkdir()
    (tree.folder / "upge" / "new.py").touch()
    (tree.folder / "setup.py").touch()
    code, said, calls = tree.make(PYTHON=python)
    assert (code, calls) == (0, []) and "up to date" in said
    assert tree.make()[2] == [], "the Python it was made with is remembered"

    with open(tree.folder / "requirements" / "cpu.txt", "a") as pins:
        pins.write("another==1.0\n")
    code, said, calls = tree.make(PYTHON=python)
    assert code == 0 and "requirements/cpu.txt" in said
    assert "venv" not in calls and "pip requirements/cpu.txt" in calls
    assert tree.make(PYTHON=python)[2] == []


def test_another_python_or_set_makes_it_anew(tree: Tree) -> None:
    tree.make(PYTHON=tree.python("python-a", "3.11.7"))
    other = tree.python("python-b", "3.12.1")
    code, said, calls = tree.make(PYTHON=other)
    assert code == 0 and "another Python" in said and calls[0] == "venv"
    code, said, calls = tree.make(PYTHON=other, ENGINE="gpu")
    assert code == 0 and "holds the cpu set" in said and calls[0] == "venv" and "pip requirements/gpu.txt" in calls
    assert tree.make()[2] == [], "the set is remembered"
    code, said, calls = tree.make(ENGINE="tpu")
    assert (code, calls) == (2, []) and "ENGINE=tpu" in said and "ENGINE=gpu" in said


def test_a_real_python_is_known_by_all_its_names(tree: Tree) -> None:
    modules = tree.folder / "modules"
    (modules / "pip").mkdir(parents=True)
    (modules / "pip" / "__init__.py").touch()
    (modules / "pip" / "__main__.py").write_text("import sys; print(sys.argv[-1], file=open('calls', 'a'))")
    (modules / "torch.py").write_text("__version__ = '2.13.0+cpu'")
    # In an environment this is the interpreter that the environment was made with.
    first = Path(getattr(sys, "_base_executable", sys.executable))
    code, said, calls = tree.make(PYTHON=first, PYTHONPATH=modules)
    assert code == 0 and calls[-1] == ".", said
    for name in (first, first.with_name("python3"), tree.folder / ".venv" / "bin" / "python"):
        if name.exists() and os.path.samefile(name, first):
            assert tree.make(PYTHON=name)[2] == [], name
    code, said, calls = tree.make()
    assert (code, calls) == (0, []) and "up to date" in said


def test_a_failure_shows_the_log_and_leaves_no_stamp(tree: Tree) -> None:
    python = tree.python("python-a", "3.11.7")
    (tree.folder / "broken").touch()
    code, said, calls = tree.make(PYTHON=python)
    assert code == 2 and "no such package" in said and ".venv/install.log" in said and "ready" not in said
    assert calls == ["venv", "pip setuptools==78.1.1"]
    (tree.folder / "broken").unlink()
    code, said, calls = tree.make(PYTHON=python)
    assert code == 0 and "never finished" in said and calls[0] == "venv"


def test_a_moved_tree_is_made_anew(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> None:
    python = tree.python("python-a", "3.11.7")
    tree.make(PYTHON=python)
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(tree.folder, moved, dirs_exist_ok=True)
    tree.folder = moved
    code, said, calls = tree.make(PYTHON=python)
    assert code == 0 and "another folder" in said and calls[0] == "venv"


def test_the_torch_index_is_passed_on(tree: Tree) -> None:
    python = tree.python("python-a", "3.11.7")
    tree.make(PYTHON=python, TORCH_INDEX="https://example.org/cpu")
    log = (tree.folder / ".venv" / "install.log").read_text()
    assert log.count("--extra-index-url https://example.org/cpu torch==2.13.0") == 1
    assert log.count("--no-deps -r requirements/cpu.txt") == 1


@pytest.mark.parametrize("version", [None, "exit 1"])
def test_no_usable_python_is_one_message(tree: Tree, version: str | None) -> None:
    python = tree.folder / "python-a"
    if version:
        python.write_text(f"#!/bin/sh\n{version}\n")
        python.chmod(0o755)
    code, said, calls = tree.make(PYTHON=python)
    assert (code, calls) == (2, []) and str(python) in said and "3.11 or 3.12" in said
    assert not (tree.folder / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tree: Tree) -> None:
    precious = tree.folder / "mine" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("keep")
    code, said, calls = tree.make(PYTHON=tree.python("python-a", "3.11.7"), VENV="mine")
    assert (code, calls) == (2, []) and "mine exists and is not a virtual environment" in said
    assert precious.read_text() == "keep"
