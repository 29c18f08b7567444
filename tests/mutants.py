"""Plant known bugs, one at a time, and check that the tests notice them.

    python -m tests.mutants [--check] [NAME ...]

Each mutant of mutant_table.py and mutant_table_steps.py changes one place of a copy of this tree and names the tests
that must fail. Without names all are planted.
The result of each is one of

    killed      a test failed: the bug is noticed
    survived    every test passed
    stale       the mutant no longer matches the code or the tests; see `problem`
    broken      pytest could not run the tests, for example because the changed code cannot be imported

The exit code is 0 if all are killed, 2 for an unknown name, and else 1. Nothing is planted if a mutant is stale. The
tests must pass without a mutant, which is checked first. `--check` only looks for stale mutants and takes seconds.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import mutant_table, mutant_table_steps
from tests.mutant_table import Mutant

MUTANTS = (*mutant_table.MUTANTS, *mutant_table_steps.MUTANTS)
ROOT = Path(__file__).parent.parent
#: Folders that no test of the table reads.
LEFT_OUT = ("runs", "evals", "sweeps", "diagnoses", "build", "__pycache__", "*.egg-info")
#: What pytest printed last, in the copy.
LOG = "pytest.log"
#: The packages of this tree.
OWN = ("upge", "algorithms", "experiments", "tests")


def copy_tree(target: Path) -> None:
    """Copies this tree without hidden folders, such as the environment, and without what runs write."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", *LEFT_OUT))


def run_tests(tree: Path, tests: Sequence[str]) -> int:
    """Runs tests in a copy of the tree until the first fails; returns pytest's exit code."""
    # Importing the libraries takes longer than most tests; a fork has them imported already.
    import deepspeed  # noqa: F401
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401

    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, tests))
    child.start()
    child.join()
    return child.exitcode


def _pytest(tree: Path, tests: Sequence[str]) -> None:
    """In a process of its own: forgets this tree, runs pytest in the copy and ends the process."""
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    # Bytecode is found by time and size of its source, which a mutant may have in common with the original.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    os.chdir(tree)
    with open(tree / LOG, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Libraries that are plugins of pytest were imported before it could rewrite their assertions.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code: int = pytest.ExitCode.INTERNAL_ERROR
    try:
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def problem(mutant: Mutant) -> str | None:
    """Why a mutant cannot be planted in this tree, or None."""
    path = ROOT / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times; the text must be there once"
    try:
        ast.parse(text.replace(mutant.old, mutant.new))
    except SyntaxError as error:
        return f"{mutant.file} is not valid Python with {mutant.new!r}: {error}"
    for test in mutant.tests:
        file, _, function = test.partition("::")
        source = (ROOT / "tests" / file).read_text() if (ROOT / "tests" / file).is_file() else ""
        if f"def {function.partition('[')[0]}" not in source:
            return f"there is no test tests/{test}"
    return None


def result_of(mutant: Mutant, tree: Path) -> str:
    """Plants a mutant in the copied tree, runs its tests and takes it out again."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        result = {0: "survived", 1: "killed"}.get(run_tests(tree, mutant.tests), "broken")
        if result == "broken":
            print((tree / LOG).read_text()[-4000:], file=sys.stderr)
        return result
    finally:
        path.write_text(original)


def main(names: Sequence[str]) -> int:
    """Plants the named mutants, or all, or only checks them; returns the exit code."""
    only_check, names = "--check" in names, [name for name in names if name != "--check"]
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        known = "\n  ".join(mutant.name for mutant in MUTANTS)
        print(f"unknown: {', '.join(sorted(unknown))}; the mutants are\n  {known}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    problems = {mutant.name: text for mutant in chosen if (text := problem(mutant))}
    for name, text in problems.items():
        print(f"stale     {name}: {text}; adapt its table", file=sys.stderr)
    if problems or only_check:
        print(f"{len(problems)} of {len(chosen)} stale")
        return int(bool(problems))
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / ROOT.name
        copy_tree(tree)
        if run_tests(tree, sorted({test for mutant in chosen for test in mutant.tests})):
            print((tree / LOG).read_text()[-4000:], file=sys.stderr)
            print("a test fails, or cannot be run, without any mutant; fix it first", file=sys.stderr)
            return 1
        results = []
        for mutant in chosen:
            began = time.perf_counter()
            results.append(result_of(mutant, tree))
            print(f"{results[-1]:9} {mutant.name:42} {time.perf_counter() - began:5.0f} s", flush=True)
    print(f"{results.count('killed')} of {len(results)} killed")
    return int(set(results) != {"killed"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
