"""Sums and GSM8K, their sides, on good and on bad input; what importing the data sets loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from upge.data import GSM8K, Arithmetic, Problem
from upge.data.arithmetic import LEVELS, question, side, worked_solution
from upge.errors import ConfigError, DataError

SHARED_GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
CONFIGS = Path(__file__).parents[3] / "experiments" / "configs" / "data"

ROWS = [
    ("Ann has 3 bags of 4 apples and eats 2. How many are left?", "She had 3*4=<<3*4=12>>12 apples.\n#### 10"),
    ("A mill grinds 45,000 kg in each of 2 weeks. How much is that?", "2*45,000=<<2*45000=90000>>90,000\n#### 90,000"),
    ("Tom’s café sold 5 cups at £2. What did it earn?", "It earned £<<5*2=10>>10.\n####  10 "),
]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", ROWS[:2])
    write_rows(tmp_path / "test.jsonl", ROWS[2:])
    return tmp_path


# Arithmetic


def test_arithmetic_is_deterministic_and_another_seed_differs():
    assert Arithmetic().load() == Arithmetic().load()
    ours, theirs = Arithmetic(seed=1).load(), Arithmetic(seed=2).load()
    assert {p.prompt for p in ours.train} != {p.prompt for p in theirs.train}


def test_arithmetic_sides_cannot_overlap():
    """The side is a function of the terms as a multiset, so it holds for any seeds, sizes and orders of the terms."""
    splits = [Arithmetic(train_size=400, evaluation_size=400, seed=seed, largest=40).load() for seed in range(3)]

    def terms(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted(int(t) for t in problem.prompt.removesuffix("=?").replace("-", "+-").split("+")))

    train = {terms(p) for s in splits for p in s.train}
    evaluation = {terms(p) for s in splits for p in s.evaluation}
    assert not train & evaluation
    assert all(side(t) == "train" for t in train) and all(side(t) == "evaluation" for t in evaluation)
    assert side((3, -5, 9)) == side((9, 3, -5))


def test_arithmetic_is_balanced_and_a_larger_set_extends_a_smaller():
    small, large = Arithmetic(train_size=10).load().train, Arithmetic(train_size=803).load().train
    counts = [sum(p.level == level for p in large) for level in LEVELS]
    assert len(large) == 803 and max(counts) - min(counts) == 1
    assert len({p.id for p in large}) == 803
    assert [p.level for p in small[:8]] == list(LEVELS)
    assert set(small) <= set(large)


def test_arithmetic_demonstrations_are_right_and_short():
    for problem in Arithmetic().load().train:
        *steps, box = problem.demonstrations[0].split("\n")
        for step in steps:
            left, _, right = step.partition("=")
            assert eval(left) == int(right) >= 0
        assert eval(problem.prompt.removesuffix("=?")) == int(problem.answer)
        assert box == f"\\boxed{{{problem.answer}}}"
        assert len(problem.prompt) < 32 and len(problem.demonstrations[0]) < 64
        assert problem.prompt.count("-") >= 2 or "differences" not in problem.level


def test_worked_solution_by_hand():
    assert question((37, 25, -18)) == "37+25-18=?"
    assert worked_solution((37, 25, -18)) == "37+25=62\n62-18=44\n\\boxed{44}"
    assert worked_solution((1, 2, 3), lambda total, term: total + term + 1) == "1+2=4\n4+3=8\n\\boxed{8}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"levels": ["3 number"]}, ["data.levels", "3 number", "3 numbers"]),
        ({"levels": []}, ["data.levels", "[]"]),
        ({"levels": ["2 numbers", "2 numbers"]}, ["data.levels", "distinct"]),
        ({"train_size": 0}, ["data.train_size", "0"]),
        ({"evaluation_size": -1}, ["data.evaluation_size", "-1"]),
        ({"largest": 1}, ["data.largest", "1"]),
        ({"train_size": "many"}, ["train_size", "many", "int"]),
    ],
)
def test_arithmetic_refuses_bad_fields(fields, said):
    with pytest.raises(ConfigError) as caught:
        Arithmetic(**fields)
    assert all(word in str(caught.value) for word in said)


def test_arithmetic_says_when_there_are_too_few_problems():
    with pytest.raises(ConfigError, match=r"data\.largest: .* fewer than 500 different train problems"):
        Arithmetic(levels=["2 numbers"], train_size=500, largest=5).load()


# GSM8K


def test_gsm8k_folder_by_hand(folder: Path):
    splits = GSM8K(path=str(folder)).load()
    assert splits.train == (
        Problem(
            id="train.jsonl:1",
            prompt=ROWS[0][0],
            answer="10",
            demonstrations=("She had 3*4=12 apples.\n\\boxed{10}",),
            where=f"{folder / 'train.jsonl'}:1",
        ),
        Problem(
            id="train.jsonl:2",
            prompt=ROWS[1][0],
            answer="90000",
            demonstrations=("2*45,000=90,000\n\\boxed{90000}",),
            where=f"{folder / 'train.jsonl'}:2",
        ),
    )
    assert [p.answer for p in splits.evaluation] == ["10"]
    assert len(GSM8K(path=str(folder), train_size=1).load().train) == 1


def test_gsm8k_single_file_is_split_by_the_question_alone(tmp_path: Path):
    rows = [(f"How much is {i} and {i}?", f"It is {2 * i}.\n#### {2 * i}") for i in range(200)]
    splits = GSM8K(path=str(write_rows(tmp_path / "all.jsonl", rows))).load()
    reversed_half = GSM8K(path=str(write_rows(tmp_path / "half.jsonl", rows[::-1][:100]))).load()
    assert len(splits.train) + len(splits.evaluation) == 200 and 8 <= len(splits.evaluation) <= 35
    assert not {p.prompt for p in splits.train} & {p.prompt for p in splits.evaluation}
    assert {p.prompt for p in reversed_half.evaluation} < {p.prompt for p in splits.evaluation}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["train.jsonl", "empty", "named columns"]),
        ("\n \n", ["train.jsonl", "empty"]),
        ('{"question": "q", "answer": "#### 1"}\nnot json\n', ["train.jsonl:2", "not JSON"]),
        ("[1]\n", ["train.jsonl:1", "list"]),
        ('{"questions": "q", "answer": "#### 1"}\n', ["train.jsonl:1", "'question'", "'questions', 'answer'"]),
        ('{"question": "q", "answer": 7}\n', ["train.jsonl:1", "'answer'", "7", "text"]),
        ('{"question": "q", "answer": "seven"}\n', ["train.jsonl:1", "'####'", "'answer'"]),
        ('{"question": "q", "answer": "seven ####"}\n', ["train.jsonl:1", "nothing after '####'"]),
    ],
)
def test_gsm8k_names_file_and_line_of_bad_rows(folder: Path, content, said):
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        GSM8K(path=str(folder)).load()
    assert all(word in str(caught.value) for word in said)


def test_gsm8k_refuses_missing_files_bytes_and_overlap(folder: Path):
    with pytest.raises(DataError, match="nowhere does not exist; check data.path"):
        GSM8K(path=str(folder / "nowhere")).load()
    with pytest.raises(ConfigError, match="data.train_size: found 0"):
        GSM8K(path=str(folder), train_size=0)
    with pytest.raises(DataError, match="train.jsonl: none of its 1 rows falls on the evaluation side"):
        GSM8K(path=str(write_rows(folder / "train.jsonl", ROWS[:1]))).load()
    write_rows(folder / "test.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="test.jsonl:1: the same question .*train.jsonl:1"):
        GSM8K(path=str(folder)).load()
    (folder / "test.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="test.jsonl cannot be read as UTF-8"):
        GSM8K(path=str(folder)).load()
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match="test.jsonl does not exist"):
        GSM8K(path=str(folder)).load()


@pytest.mark.skipif(not SHARED_GSM8K.is_dir(), reason="GSM8K's own files are not here")
def test_gsm8k_own_files():
    splits = GSM8K(path=str(SHARED_GSM8K)).load()
    assert (len(splits.train), len(splits.evaluation)) == (7473, 1319)
    everything = splits.train + splits.evaluation
    assert all(p.answer.lstrip("-").replace(".", "", 1).isdigit() for p in everything)
    assert all(len(p.demonstrations) == 1 and "<<" not in p.demonstrations[0] for p in everything)
    assert all(p.demonstrations[0].endswith(f"\n\\boxed{{{p.answer}}}") for p in everything)
    assert splits.train[0].answer == "72" and splits.train[0].where.endswith("train.jsonl:1")


@pytest.mark.parametrize(("name", "cls"), [("arithmetic", Arithmetic), ("gsm8k", GSM8K)])
def test_configuration_files_hold_the_defaults(name, cls):
    from omegaconf import OmegaConf

    from upge.instantiate import build

    assert build(OmegaConf.load(CONFIGS / f"{name}.yaml")["data"], "data") == cls()


# What is loaded


def test_importing_the_data_sets_loads_no_engine_and_no_reader():
    heavy = {"transformers", "vllm", "deepspeed", "math_verify", "datasets", "pyarrow", "pandas", "reasoning_gym"}
    code = f"import sys, upge.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_evaluation_may_have_other_levels():
    levels = ["4 numbers", "3 mixed"]
    actual = Arithmetic(["3 numbers"], train_size=8, evaluation_size=6, evaluation_levels=levels).load()
    assert {problem.level for problem in actual.train} == {"3 numbers"}
    assert actual.evaluation == Arithmetic(levels, evaluation_size=6).load().evaluation
    assert {problem.level for problem in actual.evaluation} == {*levels}
    for wrong, said in ((["1 numbers"], "'1 numbers' is not a level"), ([], "expected one or more distinct levels")):
        with pytest.raises(ConfigError, match=f"data.evaluation_levels: {said}"):
            Arithmetic(evaluation_levels=wrong)
