"""Where the problems of the shipped suites come from: the real files, and a stand-in for the hub."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from experiments.config import suite_config
from tests.evaluating import DATA, SMALL, refused, run
from upge.data import Problem, Splits
from upge.errors import DataError
from upge.evaluation.gpqa import GPQA
from upge.evaluation.suite import SuiteConfig, load

PROBLEMS = {"aime24": 30, "aime25": 30, "amc": 83, "math500": 500, "minerva": 272, "olympiadbench": 674,
            "arc_challenge": 1172}  # fmt: skip

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets")


def settings(name, **changes):
    """A suite's settings, changed."""
    actual = suite_config(name)
    return SuiteConfig(**{**vars(actual), **changes})


@needs_data
def test_the_papers_benchmarks_from_files():
    """All of them, as many as the paper has, each asked for and sampled as there."""
    suite = settings("paper", folder=str(DATA / "eval"), skip=["gpqa_diamond"])
    actual = {one.name: one for one in load(suite)}
    assert {name: len(one.problems) for name, one in actual.items()} == PROBLEMS
    assert {name: one.samples for name, one in actual.items()} == dict.fromkeys(PROBLEMS, 1) | dict.fromkeys(
        ("aime24", "aime25", "amc"), 32)  # fmt: skip
    assert sum(one.responses for one in actual.values()) == 7392 - 198
    assert {name for name, one in actual.items() if one.group == "ood"} == {"arc_challenge"}
    drawn = (suite.temperature, suite.top_p, suite.max_response_tokens)
    assert drawn == (0.6, 0.95, 8192)
    for name, one in actual.items():
        verifier = "choice" if name == "arc_challenge" else "math"
        assert {problem.verifier for problem in one.problems} == {verifier}
        assert all(problem.prompt.strip() and problem.answer.strip() for problem in one.problems)
    arc, request = actual["arc_challenge"].problems, "\nPut the letter or number of the right option in \\boxed{}."
    assert all(f"\n{p.answer}) " in p.prompt and p.prompt.endswith(request) for p in arc)
    assert set(Counter(problem.answer for problem in arc)) == set("ABCD1234")
    assert actual["math500"].problems[0].id == "test/precalculus/807.json"


@needs_data
def test_gsm8k_from_files():
    one = load(settings("gsm8k", folder=str(DATA / "gsm8k")))[0]
    assert (one.name, len(one.problems), one.samples) == ("gsm8k", 1319, 1) and suite_config("gsm8k").temperature == 0
    assert one.problems[0].prompt.startswith("Janet\u2019s ducks") and one.problems[0].answer == "18"
    tree = {"gsm8k": {**suite_config("gsm8k").benchmarks["gsm8k"], "limit": 200}}
    few = load(settings("gsm8k", folder=str(DATA / "gsm8k"), benchmarks=tree))[0]
    assert len(few.problems) == 200 and few.available == 1319 and set(few.problems) < set(one.problems)


ROWS = {
    "math-ai/aime24": {"id": 60, "problem": "Q", "solution": "\\boxed{204}", "url": "u"},
    "math-ai/aime25": {"id": "0", "problem": "Q", "answer": "70"},
    "AI-MO/aimo-validation-amc": {"id": 0, "problem": "Q", "answer": 142.0, "url": "u"},
    "HuggingFaceH4/MATH-500": {
        "problem": "Q", "solution": "S", "answer": "7", "subject": "Algebra", "level": 3, "unique_id": "test/a/1.json"},
    "math-ai/minervamath": {"question": "Q", "answer": "1.6"},
    "Hothan/OlympiadBench": {"id": 1606, "question": "Q", "final_answer": ["2"], "subfield": "Algebra"},
    "allenai/ai2_arc": {
        "id": "M_1", "question": "Q", "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    "Idavidrein/gpqa": {
        "Question": "Q", "Correct Answer": "r\nr", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
        "Incorrect Answer 3": "c", "Record ID": "rec1", "High-level domain": "Physics"},
}  # fmt: skip
#: benchmark → (id, answer, level) of its row.
READ = {
    "aime24": ("60", "\\boxed{204}", None),
    "aime25": ("0", "70", None),
    "amc": ("0", "142.0", None),
    "math500": ("test/a/1.json", "7", "Level 3"),
    "minerva": (None, "1.6", None),
    "olympiadbench": ("1606", "2", None),
    "arc_challenge": ("M_1", "C", None),
    "gpqa_diamond": ("rec1", None, "Physics"),
}


@pytest.fixture
def hub(monkeypatch):
    """What was asked of `datasets.load_dataset`, which answers with one row."""
    asked = {}

    def load_dataset(name, subset=None, *, split):
        asked[name] = (subset, split)
        return [ROWS[name]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_papers_benchmarks_from_the_hub(hub):
    """In the columns that the hub's data sets are documented to have."""
    actual = {one.name: one.problems for one in load(suite_config("paper"))}
    assert set(actual) == set(READ) and set(hub) == set(ROWS)
    for name, (id, answer, level) in READ.items():
        (problem,) = actual[name]
        assert (problem.id, problem.answer, problem.level) == (id or problem.id, answer or problem.answer, level), name
        assert problem.prompt.startswith("Q")
    assert actual["arc_challenge"][0].prompt.startswith("Q\n\nA) w\nB) x\nC) y\nPut the letter or number")
    assert hub["Hothan/OlympiadBench"] == ("OE_TO_maths_en_COMP", "train")
    assert hub["Idavidrein/gpqa"] == ("gpqa_diamond", "train") and hub["allenai/ai2_arc"] == ("ARC-Challenge", "test")
    assert {hub[name][1] for name in ("math-ai/aime24", "math-ai/aime25", "HuggingFaceH4/MATH-500")} == {"test"}


def test_gpqa_shuffles_its_options(monkeypatch):
    """The letter is that of the right answer; the order is a question's own, and another one for another seed."""
    rows = [{**ROWS["Idavidrein/gpqa"], "Question": f"Q{i}", "Record ID": f"rec{i}"} for i in range(400)]
    fake = SimpleNamespace(load_dataset=lambda *names, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    problems = GPQA().rows()
    for problem in problems:
        options = dict(line.split(") ") for line in problem.prompt.splitlines()[2:])
        assert sorted(options) == list("ABCD") and sorted(options.values()) == ["a", "b", "c", "r r"]
        assert options[problem.answer] == "r r"
    count = Counter(problem.answer for problem in problems)
    assert all(60 < count[letter] < 140 for letter in "ABCD"), count
    rows.reverse()
    assert {p.id: p.prompt for p in GPQA().rows()} == {p.id: p.prompt for p in problems}
    assert [p.answer for p in GPQA(seed=1).rows()] != [p.answer for p in GPQA().rows()]


def test_without_the_hub_the_fix_is_said(monkeypatch, capsys):
    """GPQA is left out where, and only where, the user says so."""

    class ConnectionError(Exception):
        pass

    def load_dataset(*names, split):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    error = refused(capsys, "model=tiny", "suite=paper", "suite.skip=[aime24,aime25,amc,math500,minerva,olympiadbench]")
    assert "suite.benchmarks.arc_challenge: " in error and "suite.folder=FOLDER" in error
    others = "[aime24,aime25,amc,math500,minerva,olympiadbench,arc_challenge]"
    error = refused(capsys, "model=tiny", "suite=paper", f"suite.skip={others}")
    assert "suite.benchmarks.gpqa_diamond: " in error and "Idavidrein/gpqa, then log in" in error
    assert error.endswith(f"leave it out with suite.skip={others[:-1]},gpqa_diamond]\n") and "suite.folder" not in error


# Limits, ids, verifiers, other data sets.


class Numbers:
    """A data set that is no table: problems 0 to n - 1 on the evaluation side, in a given order."""

    def __init__(self, n: int = 50, backwards: bool = False, verifier: str | None = None):
        self.order = range(n - 1, -1, -1) if backwards else range(n)
        self.verifier = verifier

    def load(self):
        sides = [[Problem(f"{side}{i}", f"{side} {i}?", str(i), verifier=self.verifier) for i in self.order]
                 for side in ("train", "test")]  # fmt: skip
        return Splits(*map(tuple, sides))


NUMBERS = "tests.upge.evaluation.test_evaluate_suites.Numbers"


def loaded(limit=0, verifier="math", **keys):
    """The one benchmark of a suite."""
    tree = {**keys, "data": {"_target_": NUMBERS, **keys.get("data", {})}}
    return load(SuiteConfig(benchmarks={"numbers": tree}), verifier, limit)[0]


def test_a_limit_takes_the_same_problems_in_whatever_order():
    ids = {limit: [p.id for p in loaded(limit=limit).problems] for limit in (0, 1, 10, 20, 50, 99)}
    assert ids[0] == ids[50] == ids[99] == [f"test{i}" for i in range(50)]
    assert set(ids[1]) < set(ids[10]) < set(ids[20]) < set(ids[50]) and all(len(ids[k]) == k for k in (1, 10, 20))
    assert ids[20] == sorted(ids[20], key=lambda id: int(id[4:])) != ids[0][:20]
    assert {p.id for p in loaded(limit=10, data={"backwards": True}).problems} == set(ids[10])
    both = load(SuiteConfig(benchmarks={"numbers": {"data": {"_target_": NUMBERS}, "limit": 10}}), limit=20)[0]
    assert [p.id for p in both.problems] == ids[10] and both.available == 50


def test_instruction_and_verifier():
    """A problem's own verifier comes first, then the benchmark's, then verify.verifier; the instruction is as given."""
    assert {p.verifier for p in loaded().problems} == {"math"}
    assert {p.verifier for p in loaded(verifier="number").problems} == {"number"}
    suite = SuiteConfig(benchmarks={"a": {"data": {"_target_": NUMBERS}, "verifier": "choice"}})
    assert {p.verifier for p in load(suite, "number")[0].problems} == {"choice"}
    suite = SuiteConfig(benchmarks={"a": {"data": {"_target_": NUMBERS, "verifier": "regex"}, "verifier": "choice"}})
    assert {p.verifier for p in load(suite, "number")[0].problems} == {"regex"}
    assert loaded(instruction=" {now}\n").problems[3].prompt == "test 3? {now}\n"


def test_equal_ids_are_refused():
    with pytest.raises(DataError, match="suite.benchmarks.numbers: .*the id 'test0' occurs twice"):
        loaded(data={"_target_": "tests.upge.evaluation.test_evaluate_suites.Twice"})


class Twice:
    def rows(self):
        return Numbers(1).load().evaluation * 2


def test_a_benchmark_of_ones_own_in_a_run(capsys, tmp_path):
    text = """
suite:
  temperature: 0
  max_prompt_tokens: 99
  max_response_tokens: 20
  benchmarks:
    mine: {file: {_target_: upge.data.Table, path: deep/p.jsonl, columns: {prompt: q, answer: a}}, instruction: "="}
"""
    (tmp_path / "mine.yaml").write_text(text)
    arguments = [f"suite={tmp_path / 'mine.yaml'}", SMALL[0], SMALL[2], "--dry-run"]
    error = refused(capsys, *arguments)
    assert "suite.benchmarks.mine.data: missing" in error
    assert "suite.folder=FOLDER, the folder of its file deep/p.jsonl" in error
    assert "p.jsonl does not exist" in refused(capsys, *arguments, f"suite.folder={tmp_path}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "p.jsonl").write_text('{"q": "1+1", "a": "2"}\n{"q": "1+1", "b": "2"}\n')
    assert "p.jsonl:2: no column 'a'" in refused(capsys, *arguments, f"suite.folder={tmp_path}")
    (tmp_path / "deep" / "p.jsonl").write_text('{"q": "1+1", "a": "two\\\\"}\n')
    error = refused(capsys, *arguments, f"suite.folder={tmp_path}")
    assert "suite.benchmarks.mine: 1 of 1 answers cannot be verified; the first is" in error and "p.jsonl:1: " in error
    rows = '{"q": "1+1", "a": "2"}\n{"q": "1+2", "a": "3"}\n{"q": "1+3", "a": "two\\\\"}\n'
    (tmp_path / "deep" / "p.jsonl").write_text(rows)
    run(*arguments, f"suite.folder={tmp_path}")
    assert "note: mine: the verifier cannot compare 1 of 3 answers" in capsys.readouterr().out
