"""A sweep from end to end: what is continued and refused, the report."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.cli import BAD_INPUT
from experiments.sweep import execute
from experiments.sweep.__main__ import main, report
from experiments.sweep.collect import measure_names, write_csv
from experiments.sweep.execute import SOME_FAILED
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import load
from experiments.sweep.tables import blocks, difference_grid, figure, mean_grid, metric_curves
from tests import forked
from upge.errors import ConfigError

TINY = [
    *("grid.algo=[sft,grpo]", "seeds=0..1", "steps=1", "prompts_per_step=2", "group_size=2", "data.train_size=8"),
    *("data.evaluation_size=8", "eval.samples=2", "checkpoint.every=0", "verify.workers=1", "verify.verifier=number"),
]  # fmt: skip


def _rows(folder: Path) -> list[dict[str, str]]:
    return [*csv.DictReader((folder / "runs.csv").read_text().splitlines())]


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    one, other = (SweepFolder(load([*TINY, f"output={tmp_path / 's'}"])) for _ in range(2))
    with one.locked() as lock:
        left = subprocess.Popen(["sleep", "2"], pass_fds=(lock,))
        with pytest.raises(ConfigError, match="is using"), other.locked():
            pass
    # What a killed sweep had started has the lock for as long as it is there.
    with pytest.raises(ConfigError, match="is using"), other.locked():
        pass
    left.wait()
    with other.locked():
        pass


def test_a_course_is_averaged_over_blocks():
    assert blocks({step: float(step) for step in range(1, 9)}, 4) == {1: 1.5, 3: 3.5, 5: 5.5, 7: 7.5}
    assert blocks({1: 1.0, 2: 3.0}, 4) == {1: 1.0, 2: 3.0}


def test_tables_of_numbers_worked_out_by_hand():
    sweep = load(["grid.algo=[a,b]", "seeds=0..2", "measures=[x]"])
    values = {"a": (0.1, 0.2, 0.3), "b": (0.2, 0.3, 0.5)}
    rows = [{"label": label, "seed": s, "x": v[s]} for label, v in values.items() for s in range(3)]
    assert figure(rows, "a", "x").runs == 3 and figure(rows, "a", "y") is None
    means = mean_grid(sweep, rows, ["x"])
    # s/√3 = 0.0577, t = 4.3027: half the interval is 0.2484.
    assert means.rows[0].cells == ("a", "3", "20.0 ± 24.8") and means.rows[1].bold == {2}
    # Differences 0.1, 0.1, 0.2: t = 0.1333/0.0333 = 4, p of two degrees = 1 - 4/√18.
    (row,) = difference_grid(sweep, rows, ["x"]).rows
    assert row.cells[:4] == ("x", "b", "3", "+13.3") and row.cells[5:] == ("0.057", "0.057")


def test_evaluations_with_the_same_benchmark_are_told_apart():
    columns = ["paper/aime24/avg", "passk/aime24/avg", "paper/math500/avg", "paper/math500/Level 1/avg", "mean@4"]
    assert list(measure_names(columns).values()) == [
        *("paper: aime24", "passk: aime24", "math500", "math500 Level 1", "mean@4"),
    ]


def test_a_report_without_what_is_asked_for_says_so(done):
    more = ["measures=[mean@2,typo]", "grid.optimizer.lr=[1e-6]", "select={key: optimizer.lr, measure: none}"]
    folder = SweepFolder(load([*TINY, *more, f"output={done.parent / 'asked'}"]))
    for planned in folder.sweep.runs:
        slug = planned.slug.replace("-lr-1e-06", "")
        shutil.copytree(done / "runs" / slug, folder.run(planned))
    actual = report(folder, "", list)
    assert any("No run has the requested typo, none" in note for note in actual.notes)
    assert "choice" not in [grid.label for grid in actual.grids]


def test_a_table_says_where_seeds_are_missing():
    sweep = load(["grid.algo=[a]", "seeds=0..2"])
    rows = [{"label": "a", "seed": s, "x": 0.5, "y": 0.5 if s else math.nan} for s in range(3)]
    assert mean_grid(sweep, rows, ["x", "y"]).rows[0].cells[1] == "2–3"


def test_figures_take_any_label_and_rewards_below_zero(done, tmp_path):
    variants = "variants={'$a_{b$': {algo: sft}, _c: {algo: grpo}}"
    sweep = load([*TINY[1:], variants, "seeds=[0]", f"output={done.parent / 'odd'}"])
    folder = SweepFolder(sweep)
    for planned in sweep.runs:
        folder.adopt(planned)
    file = folder.run(sweep.runs[0]) / "metrics.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reward/mean": -1.0}) + "\n")
    assert [path.name for path in metric_curves(folder, tmp_path)] == ["dynamics.png", "dynamics.svg"]
    assert "$a_{b$" in (tmp_path / "dynamics.svg").read_text()


def test_columns_that_only_some_runs_have_are_empty_for_others(tmp_path):
    write_csv(tmp_path / "runs.csv", [{"run": "a", "x": 1}, {"run": "b", "y": 2}])
    assert _rows(tmp_path)[1] == {"run": "b", "x": "", "y": "2"}


def test_a_wrong_key_of_a_run_is_found_before_any_is_started(tmp_path, capsys):
    assert main([*TINY, "optimizer.rate=3", f"output={tmp_path / 's'}"]) == BAD_INPUT
    assert "sft: optimizer.rate: unknown key" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_help_lists_what_ships(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "  gate " in text and "seed_keys" in text and max(map(len, text.splitlines())) <= 120


@pytest.fixture(scope="module", autouse=True)
def forked_jobs():
    """Jobs of sweeps in this process are forked; those of sweeps in processes of their own are not."""

    def popen(command, *, env, stdout, **_):
        assert command[:2] == [sys.executable, "-m"]
        return forked.start(*command[2:], environment=env, out=stdout.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=None, STDOUT=None))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "first"
    assert main([*TINY, f"output={folder}", "jobs=2"]) == 0
    return folder


def test_it_leaves_a_report_in_one_file(done):
    rows = _rows(done)
    assert [row["run"] for row in rows] == ["sft/seed-0", "sft/seed-1", "grpo/seed-0", "grpo/seed-1"]
    assert all(0 <= float(row["mean@2"]) <= 1 for row in rows)
    assert [row["generated_tokens"] != "0" for row in rows] == [False, False, True, True]
    page = (done / "report.html").read_text()
    assert "paired by seed" not in page, "two seeds are too few for a test"
    assert "<svg" in page and not re.search(r"<script [^>]|(src|href)=.http", page)
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links == [f"runs/{row['run']}/report.html" for row in rows] and all(
        (done / link).is_file() for link in links
    )
    assert "| grpo |" in (done / "report.md").read_text()


def test_what_is_done_is_not_done_again_and_more_seeds_are_added(done, capsys):
    before = (done / "runs/sft/seed-0/metrics.jsonl").stat().st_mtime_ns
    assert main([*TINY, f"output={done}", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("  done") == 4
    assert main([*TINY, f"output={done}", "seeds=0..2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("  to do") == 2
    assert main([*TINY, f"output={done}", "--report"]) == 0
    assert (done / "runs/sft/seed-0/metrics.jsonl").stat().st_mtime_ns == before


def test_other_settings_under_the_same_name_are_refused(done, capsys):
    assert main([*TINY, f"output={done}", "steps=2"]) == BAD_INPUT
    assert "steps: '2' here, but '1' when sft/seed-0" in capsys.readouterr().err


def test_a_run_with_the_very_same_settings_is_taken_over(done):
    other = SweepFolder(load([*TINY[1:], "variants={mine: {algo: sft}}", f"output={done.parent / 'second'}"]))
    actual = other.adopt(other.sweep.runs[0])
    # The keys are the same, whatever the label.
    assert actual == done / "runs/sft/seed-0" and other.is_trained(other.sweep.runs[0])
    assert not list((done.parent / "second").rglob("*.partial"))
    changed = load([*TINY[1:], "variants={mine: {algo: sft}}", "steps=2", f"output={done.parent / 'third'}"])
    assert SweepFolder(changed).adopt(changed.runs[0]) is None


def test_what_only_looks_the_same_is_not_taken_over(done, tmp_path, monkeypatch):
    """The same words, but a preset that has changed since, or a relative path, which was somebody else's."""
    third = SweepFolder(load([*TINY, f"output={done.parent / 'third'}"]))
    config = done / "runs/grpo/seed-1/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("largest: 49", "largest: 48"))
    assert text != config.read_text() and third.adopt(third.sweep.runs[3]) is None
    config.write_text(text)
    (tmp_path / "grpo").mkdir()
    with monkeypatch.context() as context:
        context.chdir(tmp_path)
        assert third.adopt(third.sweep.runs[3]) is None
    assert third.adopt(third.sweep.runs[3])


def test_an_evaluation_may_be_added_but_not_outlive_its_run(done):
    arguments = [*TINY, f"output={done}"]
    more = SweepFolder(load([*arguments, "evaluate={new: {suite: smoke}}"]))
    assert more.check() is None and [*more.sweep.config.evaluate] == ["new"]
    lone = SweepFolder(load([*arguments, "seeds=[8]", "evaluate={new: {suite: smoke}}"]))
    assert lone.check() is None and not lone.run(lone.sweep.runs[0]).exists()
    lone.evaluation(lone.sweep.runs[0], "new").mkdir(parents=True)
    with pytest.raises(ConfigError, match="belongs to a run that no longer exists"):
        lone.check()


def test_settings_of_a_run_that_was_never_started_hold_nobody_up(done):
    lone = SweepFolder(load([*TINY, "seeds=[9]", f"output={done}"]))
    lone.begin(lone.sweep.runs[0])
    changed = SweepFolder(load([*TINY, "seeds=[9]", "steps=2", f"output={done}"]))
    planned = changed.sweep.runs[0]
    assert changed._record(planned).is_file() and not changed.run(planned).exists()
    assert changed.check() is None


def test_an_evaluation_alone_is_of_one_rank(done, monkeypatch):
    begun = []
    monkeypatch.setattr(execute.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(execute.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(execute.JobPool, "run", lambda self, jobs: begun.extend(jobs) or {})
    more = ["seeds=0..2", "gpus_per_run=2", "evaluate={new: {suite: smoke}}", f"output={done}"]
    execute.execute(SweepFolder(load([*TINY, *more])))
    assert {job.name: (job.ranks, len(job.modules)) for job in begun if job.name.startswith("sft")} == {
        "sft/seed-0": (1, 1), "sft/seed-1": (1, 1), "sft/seed-2": (2, 2)}  # fmt: skip


def test_a_run_that_fails_is_told_of_and_the_others_are_reported(done, capsys):
    folder = done.parent / "failing"
    (folder / "runs/sft/seed-0").mkdir(parents=True)
    (folder / "runs/sft/seed-0/notes.txt").write_text("mine")
    assert main([*TINY, "grid.algo=[sft]", f"output={folder}"]) == SOME_FAILED
    out = capsys.readouterr().out
    assert (
        "failed with exit code 2 (error: output:" in out
        and "1 of 2 runs are not done" in (folder / "report.md").read_text()
    )


@pytest.mark.slow
def test_models_are_evaluated_and_a_killed_sweep_goes_on(tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "suite: {max_prompt_tokens: 64, max_response_tokens: 32, benchmarks: {s: {samples: 2, data: {_target_: "
        "upge.data.Arithmetic, levels: [2 numbers, 3 numbers], evaluation_size: 4}}}}"
    )
    arguments = [*TINY, "seeds=[0]", f"evaluate={{own: {{suite: {suite}}}}}", f"output={tmp_path / 'swept'}", "jobs=1"]
    command = [sys.executable, "-m", "experiments.sweep", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = tmp_path / "swept/logs/sft/seed-0.log"
    while not started.is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "the same command continues" in said, said
    assert main(arguments) == 0
    row = _rows(tmp_path / "swept")[0]
    assert 0 <= float(row["own/s/pass@2"]) <= 1 and "own/s/2 numbers/avg" in row
    scores = json.loads((tmp_path / "swept/evals/own/sft/seed-0/scores.json").read_text())
    assert float(row["own/s/avg"]) == scores["benchmarks"]["s"]["avg"]["value"]


@pytest.mark.slow
def test_a_sweep_that_chooses_runs_the_other_first(tmp_path, capsys):
    first = tmp_path / "rates.yaml"
    common = "{" + ", ".join(f"{k}: {v}" for k, v in (a.split("=") for a in TINY[2:])) + "}"
    first.write_text(
        f"common: {common}\nvariants: {{A: {{algo: sft}}}}\ngrid: {{optimizer.lr: [0.0, 1.0e-3]}}\nseeds: [7]\n"
        "select: {key: optimizer.lr, measure: mean@2}\n"
    )
    arguments = [*TINY[2:], "variants={A: {algo: sft}}", f"choose={{sweep: {first}, key: optimizer.lr}}"]
    output = f"output={tmp_path / 'sweeps' / 'main'}"
    assert main([*arguments, output, "--dry-run"]) == BAD_INPUT
    assert "run it first" in capsys.readouterr().err
    assert main([*arguments, output]) == 0
    chosen = json.loads((tmp_path / "sweeps/main/settings/A/seed-0.json").read_text())["run"]["optimizer.lr"]
    rows = {row["optimizer.lr"]: float(row["mean@2"]) for row in _rows(tmp_path / "sweeps/rates")}
    assert rows[chosen] == max(rows.values()) and "as chosen in" in capsys.readouterr().out


def test_docs_need_their_marks(done, tmp_path, monkeypatch, capsys):
    page = tmp_path / "results.md"
    monkeypatch.setattr("experiments.sweep.__main__.PAGE", page)
    page.write_text("no marks")
    assert main([*TINY, f"output={done}", "--report", "--docs"]) == BAD_INPUT
    page.write_text("before\n<!-- sweep sweep: begin -->\nold\n<!-- sweep sweep: end -->\nafter\n")
    assert main([*TINY, f"output={done}", "--report", "--docs"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| grpo |" in text
    pictures = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert pictures and all((tmp_path / name).is_file() for name in pictures)
    assert str(Path(done)) not in text


def test_a_folder_without_a_done_run_has_no_report(tmp_path, capsys):
    assert main([*TINY, f"output={tmp_path / 'none'}", "--report"]) == 0
    assert "no run is done yet" in capsys.readouterr().out


def test_seed_keys_are_recorded(done):
    with pytest.raises(ConfigError, match="seed"):
        SweepFolder(load([*TINY, "seed_keys=[seed,data.seed]", f"output={done}"])).check()
