"""Runs of a sweep at equal cost, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.sweep import matched
from experiments.sweep.collect import cumulative_costs, rows
from experiments.sweep.folder import SweepFolder
from experiments.sweep.settings import load
from upge.errors import ConfigError

MATCH = "match={costs: [updates, generated_tokens, flops], measure: mean@2, levels: {trained: [a, b], longer: [c]}}"


def _write(path: Path, steps: int, length: float, values: dict[int, float]) -> None:
    """A run of `steps` steps with 2 prompts of 2 rollouts; each step computes 50 tokens of a model of 10 parameters."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{prompts_per_step: 2, group_size: 2}\n")
    (path / "run.json").write_text(json.dumps({"parameters": 10}))
    lines = [
        {"step": step, "updates": 1, "response_length": length, "trained/computed_tokens": 50, "time/total": 1.0}
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [
        {"step": step, "levels": {"a": {"problems": 4, "mean@2": value}, "b": {"problems": 1, "mean@2": value + 0.2},
                                  "c": {"problems": 4, "mean@2": 0.0}}}
        for step, value in values.items()
    ]  # fmt: skip
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> SweepFolder:
    monkeypatch.setattr(SweepFolder, "is_trained", lambda folder, planned: True)
    variants = "variants={short: {algo: grpo}, long: {algo: grpo}, sft: {algo: sft}}"
    folder = SweepFolder(load([variants, "seeds=0..2", MATCH, f"output={tmp_path}"]))
    for run in folder.sweep.runs:
        bump = 0.01 * run.seed
        if run.variant == "short":
            _write(folder.run(run), 4, 10.0, {0: 0.0, 4: 0.2 + bump})
        elif run.variant == "long":
            _write(folder.run(run), 8, 20.0, {0: 0.0, 2: 0.1 + bump, 6: 0.5 + bump, 8: 0.6})
        else:
            _write(folder.run(run), 8, 0.0, {0: 0.0, 8: 0.4})
    return folder


def test_costs_add_up_over_the_steps(folder):
    costs = cumulative_costs(folder.run(folder.sweep.runs[0]))
    assert costs[0] == dict.fromkeys(costs[0], 0.0)
    # 4 rollouts of 10 tokens a step; 2 · 10 · 40 + 6 · 10 · 50 operations.
    assert costs[3] == {"updates": 3, "generated_tokens": 120, "trained_tokens": 0, "flops": 3 * 3800,
                        "training_seconds": 3.0}  # fmt: skip
    assert rows(folder)[0]["flops"] == 4 * 3800


def test_a_run_is_read_where_it_has_cost_as_much_as_the_cheapest(folder):
    budget, values, cheaper = matched.at_equal_cost(folder, "updates", "mean@2", ["a", "b"])
    # Levels have equal weights: 0.1 above level a. The long run is halfway between its evaluations at 2 and 6.
    assert budget == 4
    assert values["short"] == pytest.approx({0: 0.3, 1: 0.31, 2: 0.32})
    assert values["long"] == pytest.approx({0: 0.4, 1: 0.41, 2: 0.42})
    assert values["sft"] == pytest.approx({0: 0.3, 1: 0.3, 2: 0.3})
    # 4 · 40 = 160 tokens are two steps of 80; sft generates none and is read at its end.
    budget, values, cheaper = matched.at_equal_cost(folder, "generated_tokens", "mean@2", ["a", "b"])
    assert budget == 160
    assert values["long"] == pytest.approx({0: 0.2, 1: 0.21, 2: 0.22})
    assert values["sft"] == pytest.approx({0: 0.5, 1: 0.5, 2: 0.5}) and cheaper == {"sft"}
    # 4 · 3800 = 15200 operations are 15200/4600 = 3.304 steps of the long run.
    budget, values, cheaper = matched.at_equal_cost(folder, "flops", "mean@2", ["a"])
    assert values["long"][0] == pytest.approx(0.1 + 0.4 * (15200 / 4600 - 2) / 4)


def test_some_variants_set_the_common_cost(folder):
    folder.sweep.config.match["budget"] = ["long"]
    budget, values, cheaper = matched.at_equal_cost(folder, "updates", "mean@2", ["a"])
    assert budget == 8 and values["long"][0] == pytest.approx(0.6)
    # The short run costs less in all: its last value.
    assert values["short"] == pytest.approx({0: 0.2, 1: 0.21, 2: 0.22}) and cheaper == {"short"}


def test_tables_have_a_column_per_cost_and_paired_differences(folder):
    means, differences, *_ = matched.matched_grids(folder)
    assert means.header == ("", "updates (4)", "generated tokens (160)", "FLOPs (1.52e+04)")
    assert [row.cells[:2] for row in means.rows] == [("short", "31.0 ± 2.5"), ("long", "41.0 ± 2.5"), ("sft", "30.0")]
    assert means.rows[2].cells[2] == "50.0*" and "* = costs less in all" in means.title
    assert means.rows[1].bold == {1} and means.rows[2].bold == {2, 3}
    # Differences of 0.1 with every seed leave no p; those of sft are 0, -0.01, -0.02: t = -0.01/(0.01/√3).
    assert differences.rows[0].cells == ("updates", "long", "+10.0", "–", "–")
    assert differences.rows[1].cells == ("updates", "sft", "-1.0 ± 2.5", "0.225", "0.225")


def test_a_level_that_no_run_has_is_named(folder):
    assert matched.missing(folder) == []
    folder.sweep.config.match["levels"]["typo"] = ["a", "d"]
    assert matched.missing(folder) == ["No run has mean@2 of all levels of match.levels.typo (a, d)."]


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("{costs: [updates]}", "match: found the keys"),
        ("{costs: [money], measure: x, levels: {a: [b]}}", "match.costs: found"),
        ("{costs: [], measure: x, levels: {a: [b]}}", "match.costs: found"),
        ("{costs: [updates], measure: x, levels: [a]}", "match.levels: found"),
        ("{costs: [updates], measure: x, levels: {a: [b]}, budget: [c]}", "match.budget: found .* names of variants"),
        ("{costs: [updates], measure: x, levels: {a: [b]}, budget: a}", "match.budget: found 'a'"),
    ],
)
def test_a_wrong_match_is_refused(match, said):
    with pytest.raises(ConfigError, match=said):
        load(["variants={a: {algo: grpo}}", f"match={match}"])
