"""What is remembered from one start to the next: the same as without, made anew when anything changes or is damaged."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.pretrain import build_tokenizer
from experiments.run import answer_check
from upge import cache
from upge.data import Problem, Prompting, encode
from upge.data import tokens as encoding
from upge.verify.math import MathVerifier

LIMITS = {"max_prompt_tokens": 64, "max_response_tokens": 64}
PROBLEMS = [
    Problem(str(i), f"{i}+{i}=?", str(2 * i), (f"\\boxed{{{2 * i}}}", "")[: i % 3], rejected="7") for i in range(300)
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPGE_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "LEAST", 1)
    monkeypatch.setattr(answer_check, "_known", {})
    return tmp_path


@pytest.fixture
def prompting() -> Prompting:
    return Prompting(build_tokenizer())


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_examples_are_the_same_with_and_without(folder: Path, prompting: Prompting, monkeypatch):
    made = encode(PROBLEMS, prompting, **LIMITS)
    entries = kept(folder)
    assert len(entries) == 3  # prompts, demonstrations, rejected responses
    monkeypatch.setattr(encoding, "_made", None)
    assert encode(PROBLEMS, prompting, **LIMITS) == made
    # Limits decide what becomes of the tokens, not what they are.
    assert encode(PROBLEMS, prompting, max_prompt_tokens=64, max_response_tokens=3).dropped_demonstrations > 0
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "LEAST", 10**9)
    assert encode(PROBLEMS, prompting, **LIMITS) == made and kept(folder) == entries


def test_whatever_decides_on_the_tokens_gives_another_entry(folder: Path, prompting: Prompting):
    texts, tokenizer = ["1+1", "2"], prompting.tokenizer
    other = build_tokenizer()
    other.add_tokens(["1+"])
    split = build_tokenizer()
    split.split_special_tokens = True
    keys = {
        encoding._key(texts, split, "a"),
        encoding._key(texts, tokenizer, "a"),
        encoding._key(texts, tokenizer, "b"),
        encoding._key(["1+12", ""], tokenizer, "a"),
        encoding._key(["1+1", "2", ""], tokenizer, "a"),
        encoding._key(texts, other, "a"),
    }
    assert len(keys) == 6 and encoding._key(texts, build_tokenizer(), "a") in keys
    assert encoding._key(texts, object(), "a") is None
    before = prompting.prompt_ids(PROBLEMS)
    for changed in ({"template": "{prompt}"}, {"opening": "4"}, {"system": "9"}, {"instruction": "="}):
        assert replace(prompting, **changed).prompt_ids(PROBLEMS) != before
    assert len(kept(folder)) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_entry_is_made_anew(folder: Path, prompting: Prompting, damage):
    made = prompting.prompt_ids(PROBLEMS)
    (path,) = kept(folder)
    damage(path)
    assert prompting.prompt_ids(PROBLEMS) == made == prompting.prompt_ids(PROBLEMS)


def test_a_home_that_cannot_be_used_is_done_without(folder: Path, prompting: Prompting, monkeypatch):
    made = prompting.prompt_ids(PROBLEMS)
    (folder / "file").write_text("")
    monkeypatch.setenv("UPGE_CACHE", str(folder / "file"))
    assert prompting.prompt_ids(PROBLEMS) == made
    monkeypatch.setenv("UPGE_CACHE", str(folder / "full"))
    monkeypatch.setattr(cache.Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("no space left")))
    assert prompting.prompt_ids(PROBLEMS) == made and kept(folder / "full") == []

    def nowhere(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "expanduser", nowhere)
    assert prompting.prompt_ids(PROBLEMS) == made


def test_the_oldest_entries_make_room(folder: Path, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 2)
    (folder / "things").mkdir()
    for name, age in (("killed.part", 100_000), ("growing.part", 10)):
        (folder / "things" / name).write_text("")
        cache.os.utime(folder / "things" / name, (cache.time.time() - age,) * 2)
    for number, key in enumerate("abc"):
        with cache.entry("things", key) as one:
            assert one.read() is None
            one.write([b"12", b"3"])
        path = folder / "things" / key
        cache.os.utime(path, (number, number))
        if key == "b":
            with cache.entry("things", "a") as one:
                assert bytes(one.read()) == b"123"  # asked for, and so the youngest
    assert [path.name for path in kept(folder)] == ["a", "c", "growing.part"]


def test_of_several_processes_one_makes_it(folder: Path):
    script = (
        "import time; from upge.cache import entry\n"
        "with entry('things', 'k') as one:\n"
        "    found = one.read()\n"
        "    if found is None: time.sleep(0.5); one.write([b'x'])\n"
        "    print(found is None)"
    )
    several = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=120)[0].strip() for process in several) == ["False", "True"]


def test_answers_are_asked_about_once(folder: Path, monkeypatch):
    asked: list[str] = []
    original = MathVerifier.check_answer

    def counted(self: MathVerifier, answer: str) -> None:
        asked.append(answer)
        original(self, answer)

    monkeypatch.setattr(MathVerifier, "check_answer", counted)
    monkeypatch.setattr(answer_check, "LEAST", 100)
    problems = [*PROBLEMS, replace(PROBLEMS[0], id="bad", answer=""), replace(PROBLEMS[1], id="bad too", answer="")]
    actual = list(answer_check.refused(problems, "math"))
    assert [problem.id for problem, _ in actual] == ["bad", "bad too"] and "does not parse" in actual[0][1]
    assert len(asked) == len(set(asked)) == 301
    assert list(answer_check.refused(problems[:-1], "math")) == actual[:-1] and len(asked) == 301
    answer_check._known.clear()
    assert list(answer_check.refused(problems, "math")) == actual and len(asked) == 301
    answer_check._known.clear()
    monkeypatch.setattr(answer_check, "_version", lambda package: "another")
    assert list(answer_check.refused(problems, "math")) == actual and len(asked) == 602
