"""Files and folders that a user gives and that are not what they should be: one message that names them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.command_lines import BOMB, DEEP, TINY
from tests.faults.test_command_lines import empty_folder, refused

__all__ = ["empty_folder"]  # a fixture

#: What any YAML file may turn out to be → its bytes and a fragment of the message.
YAML: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ""),
    "a list": (b"- a\n- b\n", ""),
    "a number": (b"3", "not valid YAML"),
    "open": (b"a: [", "not valid YAML"),
    "tabs": (b"a:\n\t- b", "not valid YAML"),
    "binary": (bytes(range(256)), "not valid YAML"),
    "Latin-1": ("a: é".encode("latin-1"), "not valid YAML"),
    "a tag": (b"a: !!python/object/apply:os.system [touch made]", "not valid YAML"),
    "deep": (f"a: {DEEP}".encode(), "nests more than 64 levels"),
    "a bomb": (BOMB.encode(), "values, aliases expanded"),
    "an alias of itself": (b"a: &a [*a]", ""),
    "large": (b"a: " + b"x" * 2_000_000, "bytes; a configuration has at most"),
    "an unknown key": (b"colour: blue", ""),
}
#: How a command is given a YAML file.
READERS = {
    "algorithm": ("run", ["algo={file}", "output=new"], "algo"),
    "correction": ("run", ["algo=grpo", "correction={file}", "output=new"], "correction"),
    "suite": ("evaluate", [f"model={TINY}", "suite={file}", "output=new"], "suite"),
    "suite in training": ("run", ["eval.suite={file}", "output=new"], "suite"),
    "sweep": ("sweep", ["sweep={file}", "output=new"], ""),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", YAML)
def test_a_yaml_file(content: str, reader: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, fragment = YAML[content]
    if reader == "sweep" and content in ("empty", "an alias of itself", "an unknown key"):
        pytest.skip("a sweep of one run with such a key, which the run refuses")
    file = empty_folder / "given.yaml"
    file.write_bytes(text)
    command, arguments, key = READERS[reader]
    message = refused(capsys, command, *(one.format(file=file) for one in arguments))
    assert fragment in message and key in message, message
    assert os.listdir(empty_folder) == ["given.yaml"]


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_in_place_of_a_yaml_file(reader: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_folder / "given.yaml").mkdir()
    command, arguments, _ = READERS[reader]
    assert "given.yaml" in refused(capsys, command, *(one.format(file="given.yaml") for one in arguments))


ROW = {"prompt": "1+1?", "answer": "2"}


def rows(*changed: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in (ROW, *changed)).encode()


#: What a data file may turn out to be → its name, its bytes and a fragment of the message.
DATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "empty"),
    "binary": ("a.jsonl", bytes(range(256)) * 9, "a.jsonl"),
    "not JSON": ("a.jsonl", rows() + b"{", "a.jsonl:2"),
    "a list": ("a.jsonl", rows([1]), "a.jsonl:2"),
    "a number": ("a.jsonl", rows(3), "a.jsonl:2"),
    "deep": ("a.jsonl", rows() + DEEP.encode() * 30 + b"\n", "a.jsonl:2"),
    "no answer": ("a.jsonl", rows({"prompt": "2+2?"}), "a.jsonl:2"),
    "an empty answer": ("a.jsonl", rows({"prompt": "2+2?", "answer": ""}), "a.jsonl:2"),
    "an answer of another kind": ("a.jsonl", rows({"prompt": "2+2?", "answer": {"x": 1}}), "a.jsonl:2"),
    "a prompt of another kind": ("a.jsonl", rows({"prompt": 3, "answer": "2"}), "a.jsonl:2"),
    "half a surrogate": ("a.jsonl", rows() + b'{"prompt": "\\ud800", "answer": "2"}\n', "a.jsonl:2"),
    "a number of many digits": ("a.jsonl", rows() + b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", "a.jsonl:2"),
    "no parquet": ("a.parquet", b"PAR1 and no more", "a.parquet"),
    "another format": ("a.csv", b"a,b\n", "a.csv"),
    "JSON with one object": ("a.json", b"{}", "a.json"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", DATA)
def test_a_data_file(content: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, text, fragment = DATA[content]
    (empty_folder / name).write_bytes(text)
    assert fragment in refused(
        capsys, "run", "data=table", f"data.path={name}", "algo=grpo", "eval.every=-1", "output=new"
    )
    assert os.listdir(empty_folder) == [name]


def change(name: str, **values: object) -> Callable[[Path], None]:
    """Changes a JSON file of a model's folder."""

    def apply(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | values))

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Replaces a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def remove(*names: str) -> Callable[[Path], None]:
    """Removes files."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


#: What is wrong with the folder of a model → how it comes about, and a fragment of the message.
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "no config.json"),
    "config is empty": (write("config.json", b""), "model.path"),
    "config is a list": (write("config.json", b"[]"), "model.path"),
    "config is deep": (write("config.json", DEEP.encode() * 30), "model.path"),
    "config is binary": (write("config.json", bytes(range(256))), "model.path"),
    "an unknown architecture": (change("config.json", model_type="nothing"), "model.path"),
    "code of its own": (
        change("config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}),
        "model.path",
    ),
    "no layers": (change("config.json", num_hidden_layers=0), "num_hidden_layers"),
    "too many layers": (change("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "a negative width": (change("config.json", hidden_size=-128), "model.path"),
    "a width of another kind": (change("config.json", hidden_size="wide"), "model.path"),
    "too few embeddings": (
        change("config.json", vocab_size=50),
        "has 50 embeddings, but its tokenizer makes the token",
    ),
    "few positions": (change("config.json", max_position_embeddings=8), "exceeds the 8 positions"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "a broken tokenizer": (write("tokenizer.json", b"{}"), "no tokenizer could be loaded"),
    "a tokenizer without an end": (change("tokenizer_config.json", eos_token=None), "end-of-sequence"),
    "a broken generation config": (write("generation_config.json", b"{"), "generation_config.json cannot be read"),
    "stop tokens that are words": (change("generation_config.json", eos_token_id=["<eos>"]), "eos_token_id in"),
    "a chat template that does not parse": (
        change("tokenizer_config.json", chat_template="{% for %}"),
        "model.template",
    ),
    "a chat template that fails": (change("tokenizer_config.json", chat_template="{{ 1 // 0 }}"), "model.template"),
    "a chat template that never ends": (
        change("tokenizer_config.json", chat_template="{% for i in range(10**9) %}{{ messages }}{% endfor %}"),
        "model.template",
    ),
    "a chat template with loops in loops": (
        change("tokenizer_config.json", chat_template=3 * "{% for i in range(9**5) %}" + 3 * "{% endfor %}"),
        "does not end within 0.5 s",
    ),
    "a chat template of gigabytes": (
        change("tokenizer_config.json", chat_template="{{ messages[0]['content'] * 10**7 }}"),
        "characters, more than",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder(
    case: str, empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upge.data.prompting.LONGEST_RENDERING", 0.5)
    folder = empty_folder / "model"
    shutil.copytree(TINY, folder)
    (folder / "own.py").write_text("open('made', 'w')\n")
    spoil, fragment = MODELS[case]
    spoil(folder)
    assert fragment in refused(capsys, "run", f"model={folder}", "data.train_size=16", "eval.every=-1", "output=new")
    assert os.listdir(empty_folder) == ["model"]


#: Variables of a launcher → a fragment of the message.
LAUNCHED: dict[str, tuple[dict[str, str], str]] = {
    "a rank alone": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "a size alone": ({"WORLD_SIZE": "1"}, "RANK is not set"),
    "a local rank alone": ({"LOCAL_RANK": "0"}, "RANK is not set"),
    "no local rank": ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    "a rank beyond": (
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "RANK=2 is not below",
    ),
    "a word": ({"RANK": "first", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is 'first', not a number"),
    "a negative size": ({"RANK": "0", "WORLD_SIZE": "-1", "LOCAL_RANK": "0"}, "WORLD_SIZE is '-1'"),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_variables_of_a_launcher(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, fragment = LAUNCHED[case]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fragment in refused(capsys, "run", "output=new")
