"""Whole evaluations: what they leave, that they survive a kill, and that a continued one equals one left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from experiments.evaluate.prepare import keys
from experiments.run.problems import suite_problems
from tests.evaluating import SMALL, refused, run, sample_lines, start
from tests.running import ROOT, lines
from upge.errors import ConfigError
from upge.train.config import EvalConfig

TINY = ROOT / "experiments" / "models" / "tiny"


def test_a_whole_evaluation(tmp_path, capsys):
    """Every response of every problem is there once, and the scores are those of the lines."""
    out = tmp_path / "eval"
    samples = ("suite.benchmarks.sums.samples=3", "suite.benchmarks.long_sums.samples=2")
    run(*SMALL, *samples, "verify.verifier=math", f"output={out}")
    printed = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["benchmarks"]) == ["sums", "long_sums"]
    for name, problems, n in (("sums", 10, 3), ("long_sums", 6, 2)):
        rows = lines(out / "samples" / f"{name}.jsonl")
        assert len({(row["id"], row["sample"]) for row in rows}) == len(rows) == problems * n
        assert {row["sample"] for row in rows} == set(range(n))
        assert {row["benchmark"] for row in rows} == {name}
        for row in rows:
            right = row["response"].endswith(f"\\boxed{{{row['answer']}}}")
            assert row["correct"] == right == (row["reward"] == 1.0) and row["status"] == "ok"
            assert row["prompt"] == row["id"].partition("/")[2] + "\n" and row["id"].startswith(row["level"])
            # A token of this model is a character; the one that ends a response is not shown.
            assert row["tokens"] == len(row["response"]) + row["finished"]
        mean = sum(row["correct"] for row in rows) / len(rows)
        figures = scores["benchmarks"][name]
        assert figures["avg"]["value"] == pytest.approx(mean, abs=1e-12)
        assert figures["unfinished"] == pytest.approx(sum(not row["finished"] for row in rows) / len(rows), abs=1e-12)
        assert figures["problems"] == problems and figures["samples"] == n
        assert sum(part["problems"] for part in figures["levels"].values()) == problems
        assert f"{name}: avg@{n} {100 * mean:.1f} %" in printed
    assert scores["benchmarks"]["sums"]["avg"]["value"] > 0.7
    assert scores["benchmarks"]["long_sums"]["unfinished"] > 0
    assert scores["averages"]["ood"]["avg"]["value"] == scores["benchmarks"]["long_sums"]["avg"]["value"]
    metadata = json.loads((out / "run.json").read_text())
    assert metadata["engine"] == "transformers" and metadata["names"] == {"model": "tiny", "suite": "smoke"}
    assert "experiments.evaluate model=tiny" in metadata["command"] and len(metadata["starts"]) == 1
    assert "example prompt (" in printed and "math, average" in printed


def test_nothing_is_sampled_twice(tmp_path, capsys):
    """A finished evaluation says its scores again; another seed draws other responses, another copy, too."""
    out, other = tmp_path / "eval", tmp_path / "other"
    few = [*SMALL, "suite.skip=[long_sums]", "suite.benchmarks.sums.samples=4", "suite.temperature=1.5"]
    run(*few, f"output={out}")
    before, scores = (out / "samples" / "sums.jsonl").read_bytes(), (out / "scores.json").read_bytes()
    capsys.readouterr()
    run(*few, f"output={out}")
    printed = capsys.readouterr().out
    assert "40 of 40 responses are there" in printed and "rollouts:" not in printed
    assert (out / "samples" / "sums.jsonl").read_bytes() == before and (out / "scores.json").read_bytes() == scores
    run(*few, f"output={other}", "seed=1")
    rows = [lines(folder / "samples" / "sums.jsonl") for folder in (out, other)]
    responses = [{(row["id"], row["sample"]): row["response"] for row in part} for part in rows]
    differing = sum(responses[0][key] != responses[1][key] for key in responses[0])
    assert differing > 10
    ids = {id for id, _ in responses[0]}
    assert any(len({responses[0][id, copy] for copy in range(4)}) > 1 for id in ids)


def test_a_skipped_benchmark_is_made_up_for(tmp_path):
    """suite.skip may change; the rest of the folder stays as it was."""
    out = tmp_path / "eval"
    run(*SMALL, f"output={out}", "suite.skip=[sums]")
    first = sample_lines(out)
    assert list(first) == ["long_sums"]
    run(*SMALL, f"output={out}")
    assert sample_lines(out)["long_sums"] == first["long_sums"]
    assert set(json.loads((out / "scores.json").read_text())["benchmarks"]) == {"sums", "long_sums"}
    metadata = json.loads((out / "run.json").read_text())
    assert [one["engine"] for one in metadata["starts"]] == ["transformers"] * 2


def test_a_start_that_draws_nothing_keeps_the_folder_true(tmp_path, capsys):
    """config.yaml follows suite.skip even then; a benchmark that has samples is not dropped from the scores."""
    out = tmp_path / "eval"
    few = [*SMALL, "limit=2", f"output={out}"]
    run(*few, "suite.skip=[sums]")
    run(*few)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error = refused(capsys, *few, "suite.skip=[sums]")
    assert f"suite.skip: sums has samples in {out}" in error and "another output" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # As if it had been stopped after the last response, with the settings that it began with.
    skipped = yaml.safe_load((out / "config.yaml").read_text())
    skipped["suite"]["skip"] = ["sums"]
    (out / "config.yaml").write_text(yaml.safe_dump(skipped))
    run(*few)
    assert yaml.safe_load((out / "config.yaml").read_text())["suite"]["skip"] == []
    metadata = json.loads((out / "run.json").read_text())
    assert [one["engine"] for one in metadata["starts"]] == ["transformers", "transformers", None]
    assert metadata["engine"] == "transformers" and metadata["started"] == metadata["starts"][1]["started"]


#: Long enough to be met in the middle.
SIZES = [f"suite.benchmarks.{name}.data.evaluation_size=24" for name in ("sums", "long_sums")]
LONGER = (*SMALL, *SIZES, "suite.temperature=1.2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    run(*LONGER, f"output={out}")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_and_continued_equals_uninterrupted(tmp_path, whole, number, code):
    """Whatever ends it, the same command goes on: no sample is lost, drawn twice, or becomes another."""
    out, log = tmp_path / "eval", tmp_path / "log"
    process = start(*LONGER, f"output={out}", log=log)
    deadline, first = time.monotonic() + 120, out / "samples" / "sums.jsonl"
    while not first.is_file() or first.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    ended, printed = process.wait(timeout=60), log.read_text()
    assert ended == code, printed
    assert code < 0 or f"output={out}" in printed
    there, wanted = sample_lines(out), sample_lines(whole)
    drawn, total = sum(map(len, there.values())), sum(map(len, wanted.values()))
    assert 5 <= drawn < total and not (out / "scores.json").exists()
    run(*LONGER, f"output={out}")
    assert sample_lines(out) == wanted
    assert (out / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


GREEDY = (*SMALL, "suite.temperature=0", *(f"suite.benchmarks.{name}.samples=1" for name in ("sums", "long_sums")))


def test_greedy_is_alike_for_all_seeds(tmp_path):
    for seed in (0, 1):
        run(*GREEDY, f"seed={seed}", f"output={tmp_path / str(seed)}")
    assert sample_lines(tmp_path / "0") == sample_lines(tmp_path / "1")


@pytest.mark.slow
def test_with_vllm(tmp_path):
    """Greedy, both engines give the same responses."""
    pytest.importorskip("vllm")
    process = start(*GREEDY, "rollout.engine=vllm", f"output={tmp_path / 'vllm'}", log=tmp_path / "log")
    code, printed = process.wait(timeout=300), (tmp_path / "log").read_text()
    assert code == 0 and "rollouts: vllm" in printed, printed
    run(*GREEDY, f"output={tmp_path / 'transformers'}")
    vllm, transformers = (sample_lines(tmp_path / name) for name in ("vllm", "transformers"))
    # Rounding may turn a tie.
    same = sum(line in transformers[name] for name, actual in vllm.items() for line in actual)
    assert same >= 15 and sum(map(len, vllm.values())) == 16


def test_a_runs_model_is_spoken_to_as_in_the_run(tmp_path, capsys):
    """Template and instruction are the run's, unless they are given."""
    run_folder = tmp_path / "my-run"
    shutil.copytree(TINY, run_folder / "final")
    model = {"path": "x", "template": "Q: {prompt} A:\n", "instruction": " (a sum)", "opening": "", "dtype": "float32"}
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"algo": {}, "model": model}))
    (run_folder / "run.json").write_text("{}")
    small = [f"model={run_folder / 'final'}", *SMALL[1:], "--dry-run"]
    run(*small)
    printed = capsys.readouterr().out
    assert " (a sum) A:" in printed and "→ evals/my-run-final-smoke" in printed
    taken = "note: model.dtype, model.template, model.instruction, model.opening as in"
    assert f"{taken} {run_folder / 'config.yaml'}" in printed
    run(*small, "model.template={prompt}>")
    printed = capsys.readouterr().out
    assert " (a sum)>" in printed and "Q:" not in printed
    assert "note: model.dtype, model.instruction, model.opening as in" in printed
    # Also its template's arguments; the template of tiny has no variables.
    own = {"path": "x", "template": "chat", "template_arguments": {"enable_thinking": False}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"algo": {}, "model": own}))
    for more in ([], ["model.template_arguments.enable_thinking=true"]):
        error = refused(capsys, *small, *more)
        assert error.startswith("error: model.template_arguments.enable_thinking: the chat template of")
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"algo": {}, "model": model}))
    # A preset's name with the run's model as its path is no other policy.
    run("model=tiny", f"model.path={run_folder / 'final'}", *SMALL[1:], "model.opening=Well", "--dry-run")
    printed = capsys.readouterr().out
    assert " (a sum) A:" in printed
    assert f"note: model.dtype, model.template, model.instruction as in {run_folder / 'config.yaml'}" in printed


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*SMALL, "limit=4", "--dry-run")
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    words = [line.split() for line in printed.splitlines()]
    assert ["sums", "math", "4", "of", "10", "8", "32", "14", "number"] in words, printed
    assert "64 responses, at most 3072 tokens" in printed and "→ evals/tiny-smoke" in printed
    Path("evals/tiny-smoke").mkdir(parents=True)
    run(*SMALL, "--dry-run")
    assert "→ evals/tiny-smoke-2" in capsys.readouterr().out


def test_help_names_every_key(capsys):
    run("--help", "all")
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert all(f"{key}=" in printed and " ".join(meaning.split()) in words for key, _, meaning in keys())
    assert "gradient_checkpointing" not in printed and max(map(len, printed.splitlines())) <= 120
    assert "seed=0 " in printed and 'output="" ' in printed


def test_a_suite_during_training():
    """Its problems, each with its benchmark's name as the level."""
    problems = suite_problems(EvalConfig(suite="smoke", limit=3), "number")
    assert [p.level for p in problems] == ["sums"] * 3 + ["long_sums"] * 3
    assert len({p.id for p in problems}) == 6 and all(p.verifier == "number" for p in problems)
    left = suite_problems(EvalConfig(suite="smoke", skip=["sums"]), "number")
    assert {p.level for p in left} == {"long_sums"}
    with pytest.raises(ConfigError, match=r"eval\.skip: no benchmark 'sum'; did you mean 'sums'"):
        suite_problems(EvalConfig(suite="smoke", skip=["sum"]), "math")
    with pytest.raises(ConfigError, match=r"eval\.folder: /no/such is not a folder"):
        suite_problems(EvalConfig(suite="smoke", folder="/no/such"), "math")
