"""examples/: every script runs as a user runs it, what it prints is true, and its notebook is current."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def load_render() -> ModuleType:
    """The module examples/render.py; the folder is no package."""
    spec = importlib.util.spec_from_file_location("render", EXAMPLES / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()


def printed(name: str, folder: Path) -> str:
    """What an example prints, run in a folder of its own without the hub."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def table(text: str, head: str) -> dict[str, list[float]]:
    """The rows of numbers below the line that begins with `head`, by their first word."""
    lines = text[text.index(head) :].splitlines()[1:]
    rows = {}
    for line in lines:
        match = re.fullmatch(r"(\S+|\(\d, \d\))((?:\s+-?\d+(?:\.\d+)?)+)", line)
        if not match:
            break
        rows[match[1]] = [float(number) for number in match[2].split()]
    assert rows, f"no rows below {head!r}"
    return rows


# What the examples print.


@pytest.mark.parametrize(("name", "masked"), [("SFT", 0), ("GRPO", 3)])
def test_sft_and_grpo_have_the_textbooks_gradient(tmp_path: Path, name: str, masked: int) -> None:
    text = printed("one_estimator", tmp_path)
    rows = table(text, f"{name} ")
    for w, mask, ratio, advantage, weight, textbook in rows.values():
        assert weight == pytest.approx(textbook, abs=1e-12)
        assert weight == pytest.approx(w * mask * ratio * advantage, abs=2e-3), "of rounded factors"
    assert sum(mask == 0 for _, mask, *_ in rows.values()) == masked
    differences = re.findall(r"largest difference .*: (\S+)", text)
    assert len(differences) == 2 and all(float(difference) < 1e-14 for difference in differences)


def test_masks_trade_bias_for_variance(tmp_path: Path) -> None:
    rows = table(printed("own_mask", tmp_path), "mask ")
    bias, _, deviation, few, many = zip(*rows.values(), strict=True)
    assert list(rows) == ["NoMask", "PPOClip", "Band(1.5)", "Band(1.2)"]
    assert 0.1 < bias[0] < min(bias[1:]) and deviation[0] > max(deviation[1:])
    assert few[0] > max(few[1:]) and many[0] < min(many[1:]), "a small batch gains from a mask, a large one loses"
    assert (tmp_path / "runs" / "examples" / "own_mask.png").stat().st_size > 1000


def test_the_ratio_of_the_weights_shows_the_factor_that_differs(tmp_path: Path) -> None:
    verdicts = dict(re.findall(r"^(\w+): (.*)$", printed("judge_a_loss", tmp_path), re.MULTILINE))
    assert verdicts == {
        "paper": "none, up to a constant, times 1",
        "sum_over_group": "none, up to a constant, times 4",
        "mean_over_all_tokens": "w: follows the length, times 0.186",  # 8 responses of 43 tokens
        "no_standard_deviation": "Â: follows the group's std, times 1",
        "no_ratio": "1/π_ref: follows 1/ratio, times 1",
        "clip_without_minimum": "1_stable: 4 tokens are moved by one loss only",
    }


@pytest.mark.slow
def test_the_gate_follows_from_the_rollouts(tmp_path: Path) -> None:
    text = printed("why_hpt_switched", tmp_path)
    assert "is the recorded one for 32 of 32 prompts" in text
    rows = re.findall(r"^ *\d  \S+=\? +\d \w+ +(\d\.\d+)  (\w+) +(\w+)$", text, re.MULTILINE)
    assert len(rows) == 16 and {source for _, source, _ in rows} == {"rollouts", "demonstrations"}
    for pass_rate, gate, learned in rows:
        assert gate == ("rollouts" if float(pass_rate) > 0 else "demonstrations")
        assert learned in (gate, "nothing")
    answer = re.search(r"the answer is (-?\d+)$", text, re.MULTILINE)
    responses = re.findall(r"^  (rollout|demonstration) .*boxed\{(-?\d+)\}", text, re.MULTILINE)
    assert answer and responses.pop() == ("demonstration", answer[1])
    assert responses and ("rollout", answer[1]) not in responses, "the prompt is one that failed"


@pytest.mark.slow
def test_three_trainers_take_the_same_step(tmp_path: Path) -> None:
    text = printed("three_trainers", tmp_path)
    rows = re.findall(r"^(\w+) +length of the step (\S+), relative difference to the plain loop (\S+)$", text, re.M)
    assert [name for name, *_ in rows] == ["transformers", "TRL"]
    assert all(float(length) > 0.05 and float(difference) < 1e-4 for _, length, difference in rows)


@pytest.mark.slow
def test_students_approach_their_teacher(tmp_path: Path) -> None:
    text = printed("distill_a_teacher", tmp_path)
    small, teacher = re.search(r"small model (\d+)%, teacher (\d+)%", text).groups()
    assert int(teacher) > int(small)
    divergences = re.findall(r"^(\w+): .* divergence (\S+) in the first four steps, (\S+) in the last four", text, re.M)
    assert [name for name, *_ in divergences] == ["opd", "gkd"]
    assert all(0 < float(last) < float(first) for _, first, last in divergences)
    weights = [float(number) for number in text.splitlines()[-2].split()]
    assert min(weights) < -3, "the teacher objects to some token"


# The notebooks and the list.


@pytest.mark.parametrize("name", render.NAMES)
def test_the_notebook_is_that_of_the_script(name: str) -> None:
    page = json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))
    actual = [render.Cell(cell["cell_type"], "".join(cell["source"])) for cell in page["cells"]]
    assert actual == render.cells((EXAMPLES / f"{name}.py").read_text("utf-8")), "run python examples/render.py"
    assert page["nbformat"] == 4 and any(cell.get("outputs") for cell in page["cells"])


def test_a_notebook_holds_text_code_output_and_figure(tmp_path: Path) -> None:
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 2\n\n\n# %%\nprint(x)\n"
    script += "import matplotlib.pyplot as plt\nplt.figure()\n"
    page = render.notebook(script, render.run(script))
    text, first, second = page["cells"]
    assert text["cell_type"] == "markdown" and "".join(text["source"]) == "# Title\n\nText."
    assert first["source"] == ["x = 2"] and first["outputs"] == []
    stream, figure = second["outputs"]
    assert stream["text"] == ["2\n"] and figure["data"]["image/png"].startswith("iVBORw0KGgo")
    # Other text keeps the output, other code does not.
    path = tmp_path / "page.ipynb"
    assert render.stored_outputs(path, script) is None
    path.write_text(json.dumps(page), "utf-8")
    assert render.stored_outputs(path, script.replace("Text", "More")) == [[], [stream, figure]]
    assert render.stored_outputs(path, script.replace("x = 2", "x = 3")) is None


def test_every_script_is_listed() -> None:
    assert sorted([*render.NAMES, "render"]) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
    text = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"({name}.py)" in text and f"({name}.ipynb)" in text for name in render.NAMES)
