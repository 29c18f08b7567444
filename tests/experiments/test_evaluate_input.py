"""Every wrong key, name, value or file of an evaluation is refused with one message that names it and the fix."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest

from tests.evaluating import SMALL, refused, run
from tests.running import ROOT
from upge.errors import EngineError

WRONG = {
    "no model": (["suite=smoke"], "model: missing; give model=NAME"),
    "no suite": (["model=tiny"], "suite: missing; give suite=NAME"),
    "a word": ([*SMALL, "resume"], "'resume' is not of the form key=value"),
    "a model's name": (["model=tinny", "suite=smoke"], "did you mean 'tiny'"),
    "a suite's name": (["model=tiny", "suite=papper"], "did you mean 'paper'"),
    "a key": ([*SMALL, "suite.temprature=1"], "suite.temprature: unknown key; did you mean 'suite.temperature'"),
    "a key of training": ([*SMALL, "optimizer.lr=1"], "optimizer.lr: unknown key"),
    "a setting for training alone": ([*SMALL, "model.gradient_checkpointing=true"], "unknown key"),
    "a benchmark's name": ([*SMALL, "suite.benchmarks.sum.limit=1"], "did you mean 'sums'"),
    "a benchmark's key": ([*SMALL, "suite.benchmarks.sums.sample=1"], "did you mean 'samples'"),
    "a key below one that has none": ([*SMALL, "suite.benchmarks.sums.samples.x=1"], "has none below it"),
    "a setting of the data": ([*SMALL, "suite.benchmarks.sums.data.larges=9"], "did you mean 'largest'"),
    "a type": ([*SMALL, "suite.benchmarks.sums.samples=many"], "suite.benchmarks.sums.samples: found 'many' (str)"),
    "a list": ([*SMALL, "suite.skip=sums"], "suite.skip: found 'sums' (str), expected list"),
    "a skipped name": ([*SMALL, "suite.skip=[sum]"], "suite.skip: no benchmark 'sum'; did you mean 'sums'"),
    "everything skipped": ([*SMALL, "suite.skip=[sums,long_sums]"], "there is none to evaluate"),
    "no samples": ([*SMALL, "suite.benchmarks.sums.samples=0"], "suite.benchmarks.sums.samples: found 0"),
    "a negative limit": ([*SMALL, "limit=-1"], "limit: found -1"),
    "a negative limit of one": ([*SMALL, "suite.benchmarks.sums.limit=-1"], "suite.benchmarks.sums.limit: found -1"),
    "temperature": ([*SMALL, "suite.temperature=0.001"], "suite.temperature: found 0.001; give 0 for greedy"),
    "top_p": ([*SMALL, "suite.top_p=0"], "suite.top_p: found 0.0; it must lie in (0, 1]"),
    "response tokens": ([*SMALL, "suite.max_response_tokens=0"], "suite.max_response_tokens: found 0"),
    "prompt tokens": ([*SMALL, "suite.max_prompt_tokens=5"], "the limit is suite.max_prompt_tokens=5 ("),
    "positions": ([*SMALL, "suite.max_response_tokens=2000"], "= 2128 exceeds the 2048 positions"),
    "greedy copies": ([*SMALL, "suite.temperature=0"], "suite.benchmarks.sums.samples: 8 with suite.temperature=0"),
    "a folder": ([*SMALL, "suite.folder=/nowhere"], "suite.folder: /nowhere is not a folder"),
    "a verifier": ([*SMALL, "suite.benchmarks.sums.verifier=maths"], "maths"),
    "workers": ([*SMALL, "verify.workers=0"], "verify.workers: found 0"),
    "an engine": ([*SMALL, "rollout.engine=hf"], "rollout.engine: 'hf' is not one of"),
    "a template": ([*SMALL, "model.template=hello"], "model.template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_in_one_sentence(case, capsys, tmp_path):
    arguments, message = WRONG[case]
    assert message in refused(capsys, *arguments, f"output={tmp_path / 'eval'}"), case
    assert not (tmp_path / "eval").exists()


def test_the_folder(tmp_path, capsys):
    """One that holds something else, or another evaluation, is left alone."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is not an evaluation's folder" in refused(capsys, *SMALL, f"output={tmp_path / 'full'}")
    assert "not a folder or not writable" in refused(capsys, *SMALL, f"output={tmp_path / 'full' / 'thesis.txt' / 'x'}")
    out = tmp_path / "eval"
    run(*SMALL, "limit=1", f"output={out}")
    capsys.readouterr()
    before = (out / "config.yaml").read_bytes()
    error = refused(capsys, *SMALL, "limit=2", "seed=7", f"output={out}")
    assert "7 here, but 0 in the evaluation in" in error and "limit" in error
    assert "resume=auto" in refused(capsys, *SMALL, "limit=1", "resume=never", f"output={out}")
    assert (out / "config.yaml").read_bytes() == before
    run(*SMALL, "limit=1", "verify.workers=2", f"output={out}")


def test_samples_of_other_problems_or_half_of_one(tmp_path, capsys):
    """A damaged samples file is refused with its line; a last line that was cut off is drawn again."""
    out = tmp_path / "eval"
    small = [*SMALL, "limit=2", "suite.skip=[long_sums]", f"output={out}"]
    run(*small)
    capsys.readouterr()
    path = out / "samples" / "sums.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    run(*small)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    capsys.readouterr()
    rows = whole.splitlines()
    path.write_text("\n".join([rows[0], "oops", *rows[2:]]) + "\n")
    assert f"{path}:2: not JSON" in refused(capsys, *small)
    path.write_text("\n".join([*rows, rows[3]]) + "\n")
    assert f"{path}:17: sample" in refused(capsys, *small)
    path.write_text(json.dumps({**json.loads(rows[0]), "answer": "0"}) + "\n")
    assert "the answer of problem" in refused(capsys, *small)


def test_the_folder_of_a_run_is_not_its_model(tmp_path, capsys):
    shutil.copytree(ROOT / "experiments" / "models" / "tiny", tmp_path / "run" / "final")
    error = refused(capsys, f"model={tmp_path / 'run'}", *SMALL[1:])
    assert f"is the folder of a run; give model={tmp_path / 'run'}/final" in error


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(capsys, *SMALL)
    monkeypatch.setenv("RANK", "1")
    run(*SMALL, code=2)
    assert capsys.readouterr().err == ""


SUITES = {
    "no YAML": ("suite: [", "not valid YAML"),
    "no suite": ("benchmarks: {}", "the one key `suite`"),
    "a key": ("suite: {sampels: 3}", "suite.sampels: unknown key"),
    "a benchmark that is none": ("suite: {benchmarks: {a: 3}}", "suite.benchmarks.a: found 3"),
    "a benchmark's key": ("suite: {benchmarks: {a: {n: 3}}}", "suite.benchmarks.a.n: unknown key"),
    "a name": ("suite: {benchmarks: {a/b: {}}}", "suite.benchmarks.a/b: the name is also a file name"),
    "no data": ("suite: {benchmarks: {a: {}}}", "suite.benchmarks.a.data: missing"),
    "no data set": ("suite: {benchmarks: {a: {data: {_target_: upge.NoMask}}}}", "expected a DataSet or Rows"),
    "a class": ("suite: {benchmarks: {a: {data: {_target_: upge.data.Arithmetics}}}}", "did you mean 'Arithmetic'"),
}


@pytest.mark.parametrize("case", SUITES)
def test_a_suite_of_ones_own_is_checked(case, capsys, tmp_path):
    text, message = SUITES[case]
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused(capsys, "model=tiny", f"suite={tmp_path / 'mine.yaml'}")


def test_a_second_evaluation_in_the_same_folder_is_refused(tmp_path, capsys):
    """It would write every response twice."""
    folder = tmp_path / "eval"
    folder.mkdir()
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert f"another evaluation is using {folder}" in refused(capsys, *SMALL, f"output={folder}")
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("the vLLM engine failed (RuntimeError: gone)"), 1, "the vLLM engine failed (RuntimeError: gone)"),
        (MemoryError(), 2, "out of memory (MemoryError); lower rollout.memory_fraction or rollout.max_sequences"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), 2, "out of memory (CUDA out of memory. Tried); lower"),
    ],
)
def test_a_failure_says_how_to_continue(error, code, message, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("experiments.evaluate.__main__._sample", fail)
    run(*SMALL, f"output={tmp_path / 'eval'}", code=code)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1
    assert printed.endswith(f"; the same command with output={tmp_path / 'eval'} continues\n")
