"""Table 1 comes out of the derivation, and the page that shows it is current."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sympy as sp
from sympy import Rational

import upge
from experiments.table1 import ADVANTAGE, OLD, RATIO, STATEMENTS, THETA, readings
from experiments.table1 import __main__ as table1

ROOT = Path(__file__).parents[2]


def test_table_1_is_the_papers():
    """What is derived is the paper's row, π_ref and the gradient Â·f′/π_ref; for CISPO below the bound alone."""
    gamma = Rational(1, 10)
    expected = {
        "SFT": (THETA, 1 / THETA),
        "PPO": (OLD, ADVANTAGE / OLD),
        "GRPO": (OLD, ADVANTAGE / OLD),
        "REINFORCE": (THETA, ADVANTAGE / THETA),
        "CISPO": (OLD, ADVANTAGE / OLD),
        "GSPO": (THETA / RATIO, ADVANTAGE * RATIO / THETA),
        "SRFT (offline)": (sp.Integer(1), ADVANTAGE),
        "LUFFY (offline)": (sp.Integer(1), ADVANTAGE * gamma / (THETA + gamma) ** 2),
    }
    assert [method.name for method in table1.METHODS] == list(expected)
    for method in table1.METHODS:
        first, *others = readings(method)
        reference, gradient = expected[method.name]
        assert sp.simplify(first.reference - reference) == 0 and sp.simplify(first.gradient - gradient) == 0
        if method.name == "CISPO":
            assert [r.where for r in (first, *others)] == ["r < 5", "r > 5"]
            assert sp.simplify(others[0].reference - THETA / 5) == 0 and others[0].gradient == 5 * ADVANTAGE / THETA
        else:
            stopped = [r.gradient for r in others]
            assert stopped == ([0] if "1[" in method.part.estimator.mask.formula().text else [])


@pytest.mark.slow
def test_the_page_is_the_generated_one():
    text = table1.PAGE.read_text("utf-8")
    assert table1.updated(text) == text, "run python -m experiments.table1 --docs"
    assert "| NO |" not in text and text.count("| yes |") == len(STATEMENTS)
    with pytest.raises(upge.ConfigError, match="missing"):
        table1.updated("nothing")


def test_the_examples_on_the_page_run():
    (code,) = re.findall(r"```python\n(.*?)```", table1.PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "docs/table1.md", "exec"), names)
    assert code.count("\nassert ") == 2 and callable(names["objective"])


def test_latex_is_well_formed(tmp_path):
    """Compiled where there is a LaTeX, and looked through in any case."""
    source = table1.table1_latex()
    assert not re.search(r"[^\x00-\x7f]", source), "everything outside ASCII needs a command"
    rows = [line for line in source.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(table1.METHODS) + 1 and all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)
    depth = 0
    for character in source.replace(r"\{", "").replace(r"\}", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0 and all(line.count("$") % 2 == 0 for line in source.splitlines() if line.endswith(r"\\"))
    assert source.count(r"\left") == source.count(r"\right")
    assert re.findall(r"\\begin{(\w+)}", source) == list(reversed(re.findall(r"\\end{(\w+)}", source)))
    compiler = next(filter(None, map(shutil.which, ("pdflatex", "xelatex", "lualatex", "tectonic"))), None)
    if compiler:
        head = r"\documentclass{article}\usepackage{amsmath,amssymb,booktabs}\begin{document}"
        (tmp_path / "table.tex").write_text(f"{head}\n{source}\n\\end{{document}}\n")
        options = [] if compiler.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
        done = subprocess.run([compiler, *options, "table.tex"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


def test_the_command(capsys):
    assert table1.main(["--latex"]) == 0 and r"\toprule" in capsys.readouterr().out
    assert table1.main([]) == 0 and "| GSPO | π_θ/s |" in capsys.readouterr().out
    assert table1.main(["--nothing"]) == 2 and "give --docs" in capsys.readouterr().err


def test_sympy_is_loaded_by_the_symbolic_part_alone():
    """Torch may load sympy by itself, so it is the package's own imports that are looked at."""
    sources = (ROOT / "upge").rglob("*.py")
    importing = [path for path in sources if re.search(r"^(import|from) sympy", path.read_text(), re.MULTILINE)]
    assert importing and {path.parent.name for path in importing} == {"symbolic"}
    code = "import sys, upge, upge.theory; assert 'upge.theory.symbolic' not in sys.modules; upge.theory.symbolic.prove"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
