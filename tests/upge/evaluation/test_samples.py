"""The samples file survives interruptions and refuses what is not its own; figures follow from its lines by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from upge.errors import DataError
from upge.evaluation.intervals import Interval, intervals
from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.scores import NO_LEVEL, Outcomes, average, benchmark_scores, by_level, natural, suite_scores

ONE = Sample("aime", "1", "2", 0, "2+2?", "4", "It is \\boxed{4}.", "4", 1.0, True, "ok", "", 5, True)


def sample(id: str, number: int, correct: bool, level: str | None = None, **fields) -> Sample:
    return replace(ONE, id=id, sample=number, correct=correct, reward=float(correct), level=level, **fields)


def write(path: Path, samples: list[Sample]) -> None:
    with SampleFile(path) as file:
        file.append(samples)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "samples" / "aime.jsonl"


# The file.


def test_what_is_written_is_read(path):
    odd = replace(ONE, sample=1, response="a\nb\u2028c \x00 \ud800 é", extracted=None, level=None, detail="x")
    with SampleFile(path) as file:
        assert list(file.read()) == [] and file.done() == set()
        file.append([ONE])
        assert list(SampleFile(path).read()) == [ONE]  # at once, by anyone
        file.append([odd])
    assert list(SampleFile(path).read()) == [ONE, odd]
    assert file.done() == {("1", 0), ("1", 1)}
    assert json.loads(path.read_text("utf-8").split("\n")[0]) == asdict(ONE)


def test_a_line_cut_off_anywhere_is_passed_over_and_repaired(path):
    write(path, [ONE, replace(ONE, sample=1, response="é }")])
    first, second = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(second) - 1):
        path.write_bytes(first + second[:kept])
        assert SampleFile(path).done() == {("1", 0)}
        write(path, [replace(ONE, sample=2)])
        assert [s.sample for s in SampleFile(path).read()] == [0, 2]
        assert path.read_bytes().count(b"\n") == 2


def test_a_whole_last_line_without_its_newline_is_kept(path):
    write(path, [ONE])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert SampleFile(path).done() == {("1", 0)}
    write(path, [replace(ONE, sample=1)])
    assert SampleFile(path).done() == {("1", 0), ("1", 1)}


def test_a_cut_first_line_and_a_long_one_are_repaired(path):
    """The repair looks for the last newline from the end, block by block."""
    write(path, [ONE, replace(ONE, sample=1, response="x" * 300_000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    write(path, [replace(ONE, sample=2)])
    assert [s.sample for s in SampleFile(path).read()] == [0, 2]
    path.write_bytes(whole[:9])
    write(path, [replace(ONE, sample=3)])
    assert [s.sample for s in SampleFile(path).read()] == [3]


def test_only_one_process_writes_at_a_time(path):
    with SampleFile(path) as file:
        file.append([ONE])
        with pytest.raises(DataError, match="another process is writing"):
            write(path, [ONE])
    write(path, [replace(ONE, sample=1)])
    assert len(SampleFile(path).done()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"aime\.jsonl:2: not JSON"),
        ("[1]", r":2: found a JSON list"),
        ("{}", r":2: no field 'benchmark'"),
        (json.dumps(asdict(ONE) | {"correct": 1}), r":2: correct: found 1 \(int\), expected bool"),
        (json.dumps(asdict(ONE) | {"status": "dead"}), r":2: status: 'dead' is not one of"),
        (json.dumps(asdict(ONE) | {"status": 1}), r":2: status: 1 is not one of"),
        (json.dumps(asdict(ONE) | {"reward": float("nan")}), r":2: reward: found nan"),
        (json.dumps(asdict(ONE) | {"reward": float("inf")}), r":2: reward: found inf"),
        (json.dumps(asdict(ONE)), r":2: sample 0 of problem '1' is also on line 1"),
    ],
)
def test_a_bad_line_is_named(path, line, message):
    write(path, [ONE])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        list(SampleFile(path).read())


def test_a_file_of_other_problems_is_not_continued(path):
    write(path, [ONE])
    file = SampleFile(path)
    assert file.done({"1": ("2+2?", "4"), "2": ("", "")}) == {("1", 0)}
    with pytest.raises(DataError, match="problem '1', which is not in the data"):
        file.done({"2": ("2+2?", "4")})
    with pytest.raises(DataError, match="the prompt of problem '1' is '2[+]2[?]' in it, but '2[+]3[?]' in the data"):
        file.done({"1": ("2+3?", "4")})
    with pytest.raises(DataError, match="the answer of problem '1' is '4' in it, but '5'"):
        file.done({"1": ("2+2?", "5")})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "samples" / "x.jsonl", [ONE])


# The figures.

ROWS = [
    *(sample("a", number, correct, "1") for number, correct in enumerate([True, True, False, False])),
    *(sample("b", number, correct, "10") for number, correct in enumerate([False, False, False, False])),
    *(sample("c", number, correct, "2") for number, correct in enumerate([True, False, False, False])),
]


def test_outcomes_do_not_depend_on_the_order_of_the_lines():
    first, second = Outcomes.of("aime", ROWS), Outcomes.of("aime", ROWS[::-1], n=4, ids={"a", "b", "c"})
    assert first.ids == second.ids == ("a", "b", "c") and first.levels == second.levels == ("1", "10", "2")
    assert torch.equal(first.correct, second.correct) and first.samples == 4
    assert first.average()[:, 0].tolist() == [0.5, 0.0, 0.25]
    # 2 of 4: 1 − C(2,2)/C(4,2) = 5/6; 1 of 4: 1 − C(3,2)/C(4,2) = 1/2.
    assert first.pass_at([2])[:, 0].tolist() == pytest.approx([5 / 6, 0, 1 / 2])


def test_figures_by_hand():
    rows = [replace(row, tokens=10 * row.sample, finished=row.sample < 3) for row in ROWS]
    rows[0] = replace(rows[0], status="timeout", correct=False)
    rows[5] = replace(rows[5], status="error")
    actual = benchmark_scores(Outcomes.of("aime", rows))
    assert (actual.problems, actual.samples, actual.timeouts, actual.errors) == (3, 4, 1, 1)
    assert actual.tokens == 15 and actual.unfinished == 0.25
    assert actual.avg == intervals({"aime": torch.tensor([[0.25], [0.0], [0.25]])})[0]
    assert vars(actual.pass_at[1]) == pytest.approx(vars(actual.avg))
    assert {k: one.value for k, one in actual.pass_at.items()} == pytest.approx({1: 1 / 6, 2: 1 / 3, 4: 2 / 3})
    assert list(actual.pass_at_every) == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3])
    assert list(actual.levels) == ["1", "2", "10"]
    assert actual.levels["10"].avg.value == 0 and actual.levels["10"].avg.high > 0.7
    assert actual.levels["2"].pass_at[4].value == 1


def test_the_first_n_samples_count():
    outcomes = Outcomes.of("aime", ROWS, n=2)
    assert outcomes.samples == 2 and outcomes.average()[:, 0].tolist() == [1.0, 0.0, 0.5]


def test_an_unfinished_evaluation_has_no_figures():
    message = r"aime: 1 of 3 problems have fewer than 4 samples \(problem 'c' has 3\).*same output"
    with pytest.raises(DataError, match=message):
        Outcomes.of("aime", ROWS[:-1])
    with pytest.raises(DataError, match="1 of 4 problems have fewer than 4 samples .problem 'd' has 0"):
        Outcomes.of("aime", ROWS, ids={"a", "b", "c", "d"})
    with pytest.raises(DataError, match="3 of 3 problems have fewer than 5"):
        Outcomes.of("aime", ROWS, n=5)
    with pytest.raises(DataError, match="1 of 1 problems have fewer than 2 samples .problem 'a' has 1"):
        Outcomes.of("aime", ROWS[1:3], n=2)  # numbers 1 and 2, but not 0
    for ids in (None, {"a"}):
        with pytest.raises(DataError, match="aime: there are no samples"):
            Outcomes.of("aime", [], ids=ids)


def test_samples_that_do_not_belong_are_named():
    with pytest.raises(DataError, match="problem 'c', which is not one of its problems"):
        Outcomes.of("aime", ROWS, ids={"a", "b"})
    with pytest.raises(DataError, match="math: found samples of 'aime'"):
        Outcomes.of("math", ROWS)
    with pytest.raises(DataError, match="samples 0 and 1 of problem 'a' disagree"):
        Outcomes.of("aime", [ROWS[0], replace(ROWS[1], answer="5")])


def test_levels_are_in_natural_order():
    assert list(by_level(["10", "9", None, "Level 2", "Level 10", "9"])) == ["9", "10", "Level 2", "Level 10", NO_LEVEL]
    assert by_level(["b", "a", "b"]) == {"a": [1], "b": [0, 2]} and by_level([None, None]) == {}
    assert sorted(["a10", "b", "a9", "10", "9"], key=natural) == ["9", "10", "a9", "a10", "b"]


def test_a_suite_has_an_average_per_group():
    """Benchmarks count alike, whatever their size; the content is plain JSON."""
    first = Outcomes.of("aime", ROWS)
    second = Outcomes.of("arc", [replace(row, benchmark="arc", correct=True) for row in ROWS[:4]], n=1)
    third = Outcomes.of("math", [replace(row, benchmark="math", correct=False) for row in ROWS])
    groups = {"aime": "math", "arc": "ood", "math": "math"}
    settings = {name: {"temperature": 0.6} for name in groups}
    content = json.loads(json.dumps(suite_scores([first, second, third], groups, settings)))
    assert list(content["benchmarks"]) == ["aime", "arc", "math"]
    assert content["averages"]["math"]["benchmarks"] == ["aime", "math"]
    assert content["averages"]["math"]["avg"]["value"] == pytest.approx(0.125)
    assert content["averages"]["ood"]["avg"] == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0}
    aime = content["benchmarks"]["aime"]
    assert (aime["group"], aime["problems"], aime["samples"]) == ("math", 3, 4)
    assert aime["settings"] == {"temperature": 0.6} and aime["pass_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert aime["levels"]["1"]["avg"]["value"] == 0.5
    assert average([first, third]) == Interval(*content["averages"]["math"]["avg"].values())
