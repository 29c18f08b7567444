"""What each part of the code may know: names, imports, sizes, docstrings, and shapes that are what they say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import algorithms

ROOT = Path(__file__).parents[2]
UPGE = sorted((ROOT / "upge").rglob("*.py"))
FIELD = """
    sft reinforce reinforce++ grpo dr_grpo hpt dapo gspo cispo sapo gmpo ppo dpo ipo kto simpo orpo rloo luffy srft
    chord relift prefix_rft uft rft dft iw_sft superrl opmd asymre rl_plus amft remax raft expert_iteration trpo awr
    iql bread llds vespo
"""
NAMES = sorted({*FIELD.split(), *algorithms.names()} - {"real"})  # a word that the package also needs
#: The folders of this project with code, tests included.
PACKAGES = ("upge", "algorithms", "experiments", "examples", "tests")
#: Everything that only an engine, a trainer, a verifier or a report may load.
HEAVY = ("deepspeed", "vllm", "transformers", "math_verify", "matplotlib")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
    return modules


# Names.


@pytest.mark.parametrize("path", UPGE, ids=module_of)
def test_no_algorithm_is_named_in_the_package(path):
    """Trainer, kernels and engines see terms, parts and what these declare, never which algorithm runs.

    Neither as a word nor as a part of a name with underscores; a component such as PPOClip has its own name.
    """
    words = "|".join(re.escape(name) for name in NAMES)
    actual = [
        f"line {number}: {match.group()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in re.finditer(rf"(?<![^\W_])({words})(?![^\W_])", line, re.IGNORECASE)
    ]
    assert not actual, actual


# Imports. The layers and the absence of circles are checked by import-linter: `make lint`, pyproject.toml.


@pytest.mark.parametrize("path", UPGE, ids=module_of)
def test_the_package_knows_no_test(path):
    assert "tests" not in {module.split(".")[0] for module in imports(path)}


def test_algorithms_import_only_the_package():
    for path in (ROOT / "algorithms").rglob("*.py"):
        used = {module.split(".")[0] for module in imports(path)}
        assert used - set(sys.stdlib_module_names) <= {"algorithms", "upge", "omegaconf"}, used


@pytest.mark.parametrize("statement", ["import upge", "import upge, algorithms; algorithms.load('hpt').formula()"])
def test_importing_the_package_loads_nothing_heavy(statement):
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "torch" in loaded and not loaded & set(HEAVY)


# Sizes and docstrings.


@pytest.mark.parametrize("folder", ["upge", "algorithms", "experiments", "examples", "tests"])
def test_files_are_short(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths and not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400}


@pytest.mark.parametrize("path", UPGE, ids=module_of)
def test_what_is_public_has_a_docstring(path):
    public = [
        node
        for node in tree(path).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare and (not public or ast.get_docstring(tree(path))), bare or "the module has no docstring"


@pytest.mark.parametrize("path", UPGE, ids=module_of)
def test_functions_fit_on_a_screen(path):
    """Fifty lines beside the docstring."""
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {}
    for function in functions:
        first = function.body[0]
        explained = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
        lengths[function.name] = function.end_lineno - function.lineno + 1 - explained
    assert not {name: length for name, length in lengths.items() if length > 50}


# Shapes.

CHECKED = """
import jaxtyping
parts = ("components", "views", "trajectories", "estimator", "gates", "reduction", "regularizers", "term", "plan",
         "algorithm", "estimate", "testing", "checks", "formula", "logprobs", "support", "candidates")
jaxtyping.install_import_hook([f"upge.{part}" for part in parts], "beartype.beartype")
import torch
import upge
from upge.views import masked_mean
from tests import compositions
from tests.policy import sample, with_distributions
from tests.upge.testing.test_conformance import SHIPPED

for name in compositions.ALL:
    s = with_distributions(sample(0, groups=3, pairs=name == "dpo"), 0)
    compositions.load(name).estimate(s.batch).loss.backward()
    assert s.logits.grad.isfinite().all() and s.logits.grad.abs().max() > 0
for part in SHIPPED:
    upge.testing.check_component(part)
hidden, head, tokens = torch.randn(5, 4), torch.randn(7, 4), torch.randint(0, 7, (5,))
upge.logprobs.token_logprobs(hidden, head, tokens)

try:
    masked_mean(torch.zeros(3), torch.ones(3, dtype=torch.bool))
except jaxtyping.TypeCheckError:
    print("checked", len(compositions.ALL), len(SHIPPED))
"""


@pytest.mark.slow
def test_shape_annotations_are_true():
    """Every algorithm's gradient and every part, with the annotations of the core checked at run time."""
    pytest.importorskip("beartype")
    done = subprocess.run([sys.executable, "-c", CHECKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("checked "), "the hook must have been in place: a wrong shape went through"


def test_every_name_that_a_file_imports_from_the_project_exists():
    """Also inside of functions, which the linters do not follow and some of which run only in a continued run."""
    missing = []
    for path in sorted(p for p in ROOT.rglob("*.py") if p.parts[len(ROOT.parts)] in PACKAGES):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in PACKAGES:
                continue
            assert node.level == 0 and node.module is not None
            if node.module.startswith("tests.gpu_stack"):
                continue  # it imports packages that the CPU set does not have
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names if alias.name != "*"):
                if not hasattr(module, name) and importlib.util.find_spec(f"{node.module}.{name}") is None:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{name}")
    assert not missing
