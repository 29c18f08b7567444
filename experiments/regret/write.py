"""The files of a measurement of regret: tables, a page with figures, all numbers as JSON and a row per group as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from experiments.diagnose import write as diagnose
from experiments.diagnose.sampling import folder_name
from experiments.drawing import inline, render
from experiments.grid import Grid, Row, markdown, markdown_text
from experiments.regret import figures
from experiments.regret.analysis import ACTIONS, BEST_CONSTANT, ORACLE, RULES, UNITS, Analysis, AtCount
from experiments.regret.measuring import FEATURES, OBJECTIVES, Result
from upge.errors import DataError
from upge.evaluation.intervals import t_interval
from upge.measure.regret import Mean, gains

MISSING = "–"
#: Rule of a step → how tables name it.
RULE_NAMES = {
    "sgd": "steps of one length along the gradient",
    "adam": "steps of one length along Adam's direction",
    "rate": "steps along the gradient at one learning rate",
}


@dataclass(frozen=True)
class Analyzed:
    """A policy's measurements, and what they say for every rule and objective."""

    result: Result
    analyses: tuple[Analysis, ...]

    def of(self, rule: str) -> list[Analysis]:
        """The analyses of a rule, in the order of `OBJECTIVES`."""
        return [one for one in self.analyses if one.rule == rule]


def count_grid(analyzed: Analyzed, rule: str) -> Grid:
    """A row per number of successes: the gains of both signals, and the difference."""
    of, rows = analyzed.of(rule), []
    for each in zip(*(one.by_count for one in of), strict=True):
        cells = [f"{each[0].successes}/{analyzed.result.group_size}", f"{each[0].groups} ({each[0].prompts})"]
        for at in each:
            cells += [ranged(at.gains.get(name)) for name in ("rollouts", "demonstration")] + [ranged(at.difference)]
        rows.append(Row(tuple(cells)))
    header = ["successes", "groups (prompts)"]
    for objective in OBJECTIVES:
        header += [f"{objective}: rollouts", "demonstration", "difference"]
    title = f"Gain of one prompt's step by the successes in its group, {RULE_NAMES[rule]} ({_units()})"
    return Grid(f"counts-{rule}", title, tuple(header), tuple(rows), 2)


def choice_grid(analyzed: Analyzed, rule: str) -> Grid:
    """A row per number of successes: how often each action gains the most."""
    rows = []
    for each in zip(*(one.by_count for one in analyzed.of(rule)), strict=True):
        cells = [f"{each[0].successes}/{analyzed.result.group_size}"]
        for at in each:
            cells += [_share(at, name) for name in ACTIONS]
        rows.append(Row(tuple(cells)))
    header = ["successes", *(f"{objective}: {name}" for objective in OBJECTIVES for name in ACTIONS)]
    title = f"How often each action gains the most, in %, {RULE_NAMES[rule]}"
    return Grid(f"choices-{rule}", title, tuple(header), tuple(rows))


def _share(at: AtCount, name: str) -> str:
    one = at.choices[name]
    return f"{100 * one.value:.0f} ({100 * one.low:.0f}..{100 * one.high:.0f})"


def gate_grid(analyzed: Analyzed, rule: str) -> Grid:
    """A row per gate: its gain, its regret, and how far it is ahead of the best constant mixture."""
    of, rows = analyzed.of(rule), []
    for number, each in enumerate(zip(*(one.scores for one in of), strict=True)):
        cells = [each[0].name]
        for score in each:
            cells += [ranged(score.gain), ranged(score.regret) if score.name != ORACLE else MISSING]
            p_value = "" if math.isnan(score.p_holm) else f", p {score.p_holm:.2g}"
            cells.append(MISSING if score.name == BEST_CONSTANT else ranged(score.ahead) + p_value)
        tested = number > 0 and not math.isnan(each[0].p_holm) and math.isnan(of[0].scores[number - 1].p_holm)
        rows.append(Row(tuple(cells), rule=number == 1 or tested))
    header = ["gate"]
    for objective in OBJECTIVES:
        header += [f"{objective}: gain", "regret", "ahead of the best constant"]
    title = f"Gates, {RULE_NAMES[rule]} ({_units()}; p adjusted by Holm)"
    return Grid(f"gates-{rule}", title, tuple(header), tuple(rows))


def _units() -> str:
    return ", ".join(f"{objective} in {unit}" for objective, (unit, _) in UNITS.items())


def finite_grid(analyzed: Analyzed) -> Grid | None:
    """Steps of full size next to their first-order gains."""
    rows = []
    for one in analyzed.result.finite:
        cells = [one.metric, one.direction, str(len(one.effective)), f"{min(one.effective):.2f}"]
        for objective, (_, factor) in UNITS.items():
            made, predicted = (torch.tensor(of[objective]) * factor for of in (one.gains, one.predicted))
            cells += [_over_prompts(made), _over_prompts(predicted), _correlation(made, predicted)]
        rows.append(Row(tuple(cells)))
    header = ["steps", "along", "prompts", "effective share"]
    for objective in OBJECTIVES:
        header += [f"{objective}: gain", "first order", "correlation"]
    title = f"Steps of full size next to their first-order gains on the same held-out data ({_units()})"
    return Grid("finite", title, tuple(header), tuple(rows), 2) if rows else None


def _over_prompts(values: torch.Tensor) -> str:
    interval = t_interval(values.tolist())
    return ranged(Mean(interval.value, interval.low, interval.high, math.nan))


def _correlation(first: torch.Tensor, second: torch.Tensor) -> str:
    if len(first) < 3:
        return MISSING
    return f"{float(torch.corrcoef(torch.stack([first, second]))[0, 1]):.3f}"


def grids(analyzed: Analyzed) -> list[Grid]:
    """All tables of a policy."""
    made = [grid(analyzed, rule) for rule in RULES for grid in (gate_grid, count_grid, choice_grid)]
    finite = finite_grid(analyzed)
    return [*made, *([finite] if finite is not None else [])]


def ranged(mean: Mean | None) -> str:
    """A mean as in "0.42 (0.31..0.53)"."""
    if mean is None or math.isnan(mean.value):
        return MISSING
    if mean.low == mean.high or math.isnan(mean.low):
        return f"{mean.value:.3f}"
    return f"{mean.value:.3f} ({mean.low:.3f}..{mean.high:.3f})"


def summary(analyzed: Analyzed) -> str:
    """A sentence about the sample."""
    details, result = analyzed.result.details, analyzed.result
    return (
        f"{details['prompts']:.0f} prompts with {len(result.prompts)} groups of {result.group_size} rollouts, pass "
        f"rate {100 * details['pass_rate']:.0f} %; held-out pass rate {100 * details['held_out_pass_rate']:.0f} %; "
        f"{details['parameters']:,.0f} parameters; {details['seconds']:.0f} s."
    )


def files(policies: Sequence[Analyzed], metadata: Mapping[str, Any], notes: Sequence[str], folder: Path) -> list[Path]:
    """Write all files into `folder`; return their paths.

    Raises:
        DataError: the files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [
            path
            for one in policies
            for rule in ("sgd", "adam")
            for path in figures.draw(one.result, one.of(rule), f"{rule}-{folder_name(one.result.label)}", folder)
        ]
        whole = {**metadata, "notes": [*notes], "policies": [plain(one) for one in policies]}
        (folder / "regret.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "groups.csv").write_text(table(policies), "utf-8")
        (folder / "report.md").write_text(page(policies, metadata, notes), "utf-8")
        (folder / "report.html").write_text(report(policies, metadata, notes, drawn), "utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another output=") from error
    return [*(folder / name for name in ("report.html", "report.md", "regret.json", "groups.csv")), *drawn]


def plain(one: Analyzed) -> dict[str, Any]:
    """A policy's entry in regret.json."""
    result = one.result
    about = {"label": result.label, "step": result.step, "group_size": result.group_size, "details": result.details}
    return diagnose.plain(about | {"finite": result.finite, "analyses": one.analyses})


def table(policies: Sequence[Analyzed]) -> str:
    """The text of groups.csv: the features of every group, and the first-order gains of a step of length 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [(metric, objective, action) for metric, objective in policies[0].result.signals for action in ACTIONS]
    names = [name for name in names if name[2] != "nothing"]
    writer.writerow(["policy", "prompt", "successes", *FEATURES, *(", ".join(name) for name in names)])
    for one in policies:
        result = one.result
        columns = []
        for metric, objective, action in names:
            pair = torch.tensor([ACTIONS[action]]).double().expand(len(result.prompts), 2)
            columns.append(gains(result.signals[metric, objective], pair).mean(dim=1).tolist())
        lines = zip(result.prompts.tolist(), result.successes.tolist(), result.features.tolist(), *columns, strict=True)
        for prompt, successes, features, *values in lines:
            numbers = (f"{value:.6g}" for value in (*features, *values))
            writer.writerow([result.label, prompt, successes, *numbers])
    return text.getvalue()


def page(policies: Sequence[Analyzed], metadata: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The text of report.md."""
    parts = ["# Regret of gates", f"`{metadata['command']}`"]
    if notes:
        parts.append("\n".join(f"> {markdown_text(note)}  " for note in notes))
    for one in policies:
        parts += [f"## {markdown_text(one.result.label)}", markdown_text(summary(one))]
        for grid in grids(one):
            parts += [f"### {markdown_text(grid.title)}", markdown(grid)]
    return "\n\n".join(parts) + "\n"


def section(policies: Sequence[Analyzed], metadata: Mapping[str, Any]) -> str:
    """The generated part of docs/regret.md: of each policy the gates and the gains by successes under Adam's metric."""
    commit = (metadata["git_commit"] or "unknown")[:9]
    parts = ["", f"    {metadata['command']}", f"Seed {metadata['seed']}, commit {commit}, {metadata['made']}."]
    for one in policies:
        name = f"adam-{folder_name(one.result.label)}"
        parts += [f"### Policy {markdown_text(one.result.label)}", markdown_text(summary(one))]
        parts.append(f"![Gains, best actions and regret by pass rate: {name}](results/regret-{name}.png)")
        made = [count_grid(one, "adam"), gate_grid(one, "adam"), finite_grid(one)]
        for grid in (grid for grid in made if grid is not None):
            parts += [f"**{markdown_text(grid.title)}**", markdown(grid)]
    return "\n\n".join(parts) + "\n\n"


def report(
    policies: Sequence[Analyzed], metadata: Mapping[str, Any], notes: Sequence[str], drawn: Sequence[Path]
) -> str:
    """The text of report.html, with the figures inside."""
    parts = []
    for one in policies:
        own = [path for path in drawn if path.suffix == ".svg" and path.stem in _stems(one)]
        captions = [f"For {RULE_NAMES[path.stem.partition('-')[0]]}. {figures.CAPTION}" for path in own]
        drawings = [Markup(inline(path, re.sub(r"\W", "_", path.stem))) for path in own]
        pictures = [*zip(drawings, captions, strict=True)]
        about = {"label": one.result.label, "summary": summary(one)}
        parts.append(about | {"figures": pictures, "grids": grids(one)})
    values = {"title": "Regret of gates", "command": metadata["command"], "notes": notes, "figures": []}
    return render(Path(diagnose.__file__).with_name("diagnosis.html.j2"), **values, parts=parts)


def _stems(one: Analyzed) -> set[str]:
    return {f"{rule}-{folder_name(one.result.label)}" for rule in RULES}
