"""`upge push`: the card from a run's files, and the upload to a hub on this machine."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.config import compose
from experiments.push.__main__ import main
from experiments.push.card import card
from experiments.report.folder import read_run
from tests.running import environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    path = tmp_path / "run"
    (path / "final").mkdir(parents=True)
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (path / "final" / name).write_text(content)
    arguments = ["algo=grpo", "correction=[tis,kl_k3]", "model=qwen2.5-0.5b", "data=table", "data.hub=openai/gsm8k"]
    composed = compose([*arguments, "optimizer.lr=2e-5", "steps=4"])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(composed.tree)))
    run = {"format": 2, "names": dict(composed.names), "formula_text": "grad = w · Â", "finished_step": 4}
    run |= {"command": "python -m experiments.run algo=grpo steps=4", "versions": {"torch": "2.13.0"}}
    (path / "run.json").write_text(json.dumps(run))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": s / 8}) + "\n" for s in (1, 2, 3, 4)))
    lines = [
        {"step": step, "samples": 2, "all": {"greedy": greedy, "pass@2": 0.5, "mean@2": 0.25, "problems": 8}}
        for step, greedy in ((0, 0.125), (4, 0.375))
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line | {"levels": {}}) + "\n" for line in lines))
    return path


def test_the_card_is_written_from_the_run(folder: Path) -> None:
    text = card(read_run(folder), "mine")
    _, front, body = text.split("---\n", 2)
    metadata = OmegaConf.to_container(OmegaConf.create(front))
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["upge", "grpo", "tis", "kl_k3"],
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["openai/gsm8k"],
    }
    assert body.startswith("\n# mine\n\nQwen/Qwen2.5-0.5B, trained with `grpo+tis+kl_k3`")
    for part in (
        "\n```\ngrad = w · Â\n```\n",
        "| `optimizer.lr` | 2e-05 |",
        "| all | 8 | 12.5 → 37.5 | 50.0 → 50.0 | 25.0 → 25.0 |",
        "step 0 → 4",
        "## Metrics of step 4",
        "| `loss` | 0.5 |",
        "\n```\npython -m experiments.run algo=grpo steps=4\n```\n",
        "| torch | 2.13.0 |",
        "hub: openai/gsm8k",
    ):
        assert part in body, part


def test_a_file_is_named_without_folder_and_suffix(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    names = run["names"] | {"algo": "mine/middle.yaml", "correction": "tis,near/cap.yaml"}
    (folder / "run.json").write_text(json.dumps(run | {"names": names}))
    text = card(read_run(folder), "mine")
    assert OmegaConf.create(text.split("---\n", 2)[1]).tags == ["upge", "middle", "tis", "cap"]
    assert "trained with `middle+tis+cap`" in text


def test_the_card_of_a_run_with_little_on_record(folder: Path) -> None:
    for name in ("evaluations.jsonl", "run.json"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.yaml").write_text("model: {path: /some/where}\n")
    text = card(read_run(folder), "mine")
    assert "base_model" not in text and "Accuracy" not in text and "# mine" in text


@contextmanager
def hub(refuses: int = 0) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A hub that records what it is asked: (path, content of the request)."""
    requests: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            lines = [json.loads(line) for line in content.splitlines()]
            requests.append((self.path, lines[0] if len(lines) == 1 else lines))
            self._answer(lines)

        def do_GET(self) -> None:
            requests.append((self.path, None))
            self._answer([])

        def _answer(self, lines: list[Any]) -> None:
            answer: dict[str, Any] = {}
            if self.path == "/api/repos/create":
                answer = {"url": f"{address}/me/model", "name": "me/model", "id": "1"}
            elif "/preupload/" in self.path:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in lines[0]["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{address}/me/model/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            elif self.path == "/api/models/me/model":
                answer = {"id": "me/model", "sha": "abc", "siblings": []}
            body = json.dumps(answer).encode()
            self.send_response(refuses or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield address, requests
    finally:
        server.shutdown()
        server.server_close()


def push(address: str, *arguments: str, token: str = "hf_made_up") -> subprocess.CompletedProcess:
    """The command with this hub in place of the real one, which is read when huggingface_hub is imported."""
    variables = environment() | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": "/nonexistent"}
    start = [sys.executable, "-m", "experiments.push", *arguments]
    return subprocess.run(start, env=variables, capture_output=True, text=True, timeout=120)


def test_the_model_and_its_card_are_uploaded(folder: Path) -> None:
    with hub() as (address, requests):
        done = push(address, str(folder), "repo=me/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/me/model/commit/abc")
    asked = dict(requests)
    created = asked["/api/repos/create"]
    assert created["name"] == "model" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    header, *files = next(content for path, content in requests if "/commit/" in path)
    assert header["value"]["summary"] == "run, step 4"
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]).decode() for one in files}
    assert sent["model.safetensors"] == "weights" and set(sent) == {path.name for path in (folder / "final").iterdir()}
    assert sent["README.md"] == (folder / "final" / "README.md").read_text() and "grad = w · Â" in sent["README.md"]


def test_a_refusal_of_the_hub_is_one_line(folder: Path) -> None:
    with hub(refuses=403) as (address, _):
        done = push(address, str(folder), "repo=me/model")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: repo: me/model was not uploaded: ") and "403" in line


def test_a_dry_run_uploads_nothing_and_an_edited_card_is_kept(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder), "repo=me/model", "--dry-run"]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    path = folder / "final" / "README.md"
    assert "# model\n" in path.read_text()
    path.write_text("mine")
    assert main([str(folder), "repo=me/model", "--dry-run"]) == 0 and path.read_text() == "mine"


def test_what_cannot_be_pushed_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "found 0 folders" in refused() and "there is no such folder" in refused(f"{folder}/nowhere", "repo=a")
    assert "repo: missing; give repo=OWNER/NAME" in refused(str(folder))
    assert "rep: unknown key; did you mean 'repo'?" in refused(str(folder), "rep=x")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"finished_step": None}))
    assert "is being continued" in refused(str(folder), "repo=me/model")
    for path in (folder / "final").iterdir():
        path.unlink()
    (folder / "final").rmdir()
    assert "has no final/: the run has not ended" in refused(str(folder), "repo=me/model")
