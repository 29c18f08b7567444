"""The report's part on what the gradient did, from files that are written here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import algorithms
from experiments.report.gate import MOST_COLUMNS, MOST_ROWS, gate_plots, heat_map
from experiments.report.page import token_texts
from experiments.report.plots import Parts
from tests.experiments.test_report import Page, report, write_lines, write_run
from tests.running import run
from upge.train.metric_names import metric_names

ROOT = Path(__file__).parents[2]


def prompt_line(step: int, prompt: int, successes: int, learned: str, level: str | None = "easy", rollouts: int = 4):
    return {
        "step": step,
        "prompt": prompt,
        "id": f"p{prompt}",
        "level": level,
        "rollouts": rollouts,
        "successes": successes,
        "gate": learned,
        "learned": learned,
    }


def history(steps: int, prompts: int, drawn: int = 8) -> list[dict]:
    """Each prompt turns from its demonstration to its rollouts to silence, the hard ones later."""
    lines = []
    for step in range(1, steps + 1):
        for place in range(drawn):
            prompt = (step * drawn + place) % prompts
            done = step / steps - 0.5 * (prompt % 2)
            successes = 0 if done < 0.1 else 4 if done > 0.8 else 2
            learned = {0: "demonstrations", 2: "rollouts", 4: "nothing"}[successes]
            lines.append(prompt_line(step, prompt, successes, learned, ("easy", "<hard>")[prompt % 2]))
    return lines


def token_line(tokens: list[str], weights: list, term: str = "rl", **more) -> dict:
    return {
        "term": term,
        "prompt": "<i>2+2?</i>",
        "answer": "4",
        "level": "easy",
        "reward": 1.0,
        "gate": 1.0,
        "is_demonstration": False,
        "tokens": tokens,
        "weights": weights,
        "relative": weights,
        "first": 0,
        "length": len(tokens),
    } | more


def write_all(folder: Path, steps: int = 40) -> Path:
    write_run(folder, steps)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        once = 1 / line["step"]
        percentiles = {f"rl/weight_p{p}": value for p, value in ((1, -1), (10, -0.5), (50, once), (90, 0.5), (99, 1))}
        line |= percentiles | {
            "rl/masked_above": 0.1 * once,
            "rl/masked_below": 0.05,
            "rl/effective_share": 0.7 * once,
            "rl/trajectories": 99,
            "rl/effective_trajectories": 70 * once,
            "critic/grad_norm": 1.0,
        }
        if line["step"] % 5 == 0:
            line |= {"rl/grad_norm": 0.1 * once, "sft/grad_norm": 0.4, "cosine/rl_sft": -0.2 * once}
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "prompts.jsonl", history(steps, 100))
    (folder / "tokens").mkdir()
    write_lines(folder / "tokens" / "step_000010.jsonl", [token_line(["old"], [1.0])])
    write_lines(
        folder / "tokens" / "step_000040.jsonl",
        [
            token_line(["<script>", "alert(1)", "\n", "</script>", "&"], [0.5, -0.25, None, 0.0, 0.0005]),
            token_line(["expert"], [2.0], "sft", is_demonstration=True, first=7, length=20),
        ],
    )
    return folder


def test_the_section_has_plots_prompts_and_tokens(tmp_path):
    html, page = report(write_all(tmp_path / "run"))
    section = html[html.index('id="gradient"') : html.index('id="rollouts"')]
    shown = re.findall(r'<figure id="([a-z-]+)"', section)
    assert shown == [
        "plot-gradient",
        "plot-term-gradients",
        "plot-cosine",
        "plot-weights",
        "plot-signed",
        "plot-advantage",
        "plot-masked",
        "plot-sides",
        "plot-tokens",
        "plot-trajectories",
        "plot-effective",
        "plot-solved",
        "plot-imitation",
        "heat",
    ]
    assert len(page.ids) == len(set(page.ids)) and len(html) < 1_000_000
    both = section[section.index('"plot-gradient"') : section.index('"plot-term-gradients"')]
    assert "critic" in both and "sft" not in both
    assert not {"img", "link"} & set(page.tags) and "at step 40" in section and "old" not in section


def test_tokens_are_escaped_and_coloured(tmp_path):
    html, page = report(write_all(tmp_path / "run"))
    assert page.tags.count("script") == html.count("<script") == 1 and "<i>2+2" not in html
    assert '<i class="p8" title="+0.5">&lt;script&gt;</i><i class="n4" title="-0.25">alert(1)</i>' in html
    assert '<i class="odd" title="not finite">↵\n</i>&lt;/script&gt;<i class="p1" title="+0.0005">&amp;' in html
    assert "[7 tokens before] " in html and "[12 tokens after]" in html and "&lt;hard&gt;" in html
    assert "largest weight not finite" in html and "largest weight +2" in html


def test_runs_without_the_files_are_as_before(tmp_path):
    html, page = report(write_run(tmp_path / "run"))
    assert "heat" not in page.ids and "tokens" not in page.ids and "plot-solved" not in page.ids
    write_lines(tmp_path / "run" / "prompts.jsonl", [{"step": 1}, {"odd": True}])
    (tmp_path / "run" / "tokens").mkdir()
    write_lines(tmp_path / "run" / "tokens" / "step_000001.jsonl", [{"term": "rl"}, {"term": "rl", "tokens": [1]}])
    assert "heat" not in Page(report(tmp_path / "run")[0]).ids


def test_histogram_by_hand():
    lines = [
        prompt_line(1, 0, 0, "demonstrations"),
        prompt_line(1, 1, 1, "rollouts"),
        prompt_line(1, 2, 4, "nothing"),
        prompt_line(2, 0, 3, "rollouts"),
        prompt_line(2, 1, 4, "nothing"),
        prompt_line(2, 2, 4, "nothing"),
    ]
    (plot, series), (levels, shares) = gate_plots(lines, {"easy": "l3"}, Parts())
    assert {one.label: one.values for one in series} == {
        "0 of 4": (1, 0),
        "1 of 4": (1, 0),
        "2 of 4": (0, 0),
        "3 of 4": (0, 1),
        "4 of 4": (1, 2),
    }
    assert plot.palette == ("c1", "s1", "s2", "s3", "c2") and series[0].steps == (1, 2)
    assert [(one.label, one.steps, one.values) for one in shares] == [("easy", (1, 2), (1 / 3, 0))]
    assert levels.identifier == "plot-imitation" and levels.palette == ("l3",) and "group-relative" not in plot.caption
    grouped = gate_plots(lines, {"easy": "l3"}, Parts(estimator=frozenset(["GroupRelative"]), terms=1))
    assert "group-relative" in grouped[0][0].caption
    mixed = [prompt_line(1, 0, 0, "nothing", rollouts=2), prompt_line(1, 1, 4, "nothing", rollouts=8)]
    ((_, series),) = gate_plots(mixed, {}, Parts())
    assert [one.label for one in series] == ["none", "up to 1/4", "up to 1/2", "up to 3/4", "more", "all"]
    assert gate_plots([], {}, Parts()) == []
    assert gate_plots([prompt_line(1, 0, 0, "demonstrations", rollouts=0)], {}, Parts()) == []
    unchanged = [prompt_line(step, n, n, "rollouts") for step in (1, 2) for n in (0, 3)]
    assert gate_plots(unchanged, {}, Parts()) == [], "as many of each kind in both steps"


def test_a_prompt_that_learns_from_both_is_imitating():
    lines = [prompt_line(1, 0, 2, "both"), prompt_line(1, 1, 2, "rollouts")]
    _, (plot, series) = gate_plots(lines, {"easy": "l0"}, Parts())
    assert plot.identifier == "plot-imitation" and [one.values for one in series] == [(0.5,)]
    imitating = [prompt_line(1, 0, 2, "both"), prompt_line(1, 1, 2, "demonstrations")]
    assert len(gate_plots(imitating, {}, Parts())) == 1


def test_long_runs_are_binned():
    (_, series), (_, shares) = gate_plots(history(500, 64), {"easy": "l0", "<hard>": "l1"}, Parts())
    assert {len(one.steps) for one in series} == {56} and sum(one.values[0] for one in series) == 8
    assert all(len(one.steps) <= 15 for one in shares) and [one.label for one in shares] == ["easy", "<hard>"]
    actual = heat_map(history(500, 1000, drawn=128))
    assert actual.shown == MOST_ROWS and actual.prompts == 1000 and actual.binned == 4 and len(actual.svg) < 250_000
    assert heat_map(history(MOST_COLUMNS, 20)).binned == 1


def test_rows_and_colours_of_the_heat_map():
    """Two levels: the easy one first; in it the prompt that was solved first."""
    lines = [
        prompt_line(1, 5, 0, "demonstrations", "hard"),
        prompt_line(1, 7, 0, "nothing", "soft"),
        prompt_line(2, 7, 2, "rollouts", "soft"),
        prompt_line(3, 7, 4, "nothing", "soft"),
        prompt_line(1, 9, 3, "both", "soft"),
        prompt_line(3, 5, 1, "rollouts", "hard"),
    ]
    actual = heat_map(lines)
    assert actual.states == ("rollouts", "demonstrations", "both", "solved", "nothing") and actual.shown == 3
    rows = {
        color: {float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h", path)}
        for path, color in re.findall(r'<path d="([^"]*)" fill="var\(--(\w+)\)"/>', actual.svg)
    }
    assert rows == {"c0": {15.5, 24.5}, "c1": {24.5}, "c3": {6.5}, "c2": {15.5}, "c6": {15.5}}
    held = re.findall(r'<path d="([^"]*)" fill="var\(--(\w+)\)" fill-opacity', actual.svg)
    assert {color for path, color in held if path} == {"c1", "c3"}, "what is not drawn again stays, in pale"
    titles = re.findall(r"<rect [^>]*><title>([^<]*)</title></rect>", actual.svg)
    assert titles[1] == "prompt 7, soft: 50% of its rollouts correct, first solved in step 2" and len(titles) == 3
    assert "rollouts 2 times" in actual.svg and heat_map([]) is None
    # A level of a single row has no room for its name.
    without = [prompt_line(1, 0, 0, "rollouts", None), prompt_line(2, 0, 0, "nothing", None)]
    assert "all prompts" not in heat_map(without).svg and "<title>prompt 0: 0% of its" in heat_map(without).svg
    assert heat_map(without[:1]) is None, "always the same"
    assert (
        "from demonstration to rollouts" in actual.reading and "from no signal to rollouts" in heat_map(without).reading
    )


def test_the_strongest_colour_is_that_of_the_term():
    actual = token_texts([token_line(["a", "b"], [0.1, -0.2]), token_line(["c"], [5.0], "sft"), {"term": "rl"}])
    assert [(term["term"], len(term["trajectories"])) for term in actual] == [("rl", 1), ("sft", 1)]
    assert [run["shade"] for run in actual[0]["trajectories"][0]["runs"]] == ["p4", "n8"]
    assert token_texts([token_line(["a"], [0.0])])[0]["trajectories"][0]["runs"][0]["shade"] == ""


def test_every_key_of_a_run_is_documented(tmp_path):
    """A short run with all that can be looked at: its keys and those of its other files are in docs/metrics.md."""
    out = tmp_path / "run"
    settings = [
        "algo=hpt",
        "steps=2",
        "prompts_per_step=4",
        "group_size=4",
        "data.train_size=16",
        "eval.samples=2",
        "data.evaluation_size=4",
        "optimizer.mini_batches=2",
        "diagnose.gradients_every=1",
        f"output={out}",
    ]
    run(*settings)
    documented = set(re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for path in ("metrics.jsonl", "prompts.jsonl", "tokens/step_000002.jsonl"):
        lines = [json.loads(line) for line in (out / path).read_text().splitlines()]
        assert lines, path
        if path == "metrics.jsonl":
            unknown = {key for line in lines for key in line} - {*metric_names(algorithms.load("hpt")), "time/total"}
            assert not unknown, "metrics that no gate may want"
        for key in {key for line in lines for key in line}:
            generic = re.sub(r"^(rl|sft)/", "TERM/", re.sub(r"^cosine/.*", "cosine/A_B", key))
            short = {generic, re.sub(r"^TERM/weight", "", generic)}
            assert short & documented, f"{path}: {key} is not in docs/metrics.md"
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 8 and {line["gate"] for line in prompts} <= {"rollouts", "demonstrations"}
    assert all((line["gate"] == "demonstrations") == (line["successes"] == 0) for line in prompts)
