"""Right answers are right: ground truths and worked solutions of real data sets, and the program that checks them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments import check_answers
from tests.verify_pools import ROOT, boxed
from upge.errors import ConfigError, DataError
from upge.verify import Item, Verdict

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "math").exists(), reason="the data sets are not here")
ROWS = {
    "gsm8k.jsonl": [
        {"question": "3+4?", "answer": "3+4=7\n#### 7"},
        {"question": "A grand?", "answer": "10*100\n#### 1,000"},
    ],
    "math.json": [
        {"problem": "p", "solution": r"so \boxed{\frac12}.", "answer": r"\frac{1}{2}"},
        {"problem": "p", "solution": r"so \boxed{3}.", "answer": "2"},
        {"problem": "p", "solution": "so 3", "answer": "3"},
        {"problem": "p", "solution": r"\boxed{3}", "answer": ""},
        {"problem": "p", "solution": r"\boxed{3}", "answer": r"\frac{3"},
        {
            "problem": "p",
            "solution": r"\boxed{\begin{pmatrix} 1 \\ \frac{1}{2} \end{pmatrix}}",
            "answer": r"\begin{pmatrix}1\frac{1}{2}\end{pmatrix}",
        },
    ],
    "openr1.json": [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "target": [{"role": "assistant", "content": r"\boxed{5}"}],
            "reward_model": {"ground_truth": "5"},
        }
    ],
    "choice.jsonl": [{"prompt": "Which?\nA) 1\nB) 2", "answer": "B"}, {"prompt": "Which?\n1) 5\n2) 6", "answer": "2"}],
    "plain.json": [{"prompt": "B?", "answer": "B"}, {"prompt": "4?", "answer": 4.0}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files in every layout."""
    for name, rows in ROWS.items():
        lines = [json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) if name.endswith("jsonl") else f"[{','.join(lines)}]")
    return tmp_path


def test_what_is_checked_and_why_it_fails(folder: Path) -> None:
    results = check_answers.check(check_answers.find([f"folder={folder}"]))
    counts = {r.name: (len(r.cases), len(list(r.failures()))) for r in results}
    assert counts.pop("math.json") == (12, 7)
    assert counts == {"choice.jsonl": (2, 0), "gsm8k.jsonl": (10, 0), "openr1.json": (2, 0), "plain.json": (2, 0)}
    assert {case.item.verifier for r in results for case in r.cases if r.name == "choice.jsonl"} == {"choice"}
    (math,) = [result for result in results if result.name == "math.json"]
    assert [(case.row, case.what, check_answers.reason(case, v)) for case, v in math.failures()] == [
        (2, "solution", "ground truth and answer differ"),
        (3, "solution", "no answer was found"),
        (4, "ground truth", "the ground truth is empty"),
        (4, "solution", "the ground truth is empty"),
        (5, "ground truth", "the braces of the ground truth do not match"),
        (5, "solution", "the braces of the ground truth do not match"),
        (6, "solution", "the ground truth has lost a separator of rows"),
    ]
    late = check_answers.Case(1, "solution", Item(boxed("5"), "5"))
    assert check_answers.reason(late, Verdict(0.0, "timeout", "not done after 30 s", "5")) == "not done after 30 s"
    table = check_answers.report(results)
    assert "| math.json | solution | `math` | 1 | 6 |" in table
    assert "| math.json, 2 | solution | `2` | `3` | ground truth and answer differ |" in table


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.json").write_text('[{"text": "a"}]')
    (folder / "broken.jsonl").write_text('{"prompt": ')
    for arguments, message in {
        (): "no data file is named",
        ("nothing.json",): "there is no file 'nothing.json'",
        (f"folder={folder}/none",): "there is no folder",
        (str(folder / "odd.json"),): "found the columns text; known are: question, answer;",
        (str(folder / "broken.jsonl"),): "cannot be read (JSONDecodeError",
    }.items():
        assert check_answers.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(DataError):
        check_answers.read(folder / "odd.json")
    with pytest.raises(ConfigError, match="are missing; put them where the tables go"):
        check_answers.updated("a page", [])


def test_the_page_is_renewed_between_its_markers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = f"before\n{check_answers.BEGIN}\nold\n{check_answers.END}\nbehind"
    results = check_answers.check(check_answers.find([str(folder / "plain.json")]))
    new = check_answers.updated(page, results)
    assert new.startswith("before\n") and new.endswith("\nbehind")
    assert "| plain.json | ground truth | `math` | 2 | 2 |" in new and "\nold\n" not in new
    assert check_answers.updated(new, results) == new
    assert check_answers.main([str(folder / "plain.json")]) == 0
    assert "| plain.json | ground truth | `math` | 2 | 2 |" in capsys.readouterr().out


@needs_data
def test_a_sample_of_the_real_ground_truths_and_solutions() -> None:
    files = {name: DATA / name for name in ("eval/aime24.json", "eval/amc12_83.jsonl", "eval/amc23.json")}
    cases = [case for path in files.values() for case in check_answers.read(path)]
    for name in ("gsm8k/test.jsonl", "math/train.parquet", "math/openr1_layout.parquet", "eval/arc_challenge.jsonl"):
        cases += check_answers.read(DATA / name)[::40]
    with check_answers.VerifierPool(("math", "math_last", "number", "choice"), time_limit=30.0) as pool:
        verdicts = pool.score(case.item for case in cases)
    wrong = [(case.item.answer, v) for case, v in zip(cases, verdicts, strict=True) if v.reward != 1.0]
    assert len(cases) > 500 and wrong == []


@needs_data
@pytest.mark.slow
def test_every_real_ground_truth_and_solution_as_the_page_tells() -> None:
    results = check_answers.check(check_answers.find([f"folder={DATA}"]))
    page = check_answers.PAGE.read_text("utf-8")
    assert check_answers.updated(page, results) == page, "run python -m experiments.check_answers folder=DIR --docs"
    failed = [(result.name, case, verdict) for result in results for case, verdict in result.failures()]
    assert {name for name, _, _ in failed} == {"math/train.parquet"}
    solutions = [case.row for _, case, _ in failed if case.what == "solution"]
    assert len(solutions) <= 12, "99 % of 7500 would be 75"
    assert {case.row for _, case, _ in failed} == set(solutions)
    # What is written by hand below the tables names each of them.
    told = page.partition(check_answers.END)[2]
    assert {int(row) for row in re.findall(r"\b\d{4}\b(?=[,:])", told)} == set(solutions)


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    source = check_answers.PAGE.read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    (own,) = [block for block in blocks if "class Palindrome" in block]
    (use,) = [block for block in blocks if "VerifierPool(" in block]
    names: dict = {}
    exec(own, names)
    verifier = names["Palindrome"]()
    assert [verifier("abc\nabcba", "a"), verifier("abcba", "x"), verifier("ab", "a"), verifier("", "a")] == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="is empty"):
        verifier.check_answer("")
    exec(use, {})
    assert capsys.readouterr().out == "1.0 (C)\n"
