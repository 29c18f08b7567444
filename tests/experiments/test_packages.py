"""A missing optional package: one message that names it and what to install, and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from experiments import cli, packages

ROOT = Path(__file__).resolve().parents[2]
#: Import name → distribution, where they differ by more than - and _.
DISTRIBUTIONS = {"jinja2": "jinja2", "psutil": "deepspeed", "huggingface_hub": "transformers", "numpy": "matplotlib"}
DISTRIBUTIONS |= {"tokenizers": "transformers", "filelock": "gguf"}


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_the_named_extra_installs_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, arguments in packages.INSTALL.items():
        extra = re.fullmatch(r"'upge\[(\w+)\]'", arguments)
        if extra:
            listed = {re.split(r"[\[<>=]", text)[0].replace("-", "_") for text in extras[extra[1]]}
            assert DISTRIBUTIONS.get(package, package) in listed, package
    whole = re.fullmatch(r"upge\[(.*)\]", *extras["all"])[1].split(",")
    assert {text for text in packages.INSTALL.values() if text.startswith("'upge[")} == {
        f"'upge[{extra}]'" for extra in (*whole, "vllm")
    }
    # The extras of users are covered: each distribution is one of the packages, except where the two names differ.
    named = {re.split(r"[\[<>=]", t)[0].replace("-", "_") for e in extras for t in extras[e] if e not in ("all", "dev")}
    assert named <= set(packages.INSTALL)


@pytest.mark.parametrize(
    "error, message",
    [
        (missing("matplotlib.figure"), None),
        (missing("matplotlib"), "the package matplotlib is not installed; run `pip install 'upge[report]'`"),
        (missing("reasoning_gym"), "the package reasoning-gym is not installed; run `pip install 'upge[data]'`"),
        (missing("my_parts"), None),
        (ImportError("cannot import name 'x' from 'matplotlib'", name="matplotlib"), None),
        (ValueError("scipy"), None),
    ],
)
def test_only_a_missing_optional_package_is_explained(error, message, capsys):
    assert packages.explanation(error) == message

    def command(arguments: list[str]) -> int:
        raise error

    if message is None:
        with pytest.raises(type(error)):
            cli.run_command(command, [])
    else:
        assert cli.run_command(command, []) == cli.BAD_INPUT
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_cause_of_an_error_is_explained():
    """A library that raises its own error from the missing import."""
    error = RuntimeError("the tables cannot be drawn")
    error.__cause__ = missing("scipy")
    assert "the package scipy is not installed" in packages.explanation(error)


@pytest.mark.parametrize(
    "start", [["-m", "experiments.table1"], ["-c", "from experiments.cli import main; main()", "table1"]]
)
def test_a_package_that_a_command_imports_at_once_is_explained(start, tmp_path):
    """Before the command's own code runs: under `python -m` and by the program `upge`."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sympy'] = None\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, *start], env=environment, capture_output=True, text=True)
    message = "error: the package sympy is not installed; run `pip install 'upge[theory]'`\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


#: Hides every package that `pip install upge` without extras does not install.
MINIMAL = """
import importlib.machinery as machinery
KEPT = {names}
original = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    spec = original(name, path, target)
    if spec is None or "." in name or name in KEPT:
        return spec
    places = str(spec.origin or list(spec.submodule_search_locations or ()))
    return None if "site-packages" in places else spec
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def required(*names: str) -> set[str]:
    """Distributions that installing these brings with it."""
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another system
                continue
            found.add(name)
            waiting += [re.split(r"[\s;<>=!~\[(]", line)[0] for line in lines if "extra ==" not in line]
    return found


@pytest.mark.parametrize("command", ["run", "evaluate", "report"])
def test_an_installation_without_extras_names_all_of_them(command, tmp_path):
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    distributions = required(*(re.split(r"[<>=]", line)[0] for line in core))
    modules = {m for m, owners in metadata.packages_distributions().items() for o in owners if norm(o) in distributions}
    assert {"torch", "jaxtyping", "omegaconf", "yaml"} <= modules and not {"numpy", "transformers"} & modules
    (tmp_path / "sitecustomize.py").write_text(MINIMAL.format(names=sorted(modules)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    start = [sys.executable, "-c", "from experiments.cli import main; main()", command]
    done = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: the package [\w-]+ is not installed; run `pip install 'upge\[all\]'`\n", done.stderr)


def norm(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
