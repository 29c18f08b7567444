"""Comparing evaluations: the numbers against counts by hand, the notes, the files, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest

from experiments.compare import __main__ as compare
from experiments.compare.load import load, notes, pairing
from experiments.compare.tables import ALL, Scores, exclusive, gaps, paper_grid, score_grid
from experiments.evaluate import __main__ as evaluate
from tests.evaluations import drawn, run_with, sample, write_run

ABILITIES = {"good": 0.4, "bad": 0.1}
LEVELS = ("1", "2", "3")


def one_run(folder: Path, ability: float, seed: int) -> Path:
    samples = {
        "aime": drawn("aime", 12, 8, ability - 0.2, seed=seed),
        "amc": drawn("amc", 10, 4, ability, seed=seed),
        "math": drawn("math", 30, 1, ability + 0.4, LEVELS, seed=seed),
        "arc": drawn("arc", 40, 1, ability + 0.2, seed=seed),
    }
    return write_run(folder, samples, {"arc": "ood"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("evals")
    return [
        str(one_run(root / name, ability, i)) for i, (name, ability) in enumerate({"good": 0.4, "bad": 0.1}.items())
    ]


def records(folder: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO((folder / "compare.csv").read_text("utf-8"))))


# The numbers.


def test_the_csv_holds_what_the_samples_say(folders, tmp_path, capsys):
    assert compare.main([*folders, f"output={tmp_path}"]) == 0
    actual = records(tmp_path)
    for folder in map(Path, folders):
        means = {}
        for path in (folder / "samples").iterdir():
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            means[path.stem] = sum(row["correct"] for row in rows) / len(rows)
            (score,) = (r for r in actual if r["kind"] == "score" and r["run"] == folder.name
                        and r["benchmark"] == path.stem and r["measure"].startswith("avg"))  # fmt: skip
            assert float(score["value"]) == pytest.approx(means[path.stem])
            assert float(score["low"]) <= float(score["value"]) <= float(score["high"])
        averages = {
            r["benchmark"]: float(r["value"]) for r in actual if r["kind"] == "average" and r["run"] == folder.name
        }
        assert averages["average math"] == pytest.approx((means["aime"] + means["amc"] + means["math"]) / 3)
        assert averages["average ood"] == pytest.approx(means["arc"])
    printed = capsys.readouterr().out
    for name in ("aime", "amc", "math", "arc", "good", "bad", "average math", "k=8", "bad minus good"):
        assert name in printed
    kinds = {r["kind"] for r in actual}
    assert kinds == {"score", "level", "response", "average", "difference", "exclusive"}
    ours = [r for r in actual if (r["run"], r["benchmark"], r["kind"]) == ("good", "aime", "score")]
    curve = [float(r["value"]) for r in ours if r["measure"].startswith("pass")]
    assert len(curve) == 4 and all(a <= b for a, b in pairwise(curve))


def test_the_papers_table_4_comes_out(tmp_path):
    """MATH-500 by level: N, solved by the first alone, by the second alone; then the totals and their shares."""
    paper = {"1": (43, 0, 0), "2": (90, 5, 1), "3": (105, 9, 2), "4": (128, 17, 4), "5": (134, 27, 8)}
    rows: tuple[list, list] = [], []
    for level, (problems, only_first, only_second) in paper.items():
        for index in range(problems):
            shared = index >= only_first + only_second and index % 2 == 0
            solved = (index < only_first or shared, only_first <= index < only_first + only_second or shared)
            for side in (0, 1):
                rows[side].append(sample("math500", f"{level}/{index}", 0, solved[side], level))
    for name, side in (("hpt", 0), ("grpo", 1)):
        write_run(tmp_path / name, {"math500": rows[side]})
    first, second = load([str(tmp_path / "hpt"), str(tmp_path / "grpo")])
    for rule in ("first", "any", "most"):
        actual = exclusive(first, second, rule)
        assert {e.level: (e.problems, e.only_first, e.only_second) for e in actual} == {**paper, ALL: (500, 58, 15)}
        assert all(e.only_first + e.only_second + e.both + e.neither == e.problems for e in actual)
    output = tmp_path / "out"
    assert compare.main([str(first.path), str(second.path), f"output={output}"]) == 0
    page = (output / "compare.md").read_text("utf-8")
    assert "| math500 | 5 | 134 | 27 (20.1) | 8 (6.0) |" in page and "**58 (11.6)** | **15 (3.0)**" in page


def test_levels_are_those_of_the_run_that_has_them(tmp_path):
    """Whichever of the two was evaluated on a file without levels, the lines are the same."""
    for name, levels in (("with", ("1", "2")), ("without", (None, None))):
        rows = [sample("math", str(i), 0, i == (name == "with"), levels[i % 2]) for i in range(6)]
        write_run(tmp_path / name, {"math": rows})
    leveled, plain = load([str(tmp_path / "with"), str(tmp_path / "without")])
    counts = {"1": (3, 0, 1), "2": (3, 1, 0), ALL: (6, 1, 1)}
    assert {e.level: (e.problems, e.only_first, e.only_second) for e in exclusive(leveled, plain, "most")} == counts
    assert {e.level: (e.problems, e.only_second, e.only_first) for e in exclusive(plain, leveled, "most")} == counts


def test_solved_is_what_was_asked_for(tmp_path):
    ours = {"a": [True, False, False], "b": [False, True, True], "c": [True, True, False], "d": [True, False]}
    ours["d"] = [True, False, False]
    theirs = {id: [False, False, False] for id in ours}
    first, second = load([str(run_with(tmp_path / n, s)) for n, s in (("x", ours), ("y", theirs))])
    counts = {rule: exclusive(first, second, rule)[-1].only_first for rule in ("first", "any", "most")}
    assert counts == {"first": 3, "any": 4, "most": 2}
    # Exactly half is not more than half.
    even = load(
        [str(run_with(tmp_path / "e", {"a": [True, False]})), str(run_with(tmp_path / "f", {"a": [False] * 2}))]
    )
    assert exclusive(*even, "most")[-1].only_first == 0


def test_differences_are_to_the_first_run(folders):
    first, second = load(folders)
    actual = {(gap.benchmark, gap.measure): gap for gap in gaps(first, second)}
    scores = Scores.of([first, second])
    for name, n in (("aime", 8), ("amc", 4), ("math", 1), ("arc", 1)):
        ours, theirs = (scores.per_benchmark[run, name].avg.value for run in ("good", "bad"))
        gap = actual[name, f"avg@{n}"]
        assert gap.difference.interval.value == pytest.approx(theirs - ours) and gap.holm >= gap.difference.p_value
    # pass@k at half of n, where n is at least 4; averages are one question each and not adjusted.
    assert {key for key in actual if key[1].startswith("pass")} == {("aime", "pass@4"), ("amc", "pass@2")}
    average = actual["average math", "avg of 3"]
    assert average.holm is None and average.problems == 52
    assert average.difference.interval.value == pytest.approx(
        scores.averages["bad", "math"].value - scores.averages["good", "math"].value
    )
    assert ("average ood", "avg of 1") not in actual
    smallest = min(gap.difference.p_value for (_, measure), gap in actual.items() if measure.startswith("avg@"))
    assert min(gap.holm for (_, m), gap in actual.items() if m.startswith("avg@")) == pytest.approx(4 * smallest)


def test_a_run_against_its_copy_has_no_difference(folders, tmp_path):
    copy = one_run(tmp_path / "copy", 0.4, 0)
    for gap in gaps(*load([folders[0], str(copy)])):
        assert gap.difference.p_value == 1 and gap.difference.interval.value == 0


def test_the_best_of_a_row_is_bold(tmp_path):
    runs = load([str(run_with(tmp_path / n, {"a": [right], "b": [True]})) for n, right in (("x", True), ("y", False))])
    (row,) = score_grid(Scores.of(runs)).rows
    assert row.cells[:4] == ("b", "avg@1", "2", "100.0 (34.2–100.0)") and row.bold == {3}
    assert [row.bold for row in paper_grid(Scores.of(runs)).rows] == [{1}, frozenset()]
    (alone,) = score_grid(Scores.of(runs[:1])).rows
    assert alone.bold == frozenset()


# What keeps runs from being compared just so.


def test_other_settings_are_noted(tmp_path):
    rows = drawn("b", 4, 2, 0.5)
    first = write_run(tmp_path / "x", {"b": rows, "c": [r.__class__(**{**vars(r), "benchmark": "c"}) for r in rows]})
    second = write_run(tmp_path / "y", {"b": drawn("b", 4, 1, 0.5), "c": drawn("c", 4, 2, 0.5)},
                       settings={"temperature": 1.0, "verifier": "number"})  # fmt: skip
    said = notes(load([str(first), str(second)]))
    assert said == [
        "Measured with different settings: samples is 2 in x, 1 in y (b).",
        "Measured with different settings: temperature is 0.6 in x, 1.0 in y (b, c).",
        "Measured with different settings: verifier is unset in x, 'number' in y (b, c).",
    ]
    measures = [gap.measure for gap in gaps(*load([str(first), str(second)]))]
    assert measures == ["avg@1 − avg@2", "avg@2", "avg of 2"]


def test_other_problems_are_noted_and_left_out(tmp_path, capsys):
    ours = {"1": [True], "2": [True], "3": [False], "x": [True]}
    theirs = {"1": [False], "2": [True], "9": [True]}
    rows = [sample("b", id, 0, *right) for id, right in theirs.items()]
    rows.append(sample("b", "x", 0, False, answer="another"))
    folders = [str(run_with(tmp_path / "one", ours)), str(write_run(tmp_path / "two", {"b": rows}))]
    first, second = load(folders)
    pairs = pairing(first.outcomes["b"], second.outcomes["b"])
    assert [first.outcomes["b"].ids[i] for i in pairs.first] == ["1", "2"]
    assert (pairs.only_first, pairs.only_second, pairs.conflicting) == (("3",), ("9",), ("x",))
    (gap,) = gaps(first, second)
    assert gap.problems == 2 and gap.difference.interval.value == -0.5
    assert exclusive(first, second, "first")[-1].problems == 2
    assert compare.main([*folders]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "one and two have 2 problems in common, 1 only in one, 1 only in two, 1 with another answer (such as 'x')"
        in printed
    )


def test_runs_without_common_problems_are_still_shown(tmp_path, capsys):
    folders = [str(run_with(tmp_path / n, {n: [True], n + n: [False]})) for n in ("x", "y")]
    first, second = load(folders)
    assert gaps(first, second) == [] and exclusive(first, second, "most") == []
    assert compare.main([*folders, f"output={tmp_path / 'out'}"]) == 0
    assert "x and y have 0 problems in common" in " ".join(capsys.readouterr().out.split())


def test_a_missing_benchmark_leaves_no_average(folders, tmp_path):
    partial = write_run(tmp_path / "partial", {"aime": drawn("aime", 12, 8, 0.3), "math": drawn("math", 30, 1, 0.5)})
    runs = load([folders[0], str(partial)])
    scores = Scores.of(runs)
    assert ("good", "math") in scores.averages and ("partial", "math") not in scores.averages
    table = {row.cells[0]: row.cells for row in score_grid(scores).rows}
    assert table["amc"][-1] == table["average math"][-1] == "–" and table["arc"][-1] == "–"
    said = notes(runs)
    assert "amc was not evaluated in partial, which therefore has no average math." in said
    average = [gap for gap in gaps(*runs) if gap.holm is None]
    assert [(gap.benchmark, gap.measure) for gap in average] == [("average math", "avg of 2")]


def test_one_answer_to_everything_is_noted(tmp_path):
    """Wrong ones alone count: 7 is wrong for 6 of 10 problems. Five are not yet worth a note, nor are few problems."""
    answers = ["7", "1", "7", "7", "7", "7", "7\n", None, None, "2"]
    rows = [sample("b", str(i), 0, i == 1, extracted=answer) for i, answer in enumerate(answers)]
    half = [sample("c", str(i), 0, i < 2, extracted=answer) for i, answer in enumerate(answers)]
    few = [sample("d", str(i), j, False, extracted="7") for i in range(9) for j in range(4)]
    long = [sample("e", str(i), 0, False, extracted="9" * 50 + "0" * i) for i in range(10)]
    (run,) = load([str(write_run(tmp_path / "x", {"b": rows, "c": half, "d": few, "e": long}))])
    assert {name: actual.commonest for name, actual in run.outcomes.items()} == {
        "b": ("7", 0.6), "c": ("7", 0.5), "d": ("7", 1.0), "e": ("9" * 40 + "… (50 characters)", 0.1)
    }  # fmt: skip
    assert notes([run]) == ["x, b: 60.0 % of the responses give the same wrong answer, 7."]
    scores = json.loads((tmp_path / "x" / "scores.json").read_text())
    assert "\nnote: b: 60.0 % of the responses give the same wrong answer, 7." in evaluate.table(scores)
    del scores["benchmarks"]["b"]["commonest"]  # as written before there was this figure
    assert "note" not in evaluate.table(scores)


def test_cut_responses_and_missing_verdicts_are_noted(tmp_path):
    rows = [sample("b", str(i), 0, True, finished=i > 1, status="timeout" if i == 2 else "ok") for i in range(10)]
    said = notes(load([str(write_run(tmp_path / "x", {"b": rows}))]))
    assert said == [
        "x, b: 20.0 % of the responses were cut at the length limit.",
        "x, b: 1 answers without a verdict count as wrong.",
    ]
