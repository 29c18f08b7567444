"""The report and the result table, made from run folders that a seeded generator writes."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from experiments.grid import accuracy_rows, print_table
from experiments.report.__main__ import main
from experiments.report.draw import smoothing_window
from experiments.report.page import write_report
from experiments.report.series import Series
from upge.errors import DataError, UserError
from upge.train.folder import FORMAT

LEVELS = {
    "2 numbers": (0.95, 0.79),
    "3 numbers": (0.9, 0.6),
    "4 numbers": (0.7, 0.45),
    "5 numbers": (0.5, 0.25),
    "6 numbers": (0.25, 0.12),
    "with minus": (0.05, 0.03),
}
VOID = {"meta", "link", "br", "hr", "img", "input"}
EXPECTED_PLOTS = {
    "reward/mean": "plot-reward",
    "pass_rate": "plot-pass-rate",
    "gate/demonstration_share": "plot-demonstrations",
    "entropy": "plot-entropy",
    "response_length": "plot-length",
    "grad_norm": "plot-gradient",
    "rl/weight_abs_mean": "plot-weights",
    "rl/masked_share": "plot-masked",
    "rl/advantage_mean": "plot-advantage",
    "rl/effective_tokens": "plot-tokens",
    "sampler/logprob_diff_mean": "plot-sampler",
    "time/rollout": "plot-time",
    "loss": "plot-loss",
    "learning_rate": "plot-learning-rate",
}
FORMULA = """grad = Σ_{τ~π_old} [pass rate > 0] · 1/(P·G·1024) · 1/π_old · (r − mean r) · ∇π_θ
     + Σ_{τ* demo} [pass rate ≤ 0] · 1/(P·|τ*|) · 1/π_θ · ∇π_θ"""


def metrics_line(step: int, steps: int, random_state: random.Random) -> dict:
    """One step of a run that learns: saturating reward, falling entropy, a gate that closes."""
    done = 1 - math.exp(-3 * step / steps)
    noise = random_state.gauss
    rollout, verify, train = 0.45 + noise(0, 0.03), 0.03 + abs(noise(0, 0.005)), 0.8 + noise(0, 0.05)
    return {
        "step": step,
        "reward/mean": 0.42 + 0.4 * done + noise(0, 0.05),
        "pass_rate": 0.42 + 0.4 * done + noise(0, 0.05),
        "gate/demonstration_share": max(0.0, 0.35 - 0.3 * done + noise(0, 0.06)),
        "entropy": 0.5 - 0.3 * done + noise(0, 0.015),
        "response_length": 28 + 6 * done + noise(0, 1.2),
        "grad_norm": math.exp(noise(-0.4, 0.3)) * (4 if step % 61 == 60 else 1),
        "loss": noise(0, 0.02),
        "learning_rate": 1e-4 * min(1, step / 10),
        "sampler/logprob_diff_mean": math.exp(noise(-14, 0.2)),
        "sampler/logprob_diff_max": math.exp(noise(-11, 0.3)),
        "rl/weight_abs_mean": 0.4 * math.exp(noise(0, 0.1)),
        "rl/weight_abs_p99": 0.9 * math.exp(noise(0, 0.03)),
        "sft/weight_abs_mean": 1.0,
        "sft/weight_abs_p99": 1.0,
        "rl/weight_abs_p50": 0.37,
        "rl/advantage_mean": noise(0, 0.02),
        "sft/advantage_mean": 1.0,
        "rl/masked_share": abs(noise(0.02, 0.01)),
        "rl/tokens": 3600 + noise(0, 150),
        "sft/tokens": 400 - 330 * done,
        "rl/effective_tokens": 2500 + 400 * done + noise(0, 150),
        "sft/effective_tokens": 390 - 330 * done,
        "time/rollout": rollout,
        "time/verify": verify,
        "time/train": train,
        "time/sync": 0.08,
        "time/total": rollout + verify + train + 0.2,
        "skipped_updates": 0,
        "custom/figure": step / 7,
    }


def evaluation_line(step: int, steps: int) -> dict:
    gained = 1 - math.exp(-3 * step / steps)
    levels = {}
    for name, (greedy, sampled) in LEVELS.items():
        scores = [value + (0.97 - value) * 0.6 * gained for value in (greedy, min(1, sampled + 0.25), sampled)]
        levels[name] = {"problems": 32} | dict(
            zip(("greedy", "pass@8", "mean@8"), (round(score * 32) / 32 for score in scores), strict=True)
        )
    means = {key: sum(level[key] for level in levels.values()) / len(levels) for key in ("greedy", "pass@8", "mean@8")}
    everything = {"problems": 32 * len(levels)} | means
    return {"step": step, "samples": 8, "temperature": 1.0, "levels": levels, "all": everything}


def write_run(folder: Path, steps: int = 40, seed: int = 0) -> Path:
    """A finished run's folder of `steps` steps with an evaluation every tenth of it."""
    random_state = random.Random(seed)
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"algo: hpt\nmodel: tiny\ndata: arithmetic\nsteps: {steps}\nseed: {seed}\n"
        "rollout:\n  engine: auto\n  temperature: 1.0\n"
    )
    (folder / "run.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "command": "python -m experiments.run seed=0",
                "seed": seed,
                "names": {"recipe": None, "algo": "hpt", "model": "some/folder/tiny", "data": "arithmetic"},
                "versions": {"python": "3.11.9", "torch": "2.13.0", "deepspeed": "0.19.8"},
                "git_commit": "0123abc",
                "world_size": 1,
                "engine": "vllm",
                "formula_text": FORMULA,
            }
        )
    )
    write_lines(folder / "metrics.jsonl", [metrics_line(step, steps, random_state) for step in range(1, steps + 1)])
    marks = sorted({*range(0, steps + 1, max(1, steps // 10)), steps})
    write_lines(folder / "evaluations.jsonl", [evaluation_line(step, steps) for step in marks])
    rollout = {
        "prompt": "17 + 25 + 8 = ?",
        "answer": "50",
        "level": "3 numbers",
        "status": "ok",
        "is_demonstration": False,
    }
    write_lines(
        folder / "rollouts" / f"step_{steps:06d}.jsonl",
        [
            rollout | {"response": "17 + 25 = 42\n42 + 8 = 50\n\\boxed{50}", "reward": 1.0},
            rollout | {"response": "17 + 25 = 32\n<script>alert('x')</script> & \\boxed{40}", "reward": 0.0},
            rollout | {"response": "best of all \\boxed{50}", "reward": 1.0},
            rollout | {"response": "as the expert says \\boxed{50}", "reward": 1.0, "is_demonstration": True},
        ],
    )
    return folder


def test_the_title_says_what_ran(tmp_path):
    html = write_report(write_run(tmp_path / "run")).read_text()
    assert "<title>hpt · tiny · arithmetic" in html


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, attributes, tags and the text of table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.attributes, self.tags, self.rows = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def report(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_every_promised_plot_is_on_the_page(tmp_path):
    html, page = report(write_run(tmp_path / "run"))
    evaluation = {"plot-evaluation-greedy", "plot-evaluation-mean", "plot-evaluation-pass"}
    assert evaluation | set(EXPECTED_PLOTS.values()) == {
        name for name in page.ids if re.fullmatch("plot-[a-z-]+", name) and not re.search("-p[0-9a-f]{6,}", name)
    }
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption")
    assert "custom/figure" in html, "a key without a plot is listed with the further figures"
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("key", EXPECTED_PLOTS)
def test_a_plot_appears_with_its_key_alone(tmp_path, key):
    folder = write_run(tmp_path / "run", steps=3)
    write_lines(folder / "metrics.jsonl", [{"step": 1, key: 0.5}, {"step": 2, key: 0.25}])
    (folder / "evaluations.jsonl").unlink()
    _, page = report(folder)
    assert [name for name in page.ids if name in EXPECTED_PLOTS.values()] == [EXPECTED_PLOTS[key]]
    label = next(value for name, value in page.attributes if name == "aria-label" and "steps 1 to 2" in value)
    assert "from 0.5 to 0.25" in label


def test_the_page_stands_alone_and_is_small(tmp_path):
    html, page = report(write_run(tmp_path / "run", steps=1000))
    assert len(html.encode()) < 1_000_000
    assert not {"link", "iframe", "img"} & set(page.tags) and page.tags.count("script") == html.count("<script>") == 1
    addresses = {value for key, value in page.attributes if value and "://" in value and not key.startswith("xmlns")}
    assert not addresses and set(re.findall(r'https?://[^"\s<]*', html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html and not re.findall(r"url\((?!#)", html)
    references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)
    assert references and {first or second for first, second in references} <= set(page.ids)


def test_rollouts_are_escaped_and_the_first_best_and_worst(tmp_path):
    html, page = report(write_run(tmp_path / "run"))
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; \\boxed{40}" in html
    assert page.tags.count("script") == 1, "its own"
    shown = html[html.index('id="rollouts"') : html.index('id="settings"')]
    assert re.findall(r"<h3>(\w[\w ]*?) <", shown) == ["First", "Best", "Worst", "Demonstration"]
    assert shown.index("42 + 8") < shown.index("best of all") < shown.index("&lt;script") < shown.index("as the expert")
    assert "at step 40" in shown


def test_the_table_holds_the_numbers_of_the_evaluations(tmp_path):
    _, page = report(write_run(tmp_path / "run"))
    before, after = evaluation_line(0, 40), evaluation_line(40, 40)
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.rows}
    for name in [*LEVELS, "all"]:
        old, new = (line["all"] if name == "all" else line["levels"][name] for line in (before, after))
        expected = [str(old["problems"])]
        for key in ("greedy", "pass@8", "mean@8"):
            expected += [f"{100 * old[key]:.1f}", f"{100 * new[key]:.1f}", f"{100 * (new[key] - old[key]):+.1f}"]
        assert cells[name] == expected


def test_an_interrupted_run_still_gives_a_report_with_a_note(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:25]) + lines[25][:40])
    (folder / "evaluations.jsonl").unlink()
    (folder / "run.json").unlink()
    (folder / "rollouts" / "step_000041.jsonl").write_text('{"prompt": "half')
    html, page = report(folder)
    assert "Line 26 of metrics.jsonl is incomplete" in html and "The last recorded step is 25 of 40 planned" in html
    assert "run.json is missing" in html and "result" not in page.ids and "plot-reward" in page.ids
    assert "at step 40" in html, "the newest file with whole lines is shown"


def test_no_step_at_all_is_a_report_too(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (folder / name).write_text("")
    html, page = report(folder)
    assert "No training step was recorded" in html and "svg" not in page.tags


def test_gaps_single_points_and_repeated_steps(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    (folder / "evaluations.jsonl").unlink()
    lines = [
        {"step": 1, "entropy": 0.5},
        {"step": 2, "entropy": math.nan, "grad_norm": None},
        {"step": 3, "entropy": None},
        {"step": 4, "entropy": 0.25, "loss": "high"},
        {"step": 5, "entropy": math.inf, "pass_rate": 9.0},
        {"step": 5, "entropy": 0.125, "pass_rate": 0.75, "response_length": 12},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    html, page = report(folder)
    assert [name for name in page.ids if re.fullmatch("plot-[a-z]+(-rate)?", name)] == [
        "plot-pass-rate",
        "plot-entropy",
        "plot-length",
    ], "keys without any number give no plot"
    labels = [value for key, value in page.attributes if key == "aria-label"]
    assert any("entropy from 0.5 to 0.125" in label for label in labels) and any("0.75" in label for label in labels)
    lone = html[html.index('id="plot-length"') :]
    assert "<use " in lone[: lone.index("</figure>")], "a single point is drawn as a marker"
    entropy = html[html.index('id="plot-entropy"') : html.index('id="plot-length"')]
    line = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', entropy))
    assert [part.count("L") for part in line.split("M")[1:]] == [0, 1], "only steps 4 and 5 are joined"


def test_long_runs_keep_their_spikes(tmp_path):
    folder = write_run(tmp_path / "run", steps=2000)
    (folder / "evaluations.jsonl").unlink()
    write_lines(
        folder / "metrics.jsonl",
        [{"step": step, "grad_norm": 50.0 if step == 777 else 1.0 + 0.1 * (step % 2)} for step in range(2000)],
    )
    html, _ = report(folder)
    figure = html[html.index('id="plot-gradient"') :]
    raw = re.search(r'<path d="([^"]*)"[^>]*stroke-opacity', figure).group(1)
    heights = [float(pair.split()[1]) for pair in re.findall(r"[ML] ([\d. ]+)", raw)]
    assert len(heights) < 300 and max(heights) - min(heights) > 100
    assert "centered average over 133 steps" in html


def test_only_noisy_series_are_smoothed():
    def window(values: list[float]) -> int:
        return smoothing_window(Series("any", tuple(range(len(values))), tuple(values)))

    noise = random.Random(0)
    assert window([noise.gauss(0, 1) for _ in range(100)]) == 7
    assert window([min(1.0, step / 10) for step in range(100)]) == 1, "a schedule is drawn as it is"
    assert window([noise.gauss(0, 1) for _ in range(19)]) == window([1.0] + [math.nan] * 50) == 1


def test_a_folder_that_is_no_run_is_refused_without_a_traceback(tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("algo: hpt\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl not found"):
        write_report(tmp_path)
    good = write_run(tmp_path / "good", steps=2)
    assert main([str(tmp_path), str(good)]) == 2
    out, err = capsys.readouterr()
    assert str(good / "report.html") in out and err.startswith("error: ") and str(tmp_path) in err
    assert err.count("\n") == 1 and main([str(good)]) == 0


def test_a_broken_configuration_names_its_file(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    (folder / "config.yaml").write_text("algo: [hpt\n")
    with pytest.raises(DataError, match=r"config\.yaml: not readable as YAML"):
        write_report(folder)


def test_colours_have_contrast_in_light_and_dark(tmp_path):
    html, _ = report(write_run(tmp_path / "run", steps=2))
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part))
        for part in html.split("prefers-color-scheme: dark", 1)
        if "--page" in part
    )
    for theme in (light, dark):
        least_ratios = {"ink": 7, "soft": 4.5, "good": 4.5, "bad": 4.5} | {f"c{index}": 3 for index in range(7)}
        for name, least in least_ratios.items():
            assert contrast(theme[name], theme["card"]) >= least, name


def contrast(first: str, second: str) -> float:
    """The contrast ratio of the web accessibility guidelines, 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_printed_table_fits_80_plain_columns(encoding):
    before, after = evaluation_line(0, 40), evaluation_line(40, 40)
    target = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(before, after, Console(file=target, width=80, highlight=False))
    target.flush()
    text = target.buffer.getvalue().decode(encoding)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert "\x1b" not in text and "…" not in text and max(map(len, lines)) <= 80
    arrow = "→" if encoding == "utf-8" else "->"
    hardest = next(line for line in lines if line.startswith("6 numbers"))
    assert hardest.replace(arrow, "to").replace("|", " ").split() == (
        "6 numbers 32 25.0 to 65.6 +40.6 37.5 to 71.9 +34.4 12.5 to 59.4 +46.9".split()
    )
    assert lines[-1].startswith("all") and len([line for line in lines if arrow in line]) == 2 + len(LEVELS)


def test_missing_evaluations_are_dashes_not_numbers():
    before = {"step": 0, "levels": {"easy": {"problems": 4, "greedy": 0.5}}}
    after = {"step": 9, "levels": {"easy": {"problems": 4, "greedy": math.nan}, "hard": {"problems": 2, "greedy": 1.0}}}
    rows = accuracy_rows(before, after)
    assert [(row.level, row.changes[0].percents()) for row in rows] == [
        ("easy", ("50.0", "–", "")),
        ("hard", ("–", "100.0", "")),
    ]
    assert accuracy_rows({}, {}) == []
