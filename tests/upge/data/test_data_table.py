"""Tables by a column map: every form of a cell, the sides, and messages that name file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from upge.data import Problem, Table
from upge.errors import ConfigError, DataError

QUESTION = {"role": "user", "content": "1+1?"}
RULES = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "It is \\boxed{2}."}


def write(path: Path, rows: list) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return str(path)


def one(tmp_path: Path, row: dict, **columns: str) -> Problem:
    """The problem that a row makes; its columns are called as what they hold, but for those given."""
    known = {name: name for name in row if name in ("prompt", "answer", "demonstrations", "level", "id", "rejected")}
    (problem,) = Table(path=write(tmp_path / "a.jsonl", [row]), columns=known | columns).rows()
    return problem


# What a row says


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_column_in_every_kind_of_file(tmp_path, suffix):
    rows = [
        {
            "q": [RULES, QUESTION],
            "worked": [[REPLY], [{"role": "assistant", "content": "\\boxed{2}"}]],
            "scoring": {"truth": "2", "by": "number"},
            "hard": 3,
            "key": "first",
            "bad": "\\boxed{3}",
        },
        {
            "q": [QUESTION | {"content": "2+2?"}],
            "worked": None,
            "scoring": {"truth": "4", "by": None},
            "hard": 5,
            "key": "second",
            "bad": None,
        },
    ]
    columns = {
        "prompt": "q",
        "demonstrations": "worked",
        "answer": "scoring.truth",
        "verifier": "scoring.by",
        "level": "hard",
        "id": "key",
        "rejected": "bad",
    }
    path = write(tmp_path / f"a.{suffix}", rows)
    first, second = Table(path=path, columns=columns, verifier="math").rows()
    place = f"{path}:1" if suffix == "jsonl" else f"{path}: row 1"
    assert first == Problem(
        id="first",
        prompt="1+1?",
        answer="2",
        demonstrations=("It is \\boxed{2}.", "\\boxed{2}"),
        level="Level 3",
        system="Be brief.",
        where=place,
        rejected="\\boxed{3}",
        verifier="number",
    )
    assert (second.prompt, second.answer, second.demonstrations, second.system) == ("2+2?", "4", (), None)
    assert (second.verifier, second.rejected, second.level) == ("math", None, "Level 5")
    assert Table(path=path, columns=columns, system="drop").rows()[0].system is None


@pytest.mark.parametrize(
    ("cell", "actual"),
    [
        ("worked", ("worked",)),
        (["one", "two"], ("one", "two")),
        ([REPLY], (REPLY["content"],)),
        ([[REPLY], "two"], (REPLY["content"], "two")),
        ([], ()),
        (None, ()),
    ],
)
def test_demonstrations_come_in_several_forms(tmp_path, cell, actual):
    full = {"prompt": "0+0?", "answer": "0", "demonstrations": "0"}
    path = write(tmp_path / "a.jsonl", [full, {"prompt": "1+1?", "answer": "2", "demonstrations": cell}])
    columns = {name: name for name in full}
    assert Table(path=path, columns=columns).rows()[1].demonstrations == actual


@pytest.mark.parametrize(
    ("cell", "actual"),
    [("2", "2"), (2, "2"), (142.0, "142.0"), (-0.5, "-0.5"), (10**20, "1" + "0" * 20), (["2"], "2"), ([7.5], "7.5")],
)
def test_answers_are_texts_or_numbers_as_they_are_written(tmp_path, cell, actual):
    assert one(tmp_path, {"prompt": "?", "answer": cell}).answer == actual


def test_options_are_written_under_the_prompt(tmp_path):
    """The hub's ARC has labels, sometimes digits; MMLU has a list and an index."""
    labelled = {"text": ["red", "blue", "green"], "label": ["1", "2", "3"]}
    problem = one(tmp_path, {"prompt": "Which?\n", "choices": labelled, "answer": "2"}, options="choices")
    assert (problem.prompt, problem.answer) == ("Which?\n\nA) red\nB) blue\nC) green", "B")
    for answer in ("C", 2):
        row = {"prompt": "Which?", "choices": ["red", "blue", "green"], "answer": answer}
        assert one(tmp_path, row, options="choices").answer == "C"
    for answer in ("D", 3, -1, True, "red"):
        with pytest.raises(DataError, match=r"a\.jsonl:1: column 'answer' holds .*none of the options' labels A, B"):
            one(tmp_path, {"prompt": "?", "choices": ["red", "blue"], "answer": answer}, options="choices")
    with pytest.raises(DataError, match="2 options with 1 labels"):
        one(tmp_path, {"prompt": "?", "c": {"text": ["a", "b"], "label": ["A"]}, "answer": "A"}, options="c")


def test_a_name_with_dots_that_is_there_as_it_stands_wins(tmp_path):
    row = {"prompt": "?", "a.b": "flat", "a": {"b": "nested"}}
    assert one(tmp_path, row, answer="a.b").answer == "flat"


def test_a_column_of_its_own_beats_the_message_of_the_system(tmp_path):
    row = {"prompt": [RULES, QUESTION], "answer": "2", "rules": "Be long."}
    assert one(tmp_path, row, system="rules").system == "Be long."
    assert one(tmp_path, row).system == "Be brief."


def test_ids_without_a_column_name_file_and_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1?", "answer": 1}, {"prompt": "2?", "answer": 2}])
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "a \u2028 b", "answer": 3}\n')
    assert [problem.id for problem in Table(path=path).rows()] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert one(tmp_path, {"prompt": "?", "answer": 1, "id": 17}).id == "17"


# Bad rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"promt": "?", "answer": "1"}, ["no column 'prompt'", "'promt', 'answer'", "did you mean 'promt'"]),
        ({"prompt": "?", "response": {"answer": "1"}}, ["no column 'answer'", "'prompt', 'response.answer'"]),
        ({"prompt": " ", "answer": "1"}, ["'prompt' holds ' '", "text"]),
        ({"prompt": 7, "answer": "1"}, ["'prompt' holds 7", "chat messages"]),
        ({"prompt": [], "answer": "1"}, ["'prompt' holds []"]),
        ({"prompt": [QUESTION, RULES, QUESTION], "answer": "1"}, ["user, system, user", "those of user and assistant"]),
        ({"prompt": [RULES], "answer": "1"}, ["the turns system"]),
        ({"prompt": [{"role": "user", "content": None}], "answer": "1"}, ["holds None", "message's content"]),
        ({"prompt": "?", "answer": True}, ["'answer' holds True", "text or a number"]),
        ({"prompt": "?", "answer": float("nan")}, ["'answer' holds nan"]),
        ({"prompt": "?", "answer": ["1", True]}, ["'answer' holds True", "text or a number"]),
        ({"prompt": "?", "answer": {"value": 1}}, ["'answer' holds {'value': 1}", "'answer.value'"]),
        ({"prompt": "?", "answer": "\ud800"}, ["surrogate"]),
        ({"prompt": "?", "answer": "1", "demonstrations": 5}, ["'demonstrations' holds 5", "text or a list"]),
        ({"prompt": "?", "answer": "1", "demonstrations": [REPLY, QUESTION]}, ["assistant, user", "assistant"]),
        ({"prompt": "?", "answer": "1", "level": 2.5}, ["'level' holds 2.5", "whole number"]),
        ({"prompt": "?", "answer": "1", "id": None}, ["'id' holds None"]),
        ({"prompt": "?", "answer": "1", "rejected": "no"}, ["1 rejected responses and 0 demonstrations"]),
        ({"prompt": "?", "answer": "1", "demonstrations": "a", "rejected": "a"}, ["equals the first", "two responses"]),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, row, said):
    with pytest.raises(DataError) as caught:
        one(tmp_path, row, prompt="prompt", answer="answer")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:1: ") and all(word in message for word in said), message


def test_a_column_that_no_row_has_is_a_mistake_and_one_that_some_have_is_not(tmp_path):
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": "2", "level": "easy"}]
    path = write(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "prompt", "answer": "answer", "level": "level"}
    assert [problem.level for problem in Table(path=path, columns=columns).rows()] == [None, "easy"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'levels'; columns found: 'prompt', 'answer'"):
        Table(path=path, columns=columns | {"level": "levels"}).rows()


def test_rows_without_an_answer_are_refused_or_left_out_and_counted(tmp_path, caplog):
    rows = [{"prompt": f"{i}?", "answer": "" if i % 2 else i} for i in range(6)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 3 of 6 rows have nothing in .*data\.unanswered=drop"):
        Table(path=path).rows()
    assert [problem.answer for problem in Table(path=path, unanswered="drop").rows()] == ["0", "2", "4"]
    assert "3 of 6 rows" in caplog.text and "a.jsonl:2" in caplog.text
    with pytest.raises(DataError, match="1 of 1 rows"):
        Table(path=write(tmp_path / "b.jsonl", rows[1:2]), unanswered="drop").rows()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": {"prompt": "a", "answer": "b", "levels": "c"}}, ["data.columns.levels", "did you mean 'level'"]),
        ({"columns": {"prompt": "a"}}, ["data.columns.answer: missing"]),
        ({"columns": {"prompt": "a", "answer": None, "options": "b"}}, ["data.columns.answer: null", "right option"]),
        ({"columns": {"prompt": "a", "answer": 3}}, ["data.columns.answer", "found 3"]),
        ({"evaluation_share": 1.0}, ["data.evaluation_share", "1.0"]),
        ({"evaluation_split": "test"}, ["data.evaluation_split", "data.hub is not set"]),
        ({"train_size": 0}, ["data.train_size", "0"]),
        ({"system": "remove"}, ["system", "'remove'", "drop"]),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ConfigError) as caught:
        Table(**{"path": "a.jsonl"} | settings)
    assert all(word in str(caught.value) for word in said)
