"""`upge watch`: the lines of a growing and a rewound file, the table, and a report on the loopback interface alone."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.report import page
from experiments.watch import server
from experiments.watch.__main__ import _live, main
from experiments.watch.tail import COLUMNS, Run, Tail, cells, duration
from tests.running import environment
from upge.errors import ConfigError


def line(step: int, **more: object) -> str:
    return json.dumps({"step": step, "reward/mean": step / 10, "time/total": 2.0, **more}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run at step 3 of 10."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("steps: 10\nalgo: {}\n")
    (path / "metrics.jsonl").write_text("".join(map(line, (1, 2, 3))))
    scores = {"greedy": 0.5, "pass@2": 0.75, "problems": 4}
    (path / "evaluations.jsonl").write_text(json.dumps({"step": 2, "samples": 2, "all": scores}) + "\n")
    return path


def test_a_tail_reads_each_line_once_and_a_replaced_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == ([], False)
    path.write_text(line(1) + line(2)[:10])
    assert [one["step"] for one in tail.new()[0]] == [1]
    with path.open("a") as file:
        file.write(line(2)[10:] + "no record\n" + line(3))
    assert [one["step"] for one in tail.new()[0]] == [2, 3] and tail.new() == ([], False)
    other = tmp_path / "other"
    other.write_text(line(1))
    other.rename(path)
    lines, is_other = tail.new()
    assert is_other and [one["step"] for one in lines] == [1]


def test_a_run_that_continues_shows_no_step_twice(folder: Path) -> None:
    run = Run(folder, 10)
    run.look()
    other = folder / "other"
    other.write_text(line(1) + line(2))
    other.rename(folder / "metrics.jsonl")
    run.look()
    assert [one["step"] for one in run.lines] == [1, 2]


def test_the_summary_has_step_time_evaluation_and_alarms(folder: Path) -> None:
    run = Run(folder, 10)
    assert run.summary().startswith("no step yet")
    run.look()
    assert run.summary() == (
        "step 3 of 10, about 14 s left without evaluations; evaluation of step 2: greedy 0.500, pass@2 0.750"
    )
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 3, "alarm": "truncated", "problem": "x"}) + "\n")
    assert run.summary().endswith("; alarms: truncated (step 3)")
    assert cells({"step": 4, "reward/mean": 0.25, "loss": None}) == ["4", "0.25", *["-"] * (len(COLUMNS) - 1)]
    assert [duration(one) for one in (5, 119, 120, 7200)] == ["5 s", "119 s", "2 min", "2 h"]


def test_without_a_server_the_watch_ends_with_the_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "exit.json").write_text(json.dumps({"code": 3, "reason": "stopped by an alarm", "step": 3}))
    assert main([str(folder), "--no-serve", "every=0.01"]) == 0
    text = capsys.readouterr().out
    assert [row.split()[:2] for row in text.splitlines()[1:4]] == [["1", "0.1"], ["2", "0.2"], ["3", "0.3"]]
    assert text.endswith("the run ended with exit code 3: stopped by an alarm\n") and "http" not in text


def test_a_terminal_shows_the_last_steps(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("".join(map(line, range(1, 31))))
    (folder / "exit.json").write_text(json.dumps({"code": 0, "reason": "done", "step": 30}))
    out = io.StringIO()
    _live(Run(folder, 30), 0.01, Console(file=out, force_terminal=True, width=100), "")
    text = out.getvalue()
    assert " 30 " in text and " 19 " in text and " 18 " not in text and "exit code 0: done" in text


def get(address: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_only_the_report_is_served_and_only_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw", lambda *_: "<svg></svg>")
    with server.serving(folder, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        status, text, headers = get(address, "/")
        assert (
            status == 200 and "<html" in text and headers["Refresh"] == "30" and headers["Cache-Control"] == "no-store"
        )
        assert get(address, "/report.html")[0] == 200 and not (folder / "report.html").exists()
        for path in ("/config.yaml", "/../run/config.yaml", "/metrics.jsonl"):
            assert get(address, path)[0] == 404
        assert get(address, "/", Host="evil.example")[0] == 404
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port: {port} cannot be used"), server.serving(folder, port):
            pass
        with socket.socket() as other:
            # 127.0.0.2 is another address of the loopback interface; a server on all addresses would answer.
            assert other.connect_ex(("127.0.0.2", port)) != 0
    with pytest.raises(OSError):
        get(address, "/")


def test_the_page_is_made_anew_when_the_run_has_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(server, "report_page", lambda path: made.append(path) or f"page {len(made)}")
    report = server.Report(folder)
    assert report.page() == report.page() == "page 1"
    later = time.time() + 10
    os.utime(folder / "metrics.jsonl", (later, later))
    assert report.page() == "page 2"


def test_before_the_first_step_the_page_says_so(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    assert "There is no report yet" in server.Report(folder).page()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found 0 folders; give that of one run"),
        (["a", "b"], "found 2 folders"),
        (["nowhere"], "nowhere does not exist; give the folder that the run names"),
        ([str(Path(__file__).parent)], "is not the folder of a run: it has no config.yaml"),
        (["nowhere", "prot=3"], "prot: unknown key; did you mean 'port'?"),
        (["nowhere", "port=70000"], "port: found 70000"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_the_watch(folder: Path) -> None:
    command = [sys.executable, "-m", "experiments.watch", str(folder), "every=0.1"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("report: http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "stopped by signal 2\n", out
