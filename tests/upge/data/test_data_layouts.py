"""Layouts and files that people have: shards, CSV, gzip, JSON in text, ShareGPT, empty parts, ended turns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.upge.data.test_data_table import QUESTION, REPLY, RULES, one, write
from tests.upge.data.test_prompting import CHAT, END, EOS, PROBLEM, SPECIAL, build, spelled
from upge.data import Prompting, Table
from upge.errors import ConfigError, DataError

ROWS = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]


# Files


def test_shards_of_a_folder_and_of_a_pattern_are_one_table(tmp_path):
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards/b.jsonl", ROWS[2:])
    write(tmp_path / "shards/a.parquet", ROWS[:2])
    (tmp_path / "shards/README.md").write_text("not data")
    (tmp_path / "shards/.hidden.jsonl").write_text("not JSON")
    problems = Table(path=str(tmp_path / "shards")).rows()
    assert [problem.answer for problem in problems] == ["1", "2", "3", "4"]
    ids = [problem.id for problem in problems]
    assert ids == ["shards:a.parquet:1", "shards:a.parquet:2", "shards:b.jsonl:1", "shards:b.jsonl:2"]
    (only,) = [Table(path=str(tmp_path / "shards" / pattern)).rows() for pattern in ("b*.jsonl",)]
    assert [problem.answer for problem in only] == ["3", "4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.path: the folder .*empty has no data file"):
        Table(path=str(tmp_path / "empty")).rows()
    with pytest.raises(DataError, match=r"c\*\.jsonl does not exist"):
        Table(path=str(tmp_path / "shards/c*.jsonl")).rows()


def test_a_file_whose_name_is_like_a_pattern_is_that_file(tmp_path):
    path = write(tmp_path / "a[1].jsonl", ROWS[:1])
    write(tmp_path / "a1.jsonl", ROWS)
    assert len(Table(path=path).rows()) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_compressed_text(tmp_path, name):
    text = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "a.json": json.dumps(ROWS),
        "a.csv": "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS),
    }[name]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert [problem.answer for problem in Table(path=str(tmp_path / f"{name}.gz")).rows()] == ["1", "2", "3", "4"]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode())[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        Table(path=str(tmp_path / f"{name}.gz")).rows()


def test_csv_has_quotes_line_breaks_and_empty_cells(tmp_path):
    worked = "So\n" + "x" * 200_000 + ' is "two": \\boxed{2}'
    quoted = worked.replace('"', '""')
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,answer,worked\r\n"1,5+0,5?",2,"{quoted}"\r\n\r\n3+1?,4,\r\n', newline="")
    columns = {"prompt": "prompt", "answer": "answer", "demonstrations": "worked"}
    first, second = Table(path=str(path), columns=columns).rows()
    assert (first.prompt, first.answer, first.demonstrations) == ("1,5+0,5?", "2", (worked,))
    assert (second.prompt, second.answer, second.demonstrations) == ("3+1?", "4", ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\n1,2,3\n", r"a\.csv:2: 3 cells; the first line names 2 columns"),
        ("prompt,prompt\n1,2\n", r"a\.csv:1: the first line must name every column once"),
        ('prompt,answer\n"1,2\n', r"a\.csv:2: not CSV"),
        ("prompt,answer\n", r"a\.csv is empty"),
    ],
)
def test_bad_csv_is_named_by_its_line(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        Table(path=str(tmp_path / "a.csv")).rows()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_integer_of_thousands_of_digits_is_one_message(tmp_path, name):
    row = '{"prompt": "1+2?", "answer": ' + "9" * 5000 + "}"
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    with pytest.raises(DataError, match=r"not JSON \(Exceeds the limit"):
        Table(path=str(tmp_path / name)).rows()


# Cells


def test_lists_that_are_stored_as_text_are_lists(tmp_path):
    chat, worked = json.dumps([RULES, QUESTION]), json.dumps(["It is \\boxed{2}.", "\\boxed{2}"])
    problem = one(tmp_path, {"prompt": chat, "answer": '["2"]', "demonstrations": worked})
    assert (problem.prompt, problem.system, problem.answer) == ("1+1?", "Be brief.", "2")
    assert problem.demonstrations == ("It is \\boxed{2}.", "\\boxed{2}")
    for answers in ('["1", "2"]', ["1", "2"], [1, 2]):
        assert one(tmp_path, {"prompt": "a root?", "answer": answers}).answer == '["1", "2"]'
    measured = {"value": 9.81, "rtol": 0.01}
    assert json.loads(one(tmp_path, {"prompt": "g?", "answer": measured}).answer) == measured
    assert json.loads(one(tmp_path, {"prompt": "g?", "answer": ["9.8", measured]}).answer) == ["9.8", measured]
    assert one(tmp_path, {"prompt": "?", "answer": [{"value": 1, "rtol": 0.1}]}).answer == '{"value": 1, "rtol": 0.1}'


@pytest.mark.parametrize("answer", ["[1, 2]", "[0, 1)", "[]x", "[[1, 2], [3, 4]]"])
def test_intervals_and_matrices_stay_text(tmp_path, answer):
    assert one(tmp_path, {"prompt": "[not JSON", "answer": answer}).answer == answer


def test_empty_system_messages_and_demonstrations_are_none(tmp_path):
    chat = [RULES | {"content": " "}, QUESTION]
    assert one(tmp_path, {"prompt": chat, "answer": "2"}).system is None
    assert one(tmp_path, {"prompt": "1+1?", "answer": "2", "rules": ""}, system="rules").system is None
    for empty in ("", [""], [REPLY | {"content": ""}], [[REPLY | {"content": " "}]], []):
        assert one(tmp_path, {"prompt": "1+1?", "answer": "2", "demonstrations": empty}).demonstrations == ()
    assert one(tmp_path, {"prompt": "1+1?", "answer": "2", "demonstrations": ["", "2"]}).demonstrations == ("2",)


def test_a_conversation_holds_prompt_and_demonstration(tmp_path):
    shared = {"prompt": "chat", "demonstrations": "chat"}
    for chat in (
        [RULES, QUESTION, REPLY],
        [RULES | {"role": "developer"}, QUESTION, REPLY],
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1?"},
         {"from": "gpt", "value": REPLY["content"]}],
        [RULES, QUESTION | {"content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}, REPLY],
    ):  # fmt: skip
        problem = one(tmp_path, {"chat": chat, "answer": "2"}, **shared)
        assert (problem.prompt, problem.system) == ("1+1?", "Be brief.")
        assert problem.demonstrations == (REPLY["content"],)
    # Elsewhere the reply would be lost without a word.
    with pytest.raises(DataError, match=r"turns user, assistant; expected .*set data\.columns\.demonstrations=chat"):
        one(tmp_path, {"chat": [QUESTION, REPLY], "answer": "2"}, prompt="chat")


AGAIN, SECOND = {"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "It is 4."}
LONG = [RULES, QUESTION, REPLY, AGAIN, SECOND]
#: As in ShareGPT.
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def test_the_last_turn_of_a_conversation_is_the_demonstration_and_those_before_it_the_prompt(tmp_path):
    sharegpt = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in LONG]
    rejected = [*LONG[:-1], SECOND | {"content": "It is 5."}]
    for row, shared in (
        ({"messages": LONG}, {"prompt": "messages", "demonstrations": "messages"}),
        ({"conversations": sharegpt}, {"prompt": "conversations", "demonstrations": "conversations"}),
        ({"prompt": LONG[:-1], "completion": [SECOND]}, {"demonstrations": "completion"}),
        ({"prompt": LONG[:-1], "completion": SECOND["content"]}, {"demonstrations": "completion"}),
        ({"prompt": LONG[:-1], "chosen": [SECOND], "rejected": rejected[-1:]}, {"demonstrations": "chosen"}),
        ({"chosen": LONG, "rejected": rejected}, {"prompt": "chosen", "demonstrations": "chosen"}),
    ):
        problem = one(tmp_path, row, **shared, answer=None)
        assert (problem.prompt, problem.system, problem.answer) == ("And 2+2?", "Be brief.", ""), row
        assert problem.history == (("user", "1+1?"), ("assistant", REPLY["content"]))
        assert problem.demonstrations == ("It is 4.",)
        assert problem.rejected == ("It is 5." if "rejected" in row else None)
    single = one(tmp_path, {"prompt": "2+2?", "completion": "4"}, demonstrations="completion", answer=None)
    assert (single.prompt, single.history, single.demonstrations, single.answer) == ("2+2?", (), ("4",), "")


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prompt": LONG[:-1], "out": [QUESTION, REPLY, QUESTION, SECOND]}, {}, "are not the prompt's; .*prompt=out"),
        ({"prompt": "2+2?", "out": LONG}, {}, "those before the last are not the prompt's"),
        ({"prompt": "2+2?", "out": [REPLY, QUESTION, REPLY]}, {}, "those before the last are not the prompt's"),
        ({"out": LONG[:-1]}, {"prompt": "out"}, "turns system, user, assistant, user; expected one of the assistant"),
        ({"out": [QUESTION, SECOND | {"role": "tool"}, SECOND]}, {"prompt": "out"}, "turns user, tool, assistant"),
        ({"out": [QUESTION, REPLY | {"content": None}, AGAIN, SECOND]}, {"prompt": "out"}, "holds None"),
    ],
)
def test_a_conversation_that_is_none_is_named(tmp_path, row, columns, said):
    with pytest.raises(DataError, match=said):
        one(tmp_path, row, **columns, demonstrations="out", answer=None)


def test_conversations_with_the_same_last_turn_are_different_questions(tmp_path):
    other = [QUESTION | {"content": "3+3?"}, *LONG[2:]]
    rows = [{"chat": LONG}, {"chat": other}, {"chat": LONG[1:]}]
    columns = {"prompt": "chat", "demonstrations": "chat", "answer": None}
    paths = {key: write(tmp_path / f"{key}.jsonl", own) for key, own in (("a", rows[:1]), ("b", rows[1:2]))}
    sides = Table(path=paths["a"], evaluation_path=paths["b"], columns=columns).load()
    assert sides.train[0].prompt == sides.evaluation[0].prompt and sides.train[0] != sides.evaluation[0]
    with pytest.raises(DataError, match="the same question is on the training side"):
        Table(path=paths["a"], evaluation_path=write(tmp_path / "c.jsonl", rows[2:]), columns=columns).load()


def test_earlier_turns_are_rendered_by_the_chat_template(tmp_path):
    problem = one(tmp_path, {"chat": LONG}, prompt="chat", demonstrations="chat", answer=None)
    turns = ("system\nBe brief.", "user\n1+1?", f"assistant\n{REPLY['content']}", "user\nAnd 2+2? Box it.")
    shown = Prompting(build(), instruction=" Box it.").text(problem)
    assert [shown.index(turn) for turn in turns] == sorted(shown.index(turn) for turn in turns)
    assert shown.count("Box it.") == 1 and shown.endswith("assistant\n")
    with pytest.raises(
        ConfigError, match=r"no place for the 2 turns before the last one of .*a\.jsonl:1; use the chat"
    ):
        Prompting(build(), template="{prompt} {system}").text(problem)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"question": "1+1?", "answer": "2"}, r"data\.columns\.prompt=question"),
        ({"prompts": "-", "problem": "1+1?", "answer": "2"}, r"data\.columns\.prompt=problem"),
        (
            {"prompt": "1+1?", "reward_model": {"ground_truth": "2"}},
            r"data\.columns\.answer=reward_model\.ground_truth",
        ),
        ({"promt": "1+1?", "answer": "2"}, r"did you mean 'promt'"),
    ],
)
def test_a_missing_column_is_said_with_the_key_to_set(tmp_path, row, hint):
    path = write(Path(tmp_path) / "a.jsonl", [row])
    with pytest.raises(DataError, match=f"no column .*{hint}"):
        Table(path=path).rows()


# Templates


def test_a_turns_end_that_is_special_but_not_named_extra_stops_a_response():
    tokenizer = build(additional_special_tokens=[])
    assert SPECIAL[END] == "<|end|>" and END not in tokenizer.all_special_ids
    assert Prompting(tokenizer).stop_token_ids == (EOS, END)


def test_a_demonstration_whose_turn_has_ended_is_not_ended_again():
    prompting = Prompting(build())
    for text in ("5<|end|>", "5<|end|>\n", "5</s> "):
        assert spelled(prompting, prompting.response_ids([text])[0]) == text.strip()
    assert spelled(prompting, prompting.response_ids(["5 "])[0]) == "5 </s>"


def test_a_tag_that_the_template_opens_is_written_once():
    opens = CHAT.replace("assistant\n", "assistant\n<think>\n")
    prompting = Prompting(build(chat=opens))
    for demonstration in ("<think>\n2 + 3 = 5</think>", "<think>2 + 3 = 5</think>", "2 + 3 = 5</think>"):
        (ids,) = prompting.prompt_ids([PROBLEM])
        (response,) = prompting.response_ids([demonstration])
        assert spelled(prompting, ids + response).endswith("assistant\n<think>\n2 + 3 = 5</think></s>")
    plain = Prompting(build())
    assert spelled(plain, plain.response_ids(["<think>5"])[0]) == "<think>5</s>"
