"""Records that are damaged: a line that cannot be read costs this line alone, and it is named."""

from __future__ import annotations

import json
import warnings

import pytest

from upge.train.files import read_lines, write_atomically
from upge.train.folder import RunFolder

BAD = {
    "cut": b'{"step": 3, "lo',
    "empty object": b"{}",
    "a step that is a text": b'{"step": "3"}',
    "a list": b"[3]",
    "no text": b"\xff\x00\xfe",
    "two lines in one": b'{"step": 3}{"step": 3}',
    "depth": b'{"step": ' + b"[" * 5000,
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "true": b'{"step": true}',
}
GOOD = [b'{"step": %d, "loss": 0.5}' % step for step in (1, 2, 4, 5)]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start({"steps": 9}, {"command": "c", "started": "now", "from_step": 0}, continues=False)
    return folder


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_bad_line_costs_one_line(folder, bad, place):
    """First, in the middle and last; the other lines are read and kept, and so is the bad one."""
    lines = [*GOOD[:place], BAD[bad], *GOOD[place:]]
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.warns(UserWarning, match=rf"metrics.jsonl:{place + 1}: .* skipped"):
        assert [line["step"] for line in read_lines(path)] == [1, 2, 4, 5]
    with pytest.warns(UserWarning):
        folder.rewind(4)
    assert path.read_bytes().split(b"\n") == [line for line in lines if line != GOOD[3]] + [b""]


def test_a_last_line_that_was_cut_off_is_dropped_without_a_word(folder):
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*GOOD, BAD["cut"]]))
    with warnings.catch_warnings(action="error"):
        assert len(read_lines(path)) == 4
        folder.rewind(9)
    assert path.read_bytes() == b"".join(line + b"\n" for line in GOOD)


def test_evaluations_behind_a_bad_line_count(folder):
    path = folder.path / "evaluations.jsonl"
    path.write_bytes(b'{"step": 0}\nnot json\n{"step": 4}\n')
    with pytest.warns(UserWarning, match="evaluations.jsonl:2"):
        assert folder.is_evaluated(4) and not folder.is_evaluated(3)


def test_rows_with_half_a_surrogate_pair_are_written_and_read(folder):
    folder.write_rows("rollouts", 1, [{"response": "\ud83d", "prompt": "\u2028 é"}])
    text = (folder.path / "rollouts" / "step_000001.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == [{"response": "\ud83d", "prompt": "\u2028 é"}]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["a"]
