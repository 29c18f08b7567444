"""Files of tables and the division into sides, with the real files where they are; data sets of the hub."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.upge.data.test_data_table import write
from upge.data import GSM8K, Table
from upge.data.splits import for_evaluation
from upge.errors import ConfigError, DataError
from upge.instantiate import build

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = ROOT / "experiments" / "configs" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")

ROWS = [{"prompt": f"How much is {i} and {i}?", "answer": 2 * i} for i in range(400)]


def preset(name: str, **settings):
    """A preset's data set with settings as on the command line."""
    return build(OmegaConf.merge(OmegaConf.load(CONFIGS / f"{name}.yaml").data, settings), "data")


# Files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b"{}", "found a JSON dict, expected a list"),
        ("a.json", b'[{"prompt": 1},\n]', "a.json:2: not JSON"),
        ("a.json", b'{"prompt": "?"}\n{"prompt": "?"}', "is called .jsonl"),
        ("a.json", b"[1]", "a.json: row 1: found a int"),
        ("a.jsonl", b"\xff", "a.jsonl cannot be read as UTF-8"),
        ("a.jsonl", b'{"prompt": "?"}\n' + b"[" * 100_000, "a.jsonl:2: not JSON"),
        ("a.parquet", b"PAR1 no more", "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Table(path=str(tmp_path / name)).rows()
    assert said in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.parquet does not exist; check data\.path"):
        Table(path=str(tmp_path / "nowhere.parquet")).rows()
    with pytest.raises(DataError, match=r"nowhere\.json does not exist; check data\.evaluation_path"):
        path = write(tmp_path / "a.jsonl", ROWS[:2])
        Table(path=path, evaluation_path=str(tmp_path / "nowhere.json")).load()
    (tmp_path / "a.json1").write_text("{}")
    with pytest.raises(ConfigError, match=r"'\.json1' of .*did you mean '\.json"):
        Table(path=str(tmp_path / "a.json1")).rows()
    with pytest.raises(ConfigError, match=r"data\.path is not set.*data\.hub"):
        Table().load()


def test_a_mark_of_the_byte_order_is_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"prompt": "?", "answer": 142.0}\n', encoding="utf-8")
    assert Table(path=str(tmp_path / "a.jsonl")).rows()[0].answer == "142.0"


def test_the_example_of_the_docs_is_one(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    (row,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "problems.jsonl").write_text(row, encoding="utf-8")
    columns = dict(re.findall(r"data\.columns\.(\w+)=(\w+)", text))
    (problem,) = preset("table", path=str(tmp_path / "problems.jsonl"), columns=columns).rows()
    assert (problem.answer, problem.level, len(problem.demonstrations)) == ("8", "numbers", 1)
    (tmp_path / "problems.jsonl").write_text("\n" * 6 + row.replace("truth", "thruth"), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        preset("table", path=str(tmp_path / "problems.jsonl"), columns=columns).rows()
    (said,) = re.findall(r"```\nerror: (problems.*?)\n```", text)
    actual = str(caught.value).removeprefix(f"{tmp_path}/").replace(", 'topic'", "")
    assert actual == said


# Sides


def test_a_share_is_taken_by_the_prompt_alone(tmp_path):
    """Not by its place, its white space or the file; a larger share keeps the problems of a smaller one."""
    path = write(tmp_path / "a.jsonl", ROWS)
    sides = {share: Table(path=path, evaluation_share=share).load() for share in (0.05, 0.2, 0.5)}
    prompts = {share: {p.prompt for p in splits.evaluation} for share, splits in sides.items()}
    for share, splits in sides.items():
        assert len(splits.train) + len(splits.evaluation) == 400
        assert abs(len(splits.evaluation) - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5
        assert not prompts[share] & {p.prompt for p in splits.train}
        lines = [int(p.where.rpartition(":")[2]) for p in splits.train]
        assert lines == sorted(lines)
    assert prompts[0.05] < prompts[0.2] < prompts[0.5]
    other = write(tmp_path / "b.json", [{**row, "prompt": f"  {row['prompt']}\n"} for row in ROWS[::-2]])
    some = {p.prompt.strip() for p in Table(path=other, evaluation_share=0.2).load().evaluation}
    assert some == prompts[0.2] & {row["prompt"] for row in ROWS[::-2]}
    assert not any(for_evaluation(row["prompt"], 0.0) for row in ROWS)


def test_sizes_take_the_first_of_each_side(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = Table(path=path, evaluation_share=0.2).load()
    part = Table(path=path, evaluation_share=0.2, train_size=7, evaluation_size=3).load()
    assert part.train == whole.train[:7] and part.evaluation == whole.evaluation[:3]
    assert Table(path=path).load().evaluation == () and len(Table(path=path, evaluation_share=0.2).rows()) == 400


def test_a_file_of_its_own_for_the_evaluation_side(tmp_path):
    """It is taken whole, whatever the share; the same file name on both sides makes no id twice."""
    (tmp_path / "test").mkdir()
    path, other = write(tmp_path / "a.jsonl", ROWS[:5]), write(tmp_path / "test" / "a.jsonl", ROWS[5:8])
    splits = Table(path=path, evaluation_path=other, evaluation_share=0.5).load()
    assert (len(splits.train), len(splits.evaluation)) == (5, 3)
    assert len({p.id for p in splits.train + splits.evaluation}) == 8
    other = write(tmp_path / "b.jsonl", [ROWS[9], {"prompt": "How much is  2 and 2?", "answer": 4}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: the same question is on the training side, at .*a\.jsonl:3"):
        Table(path=path, evaluation_path=other).load()


def test_a_side_without_problems_and_an_id_that_comes_twice(tmp_path):
    with pytest.raises(DataError, match=r"none of its 1 rows falls on the evaluation side .*data\.evaluation_path"):
        Table(path=write(tmp_path / "a.jsonl", ROWS[:1]), evaluation_share=0.01).load()
    columns = {"prompt": "prompt", "answer": "answer", "id": "id"}
    path = write(tmp_path / "b.jsonl", [row | {"id": i % 2} for i, row in enumerate(ROWS[:3])])
    with pytest.raises(DataError, match=r"b\.jsonl:3: the id '0' is also that of .*b\.jsonl:1; ids must be unique"):
        Table(path=path, columns=columns).load()


# The real files


@real
def test_every_row_of_math_is_a_problem():
    """But for the four whose answer is empty in the file itself."""
    data = preset("math", path=str(SHARED / "math" / "train.parquet"))
    rows, splits = data.rows(), data.load()
    assert len(rows) == 7496 == len(splits.train) + len(splits.evaluation) and 300 < len(splits.evaluation) < 450
    assert {p.id for p in rows} == {p.id for p in splits.train + splits.evaluation}
    levels = Counter(p.level for p in rows)
    assert levels == {"Level 1": 564, "Level 2": 1347, "Level 3": 1591, "Level 4": 1690, "Level 5": 2302, "Level ?": 2}
    assert all(len(p.demonstrations) == 1 and "\\boxed" in p.demonstrations[0] for p in rows)
    assert rows[0].answer == "0" and rows[0].id == "train.parquet:1" and rows[0].where.endswith("parquet: row 1")
    benchmark = Table(path=str(SHARED / "eval" / "math500.json")).rows()
    assert not {" ".join(p.prompt.split()) for p in rows} & {" ".join(p.prompt.split()) for p in benchmark}


@real
def test_every_row_of_the_openr1_layout_is_a_problem():
    path = str(SHARED / "math" / "openr1_layout.parquet")
    rows = preset("openr1-math-46k", path=path).rows()
    assert len(rows) == len({p.id for p in rows}) == 2000
    assert {p.system for p in rows} == {"Reason step by step and put the final answer within \\boxed{}."}
    assert all(len(p.demonstrations) == 1 and p.demonstrations[0].startswith("<think>\n") for p in rows)
    assert rows[0].answer == "0" and rows[0].prompt.startswith("Let \\[f(x)")
    assert {p.system for p in preset("openr1-math-46k", path=path, system="drop").rows()} == {None}
    assert preset("openr1-math-46k", path=path).load().evaluation


@real
@pytest.mark.parametrize(
    ("name", "number", "first"),
    [
        ("aime24.json", 30, "\\boxed{204}"),
        ("aime25.json", 30, "70"),
        ("amc23.json", 40, "27"),
        ("amc12_83.jsonl", 83, "142.0"),
        ("math500.json", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("minerva.json", 272, "1.6"),
        ("olympiadbench.json", 674, "2"),
        ("arc_challenge.jsonl", 1172, "C"),
    ],
)
def test_every_row_of_the_benchmarks_is_a_problem(name, number, first):
    rows = preset("table", path=str(SHARED / "eval" / name)).rows()
    assert len(rows) == number == len({p.id for p in rows}) and rows[0].answer == first


# The hub


class ConnectionRefused(ConnectionError):
    pass


class DatasetNotFoundError(FileNotFoundError):
    pass


def hub(monkeypatch, sets: dict) -> list:
    """In place of the package `datasets`, one with these splits: (name, subset, split) → rows or an error."""
    asked = []

    def load_dataset(path, name=None, *, split=None):
        asked.append((path, name, split))
        actual = sets[path, name, split]
        if isinstance(actual, Exception):
            raise actual
        return actual

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_data_set_of_the_hub(monkeypatch):
    sets = {("me/sums", "small", "train"): ROWS[:6], ("me/sums", "small", "test"): ROWS[6:8]}
    asked = hub(monkeypatch, sets)
    splits = Table(hub="me/sums", subset="small", evaluation_split="test").load()
    assert asked == list(sets) and (len(splits.train), len(splits.evaluation)) == (6, 2)
    assert splits.train[1].id == "me/sums/small/train:2" and splits.train[1].where == "me/sums, small, train: row 2"
    assert splits.evaluation[0].id == "me/sums/small/test:1"
    sets["me/sums", "small", "test"] = ROWS[5:8]
    with pytest.raises(DataError, match=r"me/sums, small, test: row 1: the same question .* small, train: row 6"):
        Table(hub="me/sums", subset="small", evaluation_split="test").load()


def test_a_file_goes_before_the_hub(monkeypatch, tmp_path):
    asked = hub(monkeypatch, {})
    path = write(tmp_path / "a.jsonl", ROWS)
    data = Table(path=path, hub="me/sums", evaluation_split="test", evaluation_share=0.2)
    assert len(data.load().evaluation) > 40 and not asked


def test_presets_ask_the_hub_for_what_they_name(monkeypatch):
    solved = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    math = [
        {"problem": f"{i}?", "solution": f"\\boxed{{{i}}}", "answer": str(i), "level": i + 1, "subject": "Algebra"}
        for i in range(3)
    ]
    sets = {
        ("openai/gsm8k", "main", "train"): solved[:2],
        ("openai/gsm8k", "main", "test"): solved[2:],
        ("nlile/hendrycks-MATH-benchmark", None, "train"): math[:2],
        ("nlile/hendrycks-MATH-benchmark", None, "test"): math[2:],
    }
    asked = hub(monkeypatch, sets)
    splits = preset("gsm8k").load()
    assert [p.id for p in splits.train + splits.evaluation] == [
        "openai/gsm8k/train:1",
        "openai/gsm8k/train:2",
        "openai/gsm8k/test:1",
    ]
    assert splits.train[1].demonstrations == ("\\boxed{1}",) and GSM8K() == preset("gsm8k")
    assert [p.level for p in preset("math").load().evaluation] == ["Level 3"]
    assert asked == list(sets)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefused("Couldn't reach it"), ["the hub cannot be reached", "data.path"]),
        (DatasetNotFoundError("a gated dataset"), ["gated", "hf auth login", "huggingface-cli login"]),
        (ValueError("Unknown split 'trian'.\nmore"), ["Unknown split 'trian'", "data.split"]),
        (RuntimeError(), ["RuntimeError", "data.path"]),
    ],
)
def test_a_hub_that_fails_is_one_message_with_a_fix(monkeypatch, error, said):
    hub(monkeypatch, {("me/sums", None, "train"): error})
    with pytest.raises(DataError) as caught:
        Table(hub="me/sums").load()
    message = str(caught.value)
    assert message.startswith("data.hub: 'me/sums, train' could not be loaded") and "\n" not in message
    assert all(word in message for word in said)


def test_no_package_and_no_rows(monkeypatch):
    hub(monkeypatch, {("me/sums", None, "train"): []})
    with pytest.raises(DataError, match="has no rows"):
        Table(hub="me/sums").load()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'upge\[data\]'"):
        Table(hub="me/sums").load()


def test_the_package_itself_reads_a_folder(tmp_path, monkeypatch):
    """All of `datasets` but the download: a folder may stand in place of a name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    worked = [{"role": "assistant", "content": "so"}]
    write(folder / "train.parquet", [row | {"worked": worked} for row in ROWS[:4]])
    columns = {"prompt": "prompt", "answer": "answer", "demonstrations": "worked"}
    rows = Table(hub=str(folder), columns=columns).rows()
    assert [p.answer for p in rows] == ["0", "2", "4", "6"] and rows[0].demonstrations == ("so",)
    with pytest.raises(DataError, match=r"could not be loaded .*test.*check data\.subset and data\.split"):
        Table(hub=str(folder), split="test", columns=columns).rows()
