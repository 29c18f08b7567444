"""Reports of hostile records, and a report that fails."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from experiments.report import page
from experiments.run import train
from tests.running import lines
from upge.train.folder import FORMAT
from upge.train.stopping import Ending

MARKS = "\u202e\u2066\u200f\u061c"
#: Texts that no page can have as they are.
TEXTS = {"half a surrogate": "\ud83d", "right to left": f"a{MARKS}b", "control": "\x00\x1b[31m", "tag": "<script>"}
NUMBERS = [1e308, -1e308, 5e-324, 10**400, True, None, "text", [1], {"a": 1}, float("nan"), float("inf"), 0, -1]
STEPS = [10**12, 10**400, -1, 1.5, 1e308, "2", None, True, [1], float("nan")]


def evaluation(step: object, **changed: object) -> dict:
    scores = {"greedy": 0.5, "pass@2": 0.5, "mean@2": 0.5, "problems": 6}
    return {"step": step, "samples": 2, "temperature": 1.0, "levels": {"easy": scores}, "all": scores, **changed}


def prompt(step: object, **changed: object) -> dict:
    line = {"step": step, "prompt": 1, "id": "x", "level": "easy", "rollouts": 4, "successes": 2}
    return {**line, "gate": "rollouts", "learned": "rollouts", **changed}


def rollout(**changed: object) -> dict:
    return {"prompt": "p", "response": "r", "answer": "1", "reward": 1.0, "level": "easy", "status": "ok", **changed}


def tokens(**changed: object) -> dict:
    columns = {"tokens": ["a", "b"], "weights": [1.0, -1.0], "relative": [0.5, -0.5]}
    return {"term": "rl", "reward": 1.0, "gate": 1.0, "first": 0, "length": 2, "prompt": "p", **columns, **changed}


def write(folder: Path, **records: list[dict]) -> Path:
    """A folder of a run with good records, and these after them."""
    good = {
        "metrics": [{"step": step, "loss": 0.5 * step, "rl/weight_p50": 0.1, "time/total": 1.0} for step in (1, 2, 3)],
        "evaluations": [evaluation(0), evaluation(3)],
        "prompts": [prompt(step) for step in (1, 2, 3)],
        "rollouts/step_000001": [rollout()],
        "tokens/step_000001": [tokens()],
    }
    for name, rows in good.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        more = records.get(path.parent.name if "/" in name else name, [])
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    (folder / "config.yaml").write_text("steps: 3\n")
    (folder / "run.json").write_text(json.dumps({"format": FORMAT, "names": {"algo": "x"}}))
    return folder


def report(folder: Path) -> str:
    text = page.write_report(folder).read_text("utf-8")
    assert not set(MARKS) & set(text) and "plot-loss" in text and text.rstrip().endswith("</html>")
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_texts(tmp_path, text):
    bad = TEXTS[text]
    folder = write(
        tmp_path,
        metrics=[{"step": 3, "loss": 1.5, f"rl/{bad}": 1.0, f"a{bad}_p5": 1.0}],
        evaluations=[evaluation(3, levels={bad: evaluation(3)["all"]})],
        prompts=[prompt(3, level=bad, id=bad)],
        rollouts=[rollout(prompt=bad, response=bad, answer=bad, level=bad, status=bad)],
        tokens=[tokens(term=bad, prompt=bad, level=bad, tokens=[bad, bad])],
    )
    (folder / "run.json").write_text(
        json.dumps({"format": FORMAT, "formula_text": bad, "command": bad, bad: {bad: [bad]}})
    )
    actual = report(folder)
    assert actual.count("<script>") == 1, "its own"
    assert [json.loads(html.unescape(values)) for values in re.findall(r'data-hover="([^"]*)"', actual)]
    if text != "tag":
        assert re.search(r"\\u(d83d|202e|0000)", actual)


def test_numbers(tmp_path):
    """In every place that a number can have; the good records are shown."""
    folder = write(
        tmp_path,
        metrics=[
            {"step": 3, "loss": 1.5, f"bad{place}": bad, f"rl/weight_p{place}": bad, "stage": bad, "time/total": bad}
            for place, bad in enumerate(NUMBERS)
        ],
        evaluations=[evaluation(3, samples=bad, temperature=bad) for bad in NUMBERS]
        + [evaluation(3, levels={"easy": {"greedy": bad, "problems": bad, "pass@2": bad}}) for bad in NUMBERS]
        + [evaluation(3, levels=bad, all=bad) for bad in NUMBERS],
        prompts=[prompt(3, **{key: bad}) for key in prompt(3) if key != "step" for bad in NUMBERS],
        rollouts=[rollout(**{key: bad}) for key in rollout() for bad in NUMBERS],
        tokens=[tokens(**{key: bad}) for key in tokens() for bad in NUMBERS]
        + [tokens(weights=[bad, 1.0]) for bad in NUMBERS],
    )
    assert "Values beyond 1e+100 are left out of the plots: " in report(folder)


@pytest.mark.parametrize("bad", [1e308, -1e308, 10**400])
def test_a_number_that_no_axis_shows_is_a_gap_and_a_note(tmp_path, bad):
    folder = write(tmp_path, metrics=[{"step": 3, "loss": bad}])
    assert "Values beyond 1e+100 are left out of the plots: loss." in report(folder)


@pytest.mark.parametrize("planned", ["3", "many", "1000000000000"])
def test_steps(tmp_path, planned):
    """A line of a step beyond the run would leave one point to every plot."""
    bad = [{"step": step, "loss": 1.0} for step in STEPS]
    more = [evaluation(step) for step in STEPS], [prompt(step) for step in STEPS]
    folder = write(tmp_path, metrics=bad, evaluations=more[0], prompts=more[1])
    (folder / "config.yaml").write_text(f"steps: {planned}\n")
    text = report(folder)
    assert text.count(f"{len(STEPS)} lines of ") == 3 and "steps 1 to 3" in text


def test_a_late_step_of_a_long_run_is_drawn_at_once(tmp_path):
    folder = write(tmp_path, metrics=[{"step": 10**9, "loss": 1.0}], prompts=[prompt(10**9)])
    (folder / "config.yaml").write_text("steps: 1000000000\n")
    assert "steps 1 to 1000000000" in report(folder)


@pytest.mark.parametrize("content", ["[]", "7", '{"names": [1]}', '{"names": {"algo": [1]}}', '{"versions": 3}', "{"])
def test_descriptions_of_a_run(tmp_path, content):
    folder = write(tmp_path)
    facts = content.replace("{", f'{{"format": {FORMAT}, ', 1) if content.endswith("}") else content
    (folder / "run.json").write_text(facts)
    (folder / "config.yaml").write_text("steps: 3\nalgo: {stages: 4}\n")
    assert "plot-loss" in report(folder)


def test_a_report_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    """The run has ended, and its exit code stays what it is."""
    folder = write(tmp_path)

    def fail(path):
        raise RuntimeError("no font\nnor anything")

    monkeypatch.setattr(page, "write_report", fail)
    said: list[str] = []
    train._finish(folder, Ending(0, "done"), said.append)
    assert said[0] == (
        f"report: failed (RuntimeError: no font); python -m experiments.report {folder} tries again"
    ) and said[1].startswith("model:")


def test_a_table_that_cannot_be_printed_is_one_line(tmp_path):
    folder = write(tmp_path, evaluations=[evaluation(3, levels=4, all=7)])
    said: list[str] = []
    train._finish(folder, Ending(0, "done"), said.append)
    assert said[0].startswith("report: ") and said[-1].startswith("model:")
    assert lines(folder / "evaluations.jsonl")
