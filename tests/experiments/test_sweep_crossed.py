"""Tables of a sweep that crosses variants with the values of one key, against numbers worked out by hand."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from experiments.sweep import crossed
from experiments.sweep.__main__ import report
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import load

CROSSED = ["variants={A: {algo: grpo}, B: {algo: rloo}}", "grid.rollout.lag=[0,4]", "seeds=0..2", "measures=[x]"]
VALUES = {
    "A, lag=0": (0.1, 0.2, 0.3),
    "A, lag=4": (0.2, 0.3, 0.5),
    "B, lag=0": (0.5, 0.5, 0.5),
    "B, lag=4": (0.3, 0.4, 0.6),
}


def _rows() -> list[dict]:
    return [{"label": label, "seed": s, "x": v[s]} for label, v in VALUES.items() for s in range(3)]


def test_only_variants_with_several_values_of_one_key_are_crossed():
    assert crossed.crossed_key(load(CROSSED)) == "rollout.lag"
    for other in (
        ["variants={A: {algo: grpo}}", "grid.rollout.lag=[0,4]"],
        ["variants={A: {algo: grpo}, B: {algo: rloo}}"],
        [*CROSSED, "grid.steps=[1,2]"],
        [*CROSSED, "select={key: rollout.lag, measure: x}"],
        ["variants={A: {algo: grpo}, B: {algo: rloo}}", "grid.rollout.lag=[0]"],
    ):
        assert crossed.crossed_key(load(other)) is None


def test_a_row_is_a_variant_and_a_column_a_value():
    grid = crossed.value_grid(load(CROSSED), _rows(), "x")
    assert grid.header == ("rollout.lag", "0", "4")
    # s/√3 = 0.0577 (0.0882), t = 4.3027.
    assert [row.cells for row in grid.rows] == [("A", "20.0 ± 24.8", "33.3 ± 37.9"), ("B", "50.0", "43.3 ± 37.9")]


def test_differences_are_paired_by_seed_within_a_row_and_within_a_column():
    sweep, rows = load(CROSSED), _rows()
    # A: 0.1, 0.1, 0.2, with s/√3 = 1/30. B: -0.2, -0.1, 0.1, with s/√3 = 0.0882.
    changes = crossed.change_grid(sweep, rows, "x")
    assert [row.cells for row in changes.rows] == [("A", "–", "+13.3 ± 14.3"), ("B", "–", "-6.7 ± 37.9")]
    # B - A at lag 0: 0.4, 0.3, 0.2, with s/√3 = 0.0577; at lag 4 the difference is 0.1 for every seed.
    others = crossed.variant_grid(sweep, rows, "x")
    assert [row.cells for row in others.rows] == [("A", "–", "–"), ("B", "+30.0 ± 24.8", "+10.0")]


@pytest.mark.parametrize("shift, bold", [(0.0, False), (5.0, True)])
def test_what_holm_leaves_significant_is_bold(shift, bold):
    rows = [row | {"x": row["x"] + shift * (row["label"] == "A, lag=4")} for row in _rows()]
    changes = crossed.change_grid(load(CROSSED), rows, "x")
    assert [2 in row.bold for row in changes.rows] == [bold, False]


def test_a_mapping_is_a_heading_without_braces():
    assert crossed.value_text({}) == "none"
    assert crossed.value_text({"weight_bits": 4, "top_p": 0.9}) == "weight_bits=4, top_p=0.9"
    assert crossed.value_text(16) == "16"


def test_values_that_are_mappings_have_their_tables():
    sweep = load(
        ["variants={A: {algo: grpo}, B: {algo: rloo}}", "grid.rollout.noise=[{},{weight_bits: 4}]", "seeds=[0]"]
    )
    assert crossed.variant_grid(sweep, [], "x").rows[1].cells == ("B", "–", "–")


def test_a_reward_collapses_where_the_mean_falls_below_half_of_its_highest():
    up = {step: 0.1 * step for step in range(1, 9)}
    assert crossed.collapse(up, window=2) is None
    # Means of two: 0.15 ... 0.75, then 0.5, 0.3: the last is the first below 0.375.
    assert crossed.collapse(up | {9: 0.2, 10: 0.4, 11: 0.2}, window=2) == 10
    assert crossed.collapse({1: 0.5, 2: 0.0}, window=3) is None


def _trained(path: Path, steps: int, monkeypatch) -> SweepFolder:
    """A sweep of which every run is trained; with lag the reward is 0 from step 9 on."""
    monkeypatch.setattr(SweepFolder, "is_trained", lambda folder, planned: True)
    folder = SweepFolder(load([*CROSSED[:3], "measures=[mean@2]", f"output={path}"]))
    for run in folder.sweep.runs:
        path = folder.run(run)
        (path / "final").mkdir(parents=True)
        (path / "config.yaml").write_text("{prompts_per_step: 2, group_size: 2}\n")
        (path / "run.json").write_text(json.dumps({"parameters": 10}))
        lines = [{"step": step, "reward/mean": 0.5 if step < 9 or run.point["rollout.lag"] == 0 else 0.0} for step in
                 range(1, steps + 1)]  # fmt: skip
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        levels = {"3 numbers": {"problems": 4, "mean@2": VALUES[run.label][run.seed]}}
        (path / "evaluations.jsonl").write_text(json.dumps({"step": steps, "samples": 2, "levels": levels}) + "\n")
    return folder


def test_a_crossed_sweep_has_its_tables_and_a_panel_for_each_variant(tmp_path, monkeypatch):
    made = report(_trained(tmp_path, 20, monkeypatch), "", list)
    assert [grid.label for grid in made.grids] == ["values", "changes", "variants", "collapses", "costs"]
    collapses = made.grids[3]
    assert [row.cells[1:] for row in collapses.rows] == [("0 of 3", "3 of 3, step 13")] * 2
    assert [path.name for path in made.drawn] == ["dynamics.png", "dynamics.svg"]


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_whole_numbers_and_the_pointer_shows_means(steps, tmp_path, monkeypatch):
    report(_trained(tmp_path, steps, monkeypatch), "", list)
    drawing = (tmp_path / "dynamics.svg").read_text()
    ticks = re.findall(r'<g id="xtick_\d+">.*?<text[^>]*>([^<]*)</text>', drawing, re.DOTALL)
    assert {"1"} <= {*ticks} and all(tick.lstrip("\u2212").isdecimal() for tick in ticks)
    panels = json.loads(html.unescape(re.search(r'data-hover="([^"]*)"', drawing)[1]))
    assert [[line[0] for line in panel["lines"]] for panel in panels] == [["0", "4"], ["0", "4"]]
    assert panels[0]["lines"][0][2:] == [[*range(1, steps + 1)], [0.5] * steps] and panels[0]["x"] == "step"


def test_the_page_has_a_title_and_links_to_its_runs(tmp_path, monkeypatch):
    folder = _trained(tmp_path, 3, monkeypatch)
    first = folder.run(folder.sweep.runs[0])
    (first / "report.html").write_text("")
    report(folder, "", list)
    page = (tmp_path / "report.html").read_text()
    assert "<title>Sweep sweep: A, B × rollout.lag</title>" in page and page.count("<h1>Sweep sweep: A") == 1
    links = [tmp_path / unquote(link) for link in re.findall(r'<a href="([^"]*)">', page)]
    assert len(links) == len(folder.sweep.runs) == 12 and all(link.exists() for link in links)
    assert links[0] == first / "report.html" and links[1].is_dir()
    assert page.count("<table") == len(re.findall(r'<div class="scroll[^>]*><table', page))
    assert not re.search(r"(src|href)=.http", page) and page.count("<script>") == 1
