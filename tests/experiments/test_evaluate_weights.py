"""A continued evaluation measures the model that it began with: other weights are refused, another engine is noted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.evaluate import folder
from experiments.evaluate.folder import difference, fingerprint
from tests.evaluating import SMALL, refused, run, sample_lines
from tests.running import ROOT
from upge import rollout

TINY = ROOT / "experiments" / "models" / "tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path):
    """A folder such as RUN/best."""
    return shutil.copytree(TINY, tmp_path / "best")


def small(model, out):
    return [f"model={model}", *SMALL[1:], "limit=2", "suite.skip=[long_sums]", f"output={out}"]


def overwrite(model, factor: float = 0.5) -> None:
    """As training does: files of the same names and sizes with other numbers."""
    path = model / "model.safetensors"
    tensors = {name: tensor * factor for name, tensor in load_file(path).items()}
    size = path.stat().st_size
    save_file(tensors, path, {"format": "pt"})
    assert path.stat().st_size == size


def forget(out, left: int) -> None:
    """As if it had been stopped: all but `left` samples go."""
    path = out / "samples" / "sums.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))


def test_overwritten_weights_are_refused(tmp_path, capsys, model):
    out = tmp_path / "eval"
    run(*small(model, out))
    first = sample_lines(out)
    forget(out, 5)
    capsys.readouterr()
    overwrite(model)
    error = refused(capsys, *small(model, out))
    assert f"model: {model} no longer holds the weights" in error and str(out) in error
    assert "model.safetensors is " in error and "another output" in error
    assert sum(map(len, sample_lines(out).values())) == 5
    overwrite(model, factor=2.0)
    run(*small(model, out))
    assert sample_lines(out) == first
    # Without samples there is nothing to mix.
    forget(out, 0)
    overwrite(model)
    run(*small(model, out))
    assert json.loads((out / "run.json").read_text())["weights"] == fingerprint(str(model))


def test_weights_that_change_while_they_are_loaded(tmp_path, capsys, model, monkeypatch):
    load = rollout.load

    def slowly(*arguments, **options):
        overwrite(model)
        return load(*arguments, **options)

    monkeypatch.setattr(rollout, "load", slowly)
    run(*small(model, tmp_path / "eval"), code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "were overwritten while they were loaded: model.safetensors is" in error and "copy" in error
    assert not (tmp_path / "eval").exists()


def test_another_engine_is_noted(tmp_path, capsys):
    out = tmp_path / "eval"
    run(*small("tiny", out))
    assert "were drawn with" not in capsys.readouterr().out
    forget(out, 5)
    metadata = json.loads((out / "run.json").read_text())
    before = {**metadata, "engine": "vllm", "starts": [{**metadata["starts"][0], "engine": "vllm"}]}
    (out / "run.json").write_text(json.dumps(before))
    run(*small("tiny", out))
    assert f"note: earlier responses in {out} were drawn with vllm\n" in capsys.readouterr().out
    metadata = json.loads((out / "run.json").read_text())
    assert [one["engine"] for one in metadata["starts"]] == ["vllm", "transformers"]
    assert metadata["engine"] == "transformers"


def test_every_file_and_every_part_of_it_counts(tmp_path, monkeypatch):
    """Beginning, middle and end of each; files that are no weights do not matter."""
    monkeypatch.setattr(folder, "PROBE", 10)
    torch.save({}, tmp_path / "optimizer.pt")
    content = bytes(range(100))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    first = fingerprint(str(tmp_path))
    assert list(first) == ["a.safetensors", "b.safetensors"]
    for place in (0, 50, 99):
        (tmp_path / "b.safetensors").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        actual = difference(fingerprint(str(tmp_path)), first)
        assert actual.startswith("b.safetensors is 100 bytes, ") and ", but was 100 bytes, " in actual
    (tmp_path / "b.safetensors").unlink()
    assert difference(fingerprint(str(tmp_path)), first).startswith("b.safetensors is not there, but was ")
    assert difference(first, first) == difference({}, first) == difference(first, {}) == ""


def test_of_a_hub_name_the_commit_in_the_cache(tmp_path, monkeypatch):
    """In the cache's documented layout; without it nothing is said, and nothing is asked of the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("some/model") == fingerprint("no name: at all") == {}
    place = tmp_path / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    (place / "snapshots" / COMMIT / "config.json").write_text("{}")
    assert fingerprint("some/model") == {"commit": COMMIT}
