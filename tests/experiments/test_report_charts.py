"""The charts of reports: colors of levels, constant plots, captions, values under the pointer, several runs."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from omegaconf import OmegaConf

import algorithms
from experiments.report.__main__ import main
from experiments.report.colors import color_names, color_values
from experiments.report.folder import read_run
from experiments.report.overlay import accuracy, different_settings, names
from experiments.report.plots import PLOTS, Parts, parts_of
from experiments.report.series import Series, is_constant, select
from tests.experiments.test_report import LEVELS, Page, report, write_lines, write_run
from tests.experiments.test_report_gradient import prompt_line


def figures(page: str) -> dict[str, str]:
    """The figures of a page by their ids."""
    return dict(re.findall(r'<figure id="([^"]+)"[^>]*>(.*?)</figure>', page, re.DOTALL))


def legend(figure: str) -> dict[str, str]:
    """Label → color of the entries of a figure's legend."""
    entries = re.findall(r'<li><span [^>]*color: var\(--(\w+)\)">.</span>([^<]*)</li>', figure)
    return {label: color for color, label in entries}


def values(figure: str) -> list[dict]:
    """What a figure shows under the pointer."""
    return json.loads(html.unescape(re.search(r'data-hover="([^"]*)"', figure)[1]))


def write_metrics(folder: Path, lines: list[dict]) -> Path:
    write_lines(folder / "metrics.jsonl", [{"step": step} | line for step, line in enumerate(lines, 1)])
    return folder


def test_a_level_has_one_color_in_all_charts_and_no_other_level_has_it(tmp_path):
    folder = write_run(tmp_path / "run")
    kinds = ("demonstrations", "rollouts")
    prompts = [prompt_line(step, n, n % 3, kinds[(step + n) % 2], level)
               for step in range(1, 41) for n, level in enumerate([*reversed(LEVELS), "unseen"])]  # fmt: skip
    write_lines(folder / "prompts.jsonl", prompts)
    page, _ = report(folder)
    charts = {name: legend(figure) for name, figure in figures(page).items() if re.search("evaluation|imitation", name)}
    assert [*charts] == [*(f"plot-evaluation-{kind}" for kind in ("greedy", "pass", "mean")), "plot-imitation"]
    shown: dict[str, set[str]] = {}
    for name, entries in charts.items():
        assert {*entries} == {*LEVELS, "unseen" if name == "plot-imitation" else "all"}
        for level, color in entries.items():
            shown.setdefault(level, set()).add(color)
            assert f"stroke: var(--{color})" in figures(page)[name], "the line has the color of its legend"
    assert all(len(colors) == 1 for colors in shown.values())
    assert len({color for colors in shown.values() for color in colors}) == len(shown) == len(LEVELS) + 2
    declared = re.findall(r"--l(\d+): (oklch[^;]*);", page)
    assert len({value for _, value in declared}) == 2 * (len(LEVELS) + 1), "a light and a dark value for each level"


@pytest.mark.parametrize("count", [1, 2, 8, 31])
def test_there_are_as_many_colors_as_levels(count):
    light, dark = zip(*color_values(count), strict=True)
    assert len({*light}) == len({*dark}) == count
    assert [*color_names([*map(str, range(count)), "0"]).values()] == [f"l{i}" for i in range(count)]


def test_constant_plots_are_named_with_their_values_instead_of_drawn(tmp_path):
    lines = [{"rl/masked_share": 0.0, "learning_rate": 3e-4, "entropy": 1 / step, "sampler/ess_tokens": 1 - step / 1e13,
              "rl/advantage_mean": 0.0, "sft/advantage_mean": 1.0} for step in range(1, 6)]  # fmt: skip
    folder = write_metrics(write_run(tmp_path / "run", steps=5), lines)
    page, _ = report(folder)
    shown = {name for name in figures(page) if "evaluation" not in name}
    assert shown == {"plot-entropy"}
    told = re.findall(r'<p class="soft constant">([^<]*)</p>', page)
    assert told == [
        "Constant in this run, so not drawn: Effective share of the rollouts (1); Learning rate (0.0003).",
        "Constant in this run, so not drawn: Advantage of each term (rl 0, sft 1); Masked share (0).",
    ]


def test_what_is_constant():
    def series(*values: float) -> Series:
        return Series("any", tuple(range(len(values))), values)

    assert is_constant([series(0, 0)]) and is_constant([series(1, 1), series(0.5, 0.5)])
    assert not is_constant([series(2)]), "a single point does not show that nothing changes"
    assert not is_constant([series(1, 1), series(0, 0.1)]) and not is_constant([series(1e-9, 2e-9)])


def test_rounding_errors_and_comparisons_of_one_term_are_not_drawn():
    lines = [{"step": step, "sampler/kl_k3_q1": 1e-13 * step, "behavior/kl_k3_q1": 0.1 * step, "rl/grad_norm": step}
             for step in range(1, 4)]  # fmt: skip
    selected = select(lines, Parts(terms=1))
    ((plot, series),) = selected.plots
    assert plot.identifier == "plot-divergence" and [one.label for one in series] == ["behavior/kl_k3_q1"]
    assert {*selected.others} == {"sampler/kl_k3_q1", "rl/grad_norm"}


@pytest.mark.parametrize(
    ("name", "texts", "absent"),
    [
        ("sft", {"plot-loss": "demonstrations are memorized"}, {"plot-demonstrations"}),
        ("grpo", {"plot-pass-rate": "group-relative", "plot-loss": "Only its gradient"}, {"plot-demonstrations"}),
        ("ppo", {"plot-pass-rate": "counts success alone", "plot-masked": "trust region"}, set()),
        ("hpt", {"plot-demonstrations": "How often the gate", "plot-advantage": "groups are centered"}, set()),
        ("luffy", {"plot-demonstrations": "No gate chooses"}, set()),
        ("sft_then_grpo", {"plot-demonstrations": "No gate chooses", "plot-loss": "Only its gradient"}, set()),
    ],
)
def test_captions_fit_the_algorithm(name, texts, absent):
    parts = parts_of(OmegaConf.to_container(algorithms.read(name)))
    keys = ("pass_rate", "gate/demonstration_share", "loss", "rl/masked_share", "rl/advantage_mean")
    lines = [{"step": step} | dict.fromkeys(keys, 0.1 * step) for step in (1, 2)]
    captions = {plot.identifier: plot.caption for plot, _ in select(lines, parts).plots}
    assert not absent & {*captions}
    for plot, text in texts.items():
        assert text in captions[plot]


def test_an_unreadable_algorithm_has_no_parts():
    for tree in ("hpt", None, {}, {"terms": None}, {"terms": {"a": 1}}, {"stages": {"a": {"algorithm": "b"}}}):
        assert parts_of(tree) == Parts()
    odd = parts_of({"terms": {"a": {"gate": [{"_target_": "x.Y"}], "estimator": {"mask": {"_target_": 3}}}}})
    assert odd.gates == {"Y"} and odd.estimator == {"3"} and odd.terms == 1 and odd.sources == {"None"}


def test_captions_of_a_plot_are_for_the_same_metrics():
    """A plot of several captions shows the same metrics with each, and one of them fits an unknown algorithm."""
    for identifier in {plot.identifier for plot in PLOTS}:
        same = [plot for plot in PLOTS if plot.identifier == identifier]
        assert len({plot.keys for plot in same}) == 1
        assert any(plot.when(Parts()) for plot in same), "an unknown algorithm"


def test_a_single_evaluation_is_a_table_alone(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    first = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "evaluations.jsonl").write_text(first)
    page, parsed = report(folder)
    assert "result" in parsed.ids and not [name for name in figures(page) if "evaluation" in name]


def test_the_pointer_shows_the_recorded_values(tmp_path):
    lines = [{"entropy": 0.5, "time/train": 2.0}, {"entropy": None, "time/train": 3.0}, {"entropy": 0.123456789}]
    page, _ = report(write_metrics(write_run(tmp_path / "run", steps=3), lines))
    (panel,) = values(figures(page)["plot-entropy"])
    assert panel["lines"] == [["entropy", "var(--c0)", [1, 2, 3], [0.5, None, 0.12346]]]
    assert panel["x"] == "step" and not panel["log"] and panel["limits"][0] < 1 < 3 < panel["limits"][1]
    left, top, right, bottom = panel["box"]
    assert 0 < left < right < 1 and 0 < top < bottom < 1
    drawn = figures(page)
    assert all("data-hover" in figure for name, figure in drawn.items() if name != "heat")
    (evaluation,) = values(drawn["plot-evaluation-greedy"])
    assert [line[0] for line in evaluation["lines"]] == [*LEVELS, "all"]
    assert evaluation["lines"][1][2] is None, "the steps of the line before"


def test_tables_and_the_heat_map_scroll_and_say_so(tmp_path):
    folder = write_run(tmp_path / "run")
    write_lines(folder / "prompts.jsonl", [prompt_line(1, 0, 0, "rollouts"), prompt_line(2, 1, 4, "nothing")])
    page, _ = report(folder)
    assert page.count("<table") == len(re.findall(r'<div class="scroll"[^>]*>\s*<table', page)) == 2
    assert re.search(r'<figure id="heat".*?<div class="scroll"[^>]*><svg', page, re.DOTALL)
    assert 'content: "Scroll sideways' in page and page.count("<script>") == 1


@pytest.fixture(scope="module")
def overlay(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, algorithm in enumerate(("hpt", "grpo")):
        path = write_run(folder / f"<{algorithm}>" / "seed & 0", steps=6, seed=seed)
        (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("hpt", algorithm))
    assert main([str(path) for path in sorted(folder.glob("*/*"))]) == 0
    return folder / "overlay.html"


def test_an_overlay_has_a_line_per_run_with_a_legend(overlay):
    page = overlay.read_text()
    runs = ["&lt;grpo&gt;/seed &amp; 0", "&lt;hpt&gt;/seed &amp; 0"]
    drawn = figures(page)
    assert {"plot-reward-0", "plot-entropy-0", "plot-evaluation-mean-all", "plot-weights-1"} <= {*drawn}
    for name, figure in drawn.items():
        assert legend(figure) == dict(zip(runs, ("l0", "l1"), strict=True)), name
        (panel,) = values(figure)
        assert [line[0] for line in panel["lines"]] == [html.unescape(run) for run in runs]
        assert all(f"stroke: var(--l{i})" in figure for i in range(2))
    assert "rl/weight_abs_mean" in drawn["plot-weights-0"] and "sft/weight_abs_mean" not in page, "constant in both"


def test_an_overlay_links_to_its_runs_and_loads_nothing(overlay):
    page = overlay.read_text()
    parsed = Page(page)
    links = [value for key, value in parsed.attributes if key == "href" and not value.startswith("#")]
    assert len(links) == 2 and all((overlay.parent / unquote(link)).is_file() for link in links)
    assert not any(re.search("[ <#?]", link) for link in links), "an address has none of these"
    assert len(parsed.ids) == len({*parsed.ids}) and not {"link", "img", "iframe"} & {*parsed.tags}
    assert not [value for key, value in parsed.attributes if key == "src"]
    assert {*re.findall(r'https?://[^"\s<]*', page)} <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_an_overlay_says_how_its_runs_differ(overlay):
    rows = {row[0]: row[1:] for row in Page(overlay.read_text()).rows if row}
    assert rows["algo"] == ["grpo", "hpt"] and "seed" not in rows and "steps" not in rows
    runs = {name: read_run(path) for name, path in zip("ab", sorted(overlay.parent.glob("*/*")), strict=True)}
    table = accuracy(runs)
    assert [level for level, _ in table["rows"]] == [*LEVELS, "all"] and table["steps"] == {"a": 6, "b": 6}
    last = runs["a"].evaluations[-1]["all"]
    assert table["rows"][-1][1] == [f"{100 * last[one]:.1f}" for one in ("greedy", "pass@8", "mean@8") for _ in "ab"]


def test_settings_and_names_of_runs():
    configs = [{"a": {"b": 1, "c": [1]}, "seed": 0}, {"a": {"b": 2, "c": [1]}, "d": None, "seed": 1}]
    assert different_settings(configs) == [("a.b", ["1", "2"]), ("d", ["–", "None"])]
    assert names([Path("/x/a/seed-0"), Path("/x/b/seed-0")]) == ["a/seed-0", "b/seed-0"]
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]


def test_one_run_or_one_readable_run_has_no_overlay(tmp_path):
    good = write_run(tmp_path / "good", steps=2)
    assert main([str(good), f"{good}/."]) == 0 and main([str(good), str(tmp_path)]) == 2
    assert not list(tmp_path.glob("*.html"))
