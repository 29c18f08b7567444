"""Malformed command lines, files and folders of all commands: one message, exit code 2, nothing begun, nothing left.

The command lines are in command_lines.py. Each runs in this process, in an empty folder, and must be refused before a
model is loaded. See also tests/experiments/test_bad_input.py, test_evaluate_input.py and test_sweep_settings.py.
"""

from __future__ import annotations

import importlib
import resource
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.command_lines import LINES

ROWS = [(command, *row) for command, rows in LINES.items() for row in rows]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Starts in an empty folder, without the hub, with little memory, and without ever training or sampling."""

    def begun(*_: object) -> None:
        raise AssertionError("the input was not refused")

    for place in ("run.__main__.connect", "evaluate.__main__._sample", "sweep.__main__.execute.run"):
        monkeypatch.setattr(f"experiments.{place}", begun, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, hard))
    yield tmp_path / "here"
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    """Runs a command in this process; returns its message."""
    module = importlib.import_module(f"experiments.{command}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"experiments.{command}.__main__")
    capsys.readouterr()
    try:
        code = module.main(list(arguments))
    except SystemExit as left:  # argparse
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2, f"exit code {code}\n{out[-2000:]}\n{err[-2000:]}"
    assert err.count("error:") == 1 and "Traceback" not in out + err, err[-2000:]
    assert len(err) < 3000, f"a message of {len(err)} characters"
    return err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}"[:60].encode("ascii", "replace").decode())
def test_refused_with_one_message(row: tuple, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, given, *fragments = row
    arguments = shlex.split(given.replace("\\", "\\\\")) if isinstance(given, str) else [*given]
    if command == "run" and not any(one.startswith("output=") for one in arguments):
        arguments.append("output=new")
    message = refused(capsys, command, *arguments)
    for fragment in fragments:
        assert fragment in message, message
    assert not any(empty_folder.iterdir()), f"left behind: {[*empty_folder.iterdir()]}"
